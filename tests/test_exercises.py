"""Exercises are whole and give nothing away; a check says what is wrong. (test_notebooks.py executes them.)"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from latentree.run.exercises import BEGIN, END, STUB, check, has_tag, main, stub, student_copy
from latentree.run.record import output_folder

NOTEBOOKS = sorted(Path("notebooks").glob("[0-9][0-9]_*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def exercises_of(notebook):
    """The cells of each exercise: its task, its solution, its check."""
    marked = [cell for cell in notebook.cells if has_tag(cell, "exercise")]
    return list(zip(marked[::3], marked[1::3], marked[2::3], strict=True))


@each_notebook
def test_exercises_are_whole_and_of_every_difficulty(path):
    found = exercises_of(nbformat.read(path, 4))
    assert len(found) >= 3
    for number, (task, solution, checked) in enumerate(found, 1):
        assert (
            task.cell_type == "markdown"
            and has_tag(solution, "solution")
            and has_tag(checked, "check")
        )
        assert re.search(
            rf"^### Exercise {number} · .+ \((easy|medium|hard)\)$", task.source, re.MULTILINE
        )
        assert (
            "<summary>Hint</summary>" in task.source
            and f'check("Exercise {number}' in checked.source
        )
    titles = " ".join(
        re.findall(r"^### .*$", "\n".join(task.source for task, _, _ in found), re.MULTILINE)
    )
    assert all(f"({level})" in titles for level in ("easy", "medium", "hard"))


@each_notebook
def test_no_solution_leaks(path):
    notebook = nbformat.read(path, 4)
    copy = student_copy(notebook)
    text = "\n".join(cell.source for cell in copy.cells)
    assert (
        BEGIN not in text
        and END not in text
        and not any(cell.get("outputs") for cell in copy.cells)
    )
    for _, solution, _ in exercises_of(notebook):
        parts = re.findall(f"{BEGIN}(.*?){END}", solution.source, re.DOTALL)
        lines = [line.strip() for part in parts for line in part.splitlines()]
        assert lines and not [line for line in lines if len(line) >= 25 and line in text]


@pytest.mark.parametrize(
    "got, expected",
    [
        (1.0, 1.0),
        (1.0 + 1e-8, 1.0),
        ([1, 2], np.array([1.0, 2.0])),
        (torch.eye(2), np.eye(2)),
        ("verb", "verb"),
        ([np.nan, 1], [np.nan, 1]),
        (0.0, 0.0),
    ],
)
def test_right_answers(got, expected, capsys):
    check("Exercise 1", got, expected)
    assert capsys.readouterr().out == "Exercise 1: right\n"


@pytest.mark.parametrize(
    "got, words",
    [
        (None, "nothing was given"),
        (..., "nothing was given"),
        ([1.0], "its shape is (1,), not ()"),
        (2.0, "the first is 2"),
        ("two", "no number"),
        ([None], "shape"),
        (np.nan, "the first is nan"),
    ],
)
def test_wrong_answers_are_told_what_is_wrong(got, words):
    with pytest.raises(AssertionError) as failure:
        check("Exercise 2", got, 1.0, mend="Look at the sum")
    assert (
        str(failure.value).startswith("Exercise 2: not yet: ")
        and words in str(failure.value)
        and "Look at the sum" in str(failure.value)
    )


def test_a_stub_keeps_what_is_outside_of_the_solution():
    source = f"def f(x):\n    '''Twice.'''\n    {BEGIN}\n    y = 2 * x\n    return y\n    {END}\n\nprint(1)"
    assert stub(source) == f"def f(x):\n    '''Twice.'''\n    {STUB}\n\nprint(1)"
    with pytest.raises(ValueError, match="has no lines"):
        stub("answer = 1")


def test_students_notebooks_are_written_and_usage_is_told(tmp_path, capsys):
    assert main([str(tmp_path / "mine")]) == 0
    assert [path.name for path in sorted((tmp_path / "mine").iterdir())] == [
        path.name for path in NOTEBOOKS
    ]
    assert STUB in (tmp_path / "mine" / NOTEBOOKS[0].name).read_text()
    (tmp_path / "file").write_text("")
    assert (
        main([str(tmp_path / "file")]) == 2 and main([]) == 2 and "usage" in capsys.readouterr().err
    )


def entry_cells(path):
    cells = student_copy(nbformat.read(path, 4), path.stem).cells
    at = next(i for i, cell in enumerate(cells) if has_tag(cell, "parameters"))
    return cells[0].source, cells[at + 1].source


@each_notebook
def test_entry_cells_choose_sizes_by_the_hardware(path, monkeypatch):
    found = {}
    for gpu, profile in ((False, "laptop"), (True, "gpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        exec(entry_cells(path)[1], found)
        assert found["profile"] == profile and found["out"] == output_folder(profile).as_posix()


def test_entry_cells_install_where_latentree_is_missing(monkeypatch):
    install, _ = entry_cells(NOTEBOOKS[0])
    exec(install, {})  # it is installed here: nothing happens
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="latentree is not installed here; give the address"):
        exec(install, {})
    commands, folders = [], []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(os, "chdir", folders.append)
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(install.replace('address = ""', 'address = "https://example.org/latentree"'), {})
    assert (
        commands[0][:2] == ["git", "clone"]
        and "https://example.org/latentree" in commands[0]
        and folders == ["latentree"]
    )
    assert commands[1][1:4] == ["-m", "pip", "install"] and sys.path[0] == "lib"
