"""latentree: how structure in data grows mechanisms in language models, measured along training."""

import os
import tempfile
import warnings

__version__ = "0.1.0"

if os.path.expanduser("~") == "~":  # an unknown user without HOME, which nltk asks for on import
    os.environ["HOME"] = tempfile.gettempdir()

# By the first any library's remark, by the second a bar of progress could end a run.
ignored = [name for name in os.environ if name.startswith(("PYTHONWARNINGS", "TQDM_"))]
for name in ignored:
    del os.environ[name]
if ignored:
    warnings.filters[:] = [found for found in warnings.filters if found[0] != "error"]
    warnings.warn(f"ignored in the environment: {', '.join(ignored)}", stacklevel=2)
