"""The examples in the book's library reference run, and every public function of a module with a page has one."""

import ast
import doctest
import re
from pathlib import Path

import pytest

PAGES = sorted(path for path in Path("docs/library").glob("*.md") if path.stem != "index")
# The package itself: it holds no more than the version.
INSIDE = {"__init__"}


def public_names(module):
    tree = ast.parse(Path(f"lib/latentree/{module}.py").read_text())
    return [
        x.name
        for x in tree.body
        if isinstance(x, (ast.FunctionDef, ast.ClassDef))
        and not x.name.startswith("_")
        and x.name != "main"
    ]


def examples(page):
    return "\n".join(
        re.findall(r"^```pycon\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    )


def test_every_module_has_a_page():
    modules = {path.stem for path in Path("lib/latentree").glob("*.py")}
    assert modules - INSIDE == {page.stem for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_public_function_has_an_example(page):
    code = examples(page)
    assert [name for name in public_names(page.stem) if not re.search(rf"\b{name}\b", code)] == []
    assert f"automodule:: latentree.{page.stem}" in page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page, capsys):
    test = doctest.DocTestParser().get_doctest(
        examples(page), {"__name__": "__main__"}, page.name, str(page), 0
    )
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert test.examples and runner.run(test).failed == 0, capsys.readouterr().out
