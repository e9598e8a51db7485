"""What can be known of it: exact predictors, ceilings, ideal readers, informations."""
