"""latentree: how structure in data grows mechanisms in language models, measured along training."""

__version__ = "0.1.0"
