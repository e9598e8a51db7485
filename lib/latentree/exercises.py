"""Exercises of the notebooks: their checks, and notebooks for students, with the solutions taken out.

In a notebook an exercise is three cells, marked by tags: `exercise` (the task, with its difficulty and a hint), `solution` (code,
of which the lines between BEGIN and END are the solution) and `check` (which calls `check` below).

    python -m latentree.exercises FOLDER    writes a student's copy of every notebook into FOLDER
"""

import re
import sys
from pathlib import Path

import nbformat
import numpy as np

from latentree.errors import UserError
from latentree.files import write_text

BEGIN, END = "# begin solution", "# end solution"
STUB = "...  # your solution"


def check(exercise: str, got, expected, tolerance: float = 1e-6, mend: str = "") -> None:
    """Says that an answer is right; AssertionError with what was given, and the `mend`, if it is not.

    `got` and `expected` are numbers, strings or arrays of one shape; numbers may differ by `tolerance` times the largest of
    `expected` (NaN equals NaN).
    """
    problem = wrong(got, expected, tolerance)
    assert not problem, f"{exercise}: not yet: {problem}" + (f". {mend}" if mend else "")
    print(f"{exercise}: right")


def wrong(got, expected, tolerance: float) -> str:
    """What is wrong with an answer, empty if nothing is."""
    if got is None or got is ...:
        return "nothing was given"
    try:
        got, expected = np.asarray(got), np.asarray(expected)
    except (TypeError, ValueError):
        return f"{got!r:.60} is no number or table of numbers"
    if got.shape != expected.shape:
        return f"its shape is {got.shape}, not {expected.shape}"
    if expected.dtype.kind not in "biufc":
        return "" if (got == expected).all() else f"{got.tolist()!r:.60} is not it"
    if got.dtype.kind not in "biufc":
        return f"{got.tolist()!r:.60} is no number or table of numbers"
    near = np.isclose(got, expected, rtol=0, atol=tolerance * max(1e-12, float(np.abs(np.nan_to_num(expected)).max(initial=0))), equal_nan=True)
    return "" if near.all() else f"{(~near).sum()} of {near.size} numbers are wrong; the first is {got[~near].flat[0]:.6g}"


def has_tag(cell, tag: str) -> bool:
    """Whether a notebook's cell is marked with a tag."""
    return tag in cell.metadata.get("tags", [])


def stub(source: str) -> str:
    """A solution cell without its solution. UserError unless BEGIN and END stand in it, in this order, once or more."""
    if not re.search(f"{BEGIN}.*{END}", source, re.DOTALL) or source.count(BEGIN) != source.count(END):
        raise UserError(f"solution {source[:60]!r}: has no lines {BEGIN!r} and {END!r}; put them around what students shall write")
    return re.sub(rf"^([ \t]*){BEGIN}.*?{END}", rf"\1{STUB}", source, flags=re.DOTALL | re.MULTILINE)


def student_copy(notebook):
    """A notebook with stubs for solutions and without outputs."""
    copy = nbformat.from_dict(notebook)
    for cell in copy.cells:
        if has_tag(cell, "solution"):
            cell.source = stub(cell.source)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return copy


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) != 1:
            raise UserError("usage: python -m latentree.exercises FOLDER, where students' notebooks shall be")
        folder = Path(arguments[0])
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path("notebooks").glob("[0-9][0-9]_*.ipynb")):
            write_text(folder / path.name, nbformat.writes(student_copy(nbformat.read(path, 4))) + "\n")
            print(folder / path.name)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
