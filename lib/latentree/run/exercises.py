"""Exercises of the notebooks: their checks, and students' notebooks, the solutions taken out.

An exercise is three cells, marked by tags: `exercise` (the task, with its difficulty and a hint),
`solution` (code, of which the lines between BEGIN and END are the solution) and `check` (which
calls `check` below).

    python -m latentree.run.exercises FOLDER PROFILE    writes a student's copy of every notebook

A copy has the profile's parameters, reads the models of `make run`, and writes into
outputs/scratch.
"""

import re
import sys
from pathlib import Path

import nbformat
import numpy as np
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from latentree.data.files import read_yaml

BEGIN, END = "# begin solution", "# end solution"
STUB = "...  # your solution"


def check(exercise: str, got, expected, tolerance: float = 1e-6, mend: str = "") -> None:
    """Say that an answer is right; AssertionError with how it differs, and the `mend`, if not.

    `got` and `expected` are numbers, strings or arrays of one shape; numbers may differ by
    `tolerance` times the largest of `expected` (NaN equals NaN).
    """
    try:
        if got is None or got is ...:
            raise ValueError("nothing was given")
        got = got.cpu() if hasattr(got, "cpu") else got  # of a model on a GPU
        np.testing.assert_equal(tuple(np.shape(got)), tuple(np.shape(expected)), "shape")
        if np.asarray(expected).dtype.kind in "biufc":
            largest = np.abs(np.nan_to_num(expected)).max(initial=1e-12)
            np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * largest)
        else:
            np.testing.assert_array_equal(got, expected)
    except (AssertionError, TypeError, ValueError) as error:
        raise AssertionError(f"{exercise}: not yet: {error}\n{mend}") from None
    print(f"{exercise}: right")


def student_copy(notebook):
    """A notebook with stubs for solutions and without outputs; no check stops a run of all cells.

    Raises ValueError for a solution without BEGIN and END.
    """
    copy = nbformat.from_dict(notebook)
    for cell in copy.cells:
        tags = cell.metadata.get("tags", [])
        if "check" in tags:
            cell.metadata["tags"] = [*tags, "raises-exception"]
        if "solution" in tags:
            marked = rf"^([ \t]*){BEGIN}.*?{END}"
            cell.source, found = re.subn(marked, rf"\1{STUB}", cell.source, flags=re.M | re.S)
            if not found:
                raise ValueError(f"solution {cell.source[:60]!r}: put {BEGIN!r}, {END!r} around it")
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return copy


def main(folder: str, profile: str) -> None:
    """The command."""
    for path in sorted(Path("notebooks").rglob("[0-9][0-9]_*.ipynb")):
        name = path.relative_to("notebooks")
        params, target = Path("params", profile, name).with_suffix(".yaml"), Path(folder, name)
        if target.exists():
            print(f"{target}: is there, and kept as it is; for a new one move it elsewhere")
        elif params.exists():  # a lab has no profile for GPUs
            values = read_yaml(params) | {"out": "outputs/scratch"}
            copy = student_copy(load_notebook_node(str(path)))
            copy = parameterize_notebook(copy, values, kernel_name="python3", language="python")
            target.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(copy, target)
            print(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
