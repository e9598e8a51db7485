"""latentree: how structure in data grows mechanisms in language models, measured along training."""

import os
import tempfile

__version__ = "0.1.0"

if os.path.expanduser("~") == "~":  # an unknown user without HOME, which nltk asks for on import
    os.environ["HOME"] = tempfile.gettempdir()
