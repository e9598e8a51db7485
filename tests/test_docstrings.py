"""Every module can be imported, and the examples that stand in docstrings run."""

import doctest
import importlib
from pathlib import Path

LIBRARY = Path("lib")


def test_examples_in_docstrings_run():
    tried = 0
    for file in sorted(LIBRARY.rglob("*.py")):
        name = ".".join(file.relative_to(LIBRARY).with_suffix("").parts)
        result = doctest.testmod(importlib.import_module(name.removesuffix(".__init__")))
        assert result.failed == 0, name
        tried += 1
    assert tried > 20
