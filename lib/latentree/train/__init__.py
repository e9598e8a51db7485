"""Models of it: built from a few numbers, trained with exact resume."""
