"""latentree: how structure in data grows mechanisms in language models, measured along training."""

import os
import tempfile
import warnings

__version__ = "0.1.0"

if os.path.expanduser("~") == "~":  # an unknown user without HOME, which nltk asks for on import
    os.environ["HOME"] = tempfile.gettempdir()

if os.environ.pop("PYTHONWARNINGS", ""):  # by error, any library's remark would end a run
    warnings.filters[:] = [found for found in warnings.filters if found[0] != "error"]
    warnings.warn("PYTHONWARNINGS in the environment is ignored", stacklevel=2)
