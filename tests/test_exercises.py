"""Exercises are whole and give nothing away; a check says what is wrong."""

import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from latentree.run.exercises import BEGIN, END, STUB, check, main, student_copy

NOTEBOOKS = sorted(Path("notebooks").rglob("[0-9][0-9]_*.ipynb"))


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def test_exercises_are_whole_and_of_every_difficulty():
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, 4)
        tasks = [c.source for c in tagged(notebook, "exercise") if "### Exercise" in c.source]
        titles = [
            re.search(r"^### (Exercise \d+) · .+ \((\w+), \d+ minutes\)$", task, re.M)
            for task in tasks
        ]
        levels = {"easy", "medium", "hard"}
        assert {title[2] for title in titles} <= levels and len(titles) >= 2
        assert "labs" in path.parts or {title[2] for title in titles} == levels
        assert all("<summary>Hint</summary>" in task for task in tasks)
        checked = "\n".join(cell.source for cell in tagged(notebook, "check"))
        numbers = [f"Exercise {number}" for number in range(1, len(tasks) + 1)]
        assert [title[1] for title in titles] == numbers
        assert list(dict.fromkeys(re.findall(r'check\(\s*"(Exercise \d+)', checked))) == numbers
        assert len(tagged(notebook, "solution")) == len(tasks)


def test_no_solution_leaks():
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, 4)
        copy = student_copy(notebook)
        text = "\n".join(cell.source for cell in copy.cells)
        assert BEGIN not in text and END not in text
        assert not any(cell.get("outputs") for cell in copy.cells)
        assert all("raises-exception" in cell.metadata.tags for cell in tagged(copy, "check"))
        for solution in tagged(notebook, "solution"):
            parts = re.findall(f"{BEGIN}(.*?){END}", solution.source, re.DOTALL)
            lines = [line.strip() for part in parts for line in part.splitlines()]
            assert lines and not [line for line in lines if len(line) >= 25 and line in text]


def test_right_answers(capsys):
    answers = [(1 + 1e-8, 1.0), (torch.eye(2), np.eye(2)), ("verb", "verb"), (0.0, 0.0)]
    for got, expected in [*answers, ([np.nan, 1], np.array([np.nan, 1]))]:
        check("Exercise 1", got, expected)
    assert capsys.readouterr().out == "Exercise 1: right\n" * 5


@pytest.mark.parametrize("got", [..., [1.0], "two", np.nan], ids=str)
def test_a_wrong_answer_is_told_with_its_mend(got):
    with pytest.raises(AssertionError, match="(?s)Exercise 2: not yet: .*Look at the sum"):
        check("Exercise 2", got, 1.0, mend="Look at the sum")


def test_a_number_for_an_array_is_wrong():
    """numpy would compare it with every entry."""
    with pytest.raises(AssertionError):
        check("Exercise 2", 1.0, [1.0, 1.0])


def test_students_notebooks_read_the_models_of_make_run_and_write_elsewhere(tmp_path):
    main(str(tmp_path), "gpu")
    for path in Path("notebooks").glob("[0-9][0-9]_*.ipynb"):  # labs need no GPU
        copy = nbformat.read(tmp_path / path.name, 4)
        (cell,) = tagged(copy, "injected-parameters")
        values = {}
        exec(cell.source, values)
        assert values["profile"] == "gpu" and values["out"] == "outputs/scratch"
        assert values.get("checkpoints", "") == ""  # those of the profile's run
        assert STUB in "\n".join(cell.source for cell in copy.cells)


def test_what_a_student_has_written_is_kept(tmp_path, capsys):
    written = tmp_path / "03_induction_heads.ipynb", tmp_path / "labs/03_successors.ipynb"
    for file in written:
        file.parent.mkdir(exist_ok=True)
        file.write_text("a student's work")
    main(str(tmp_path), "smoke")
    said = capsys.readouterr().out
    for file in written:
        assert file.read_text() == "a student's work" and f"{file}: is there, and kept" in said
    assert (tmp_path / "04_function_vectors.ipynb").exists()
