"""How large the house is: `python bench/house.py` prints the table that stands in CONTRIBUTING.md.

Lines are those that are not blank, docstrings in; names are functions, classes and constants
without an underscore.
"""

import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd

LIBRARY = Path("lib/latentree")
SHORT = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)


def lines(text: str) -> int:
    """Lines that are not blank."""
    return sum(bool(line.strip()) for line in text.splitlines())


def public_names(text: str) -> list[str]:
    """Functions, classes and constants of a module."""
    found = []
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append(node.name)
        elif isinstance(node, ast.Assign):
            targets = [name for target in node.targets for name in ast.walk(target)]
            found += [name.id for name in targets if isinstance(name, ast.Name)]
    return [name for name in found if not name.startswith("_")]


def rooms() -> pd.DataFrame:
    """A row for each room of the library, and one for all: modules, lines, public names."""
    rows = []
    for folder in sorted(file for file in LIBRARY.iterdir() if (file / "__init__.py").exists()):
        texts = [file.read_text() for file in folder.glob("*.py")]
        names = [name for text in texts for name in public_names(text)]
        rows.append((folder.name, len(texts) - 1, sum(map(lines, texts)), len(names)))
    table = pd.DataFrame(rows, columns=["room", "modules", "lines", "public names"])
    table.loc[len(table)] = ["all", *table.iloc[:, 1:].sum()]
    return table


def code_cells(notebook: Path) -> list[str]:
    """The sources of a notebook's code cells, without its parameters and exercises' checks."""
    cells = json.loads(notebook.read_text())["cells"]
    apart = {"parameters", "check"}
    return [
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and not apart & set(cell["metadata"].get("tags", []))
    ]


def notebooks() -> pd.DataFrame:
    """A row for each notebook: code cells, their lines, syntax nodes, comprehensions, lambdas."""
    rows = []
    for path in sorted(
        Path("notebooks").rglob("[0-9]*.ipynb"), key=lambda path: (len(path.parts), path)
    ):
        cells = code_cells(path)
        trees = [list(ast.walk(ast.parse(cell))) for cell in cells]
        long = [lines(cell) for cell in cells]
        short = sum(isinstance(node, SHORT) for nodes in trees for node in nodes)
        nodes = statistics.median(map(len, trees))
        median = statistics.median(long)
        name = path.relative_to("notebooks").with_suffix("")
        rows.append((name, len(cells), median, max(long), nodes, short / len(cells)))
    columns = "notebook|code cells|median lines|longest|median nodes|comprehensions a cell"
    return pd.DataFrame(rows, columns=columns.split("|")).round(2)


def tests() -> int:
    """How many tests pytest collects."""
    line = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", "tests"]
    told = subprocess.run(line, capture_output=True, text=True).stdout  # a line for each file
    return sum(int(count) for count in re.findall(r"^tests/\S+: (\d+)$", told, re.MULTILINE))


if __name__ == "__main__":
    print(rooms().to_markdown(index=False), "", sep="\n")
    print(notebooks().to_markdown(index=False), "", sep="\n")
    texts = [file.read_text() for file in Path("tests").glob("*.py")]
    functions = sum(len(re.findall(r"^ *def test_", text, re.MULTILINE)) for text in texts)
    print(f"{tests()} tests by {functions} functions, {sum(map(lines, texts))} lines")
