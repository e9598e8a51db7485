"""What is measured: pure functions of a model and tokens, each tried on known answers."""
