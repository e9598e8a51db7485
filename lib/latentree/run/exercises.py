"""Exercises of the notebooks: their checks, and notebooks for students, with the solutions taken out.

In a notebook an exercise is three cells, marked by tags: `exercise` (the task, with its difficulty and a hint), `solution` (code,
of which the lines between BEGIN and END are the solution) and `check` (which calls `check` below).

    python -m latentree.run.exercises FOLDER    writes a student's copy of every notebook into FOLDER
"""

import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import torch

from latentree.data.files import read_yaml, write_text
from latentree.run.record import output_folder, project_root

BEGIN, END = "# begin solution", "# end solution"
STUB = "...  # your solution"
INSTALL = """# In a clone of the repository, and on Binder, nothing is to be done here. On Colab: give the address of the repository.
import importlib.util, os, subprocess, sys

address = ""
if importlib.util.find_spec("latentree") is None:
    if not address:
        raise ValueError("address = '': latentree is not installed here; give the address of its repository, to clone and install it")
    subprocess.run(["git", "clone", "--depth", "1", address, "latentree"], check=True)
    os.chdir("latentree")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", "."], check=True)
    sys.path.insert(0, "lib")"""
SIZES = """# Sizes by the hardware: the GPU's profile, or the laptop's. What `make run` has trained is found there.
from latentree.run.exercises import parameters_here

globals().update(parameters_here({name!r}))"""


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
    near = np.isclose(
        got,
        expected,
        rtol=0,
        atol=tolerance * max(1e-12, float(np.abs(np.nan_to_num(expected)).max(initial=0))),
        equal_nan=True,
    )
    return (
        ""
        if near.all()
        else f"{(~near).sum()} of {near.size} numbers are wrong; the first is {got[~near].flat[0]:.6g}"
    )


def has_tag(cell, tag: str) -> bool:
    """Whether a notebook's cell is marked with a tag."""
    return tag in cell.metadata.get("tags", [])


def stub(source: str) -> str:
    """A solution cell without its solution. ValueError unless BEGIN and END stand in it, in this order, once or more."""
    if not re.search(f"{BEGIN}.*{END}", source, re.DOTALL) or source.count(BEGIN) != source.count(
        END
    ):
        raise ValueError(
            f"solution {source[:60]!r}: has no lines {BEGIN!r} and {END!r}; put them around what students shall write"
        )
    return re.sub(
        rf"^([ \t]*){BEGIN}.*?{END}", rf"\1{STUB}", source, flags=re.DOTALL | re.MULTILINE
    )


def parameters_here(name: str) -> dict:
    """The parameters of notebook `name` for this machine: profile gpu if torch sees one, else laptop; `out` is that of `make run`."""
    profile = "gpu" if torch.cuda.is_available() else "laptop"
    return read_yaml(project_root() / "params" / profile / f"{name}.yaml") | {
        "out": output_folder(profile).as_posix()
    }


def student_copy(notebook, name: str = ""):
    """A notebook with stubs for solutions and without outputs; with its `name`, also with cells that install and choose sizes."""
    copy = nbformat.from_dict(notebook)
    if name:
        at = next(i for i, cell in enumerate(copy.cells) if has_tag(cell, "parameters"))
        copy.cells.insert(at + 1, nbformat.v4.new_code_cell(SIZES.format(name=name)))
        copy.cells.insert(0, nbformat.v4.new_code_cell(INSTALL))
    for cell in copy.cells:
        if has_tag(cell, "solution"):
            cell.source = stub(cell.source)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return copy


def main(arguments: list[str]) -> int:
    """The command; returns its exit status."""
    try:
        if len(arguments) != 1:
            raise ValueError(
                "usage: python -m latentree.run.exercises FOLDER, where students' notebooks shall be"
            )
        folder = Path(arguments[0])
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path("notebooks").glob("[0-9][0-9]_*.ipynb")):
            write_text(
                folder / path.name,
                nbformat.writes(student_copy(nbformat.read(path, 4), path.stem)) + "\n",
            )
            print(folder / path.name)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
