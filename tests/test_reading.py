"""The reading copy is of the notebooks as they are, and the README shows its claims."""

import json
import math
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from latentree.data.files import read_yaml
from latentree.evidence.compare import claims_of
from latentree.run.parameters import check, declared
from reading import (
    BEGIN,
    END,
    READING,
    answers,
    as_markdown,
    copy,
    in_words,
    matters,
    scorecard,
)

NOTEBOOKS = sorted(Path("notebooks").glob("[0-9][0-9]_*.ipynb"))
LABS = sorted(Path("notebooks/labs").glob("[0-9][0-9]_*.ipynb"))
PROMISED = {
    "01": {"long-range-pcfg"},
    "02": {"latents-recovered", "reachable-share", "flat-stays-flat"},
    "03": {"lookup-present", "lookup-on-flat", "lookup-on-n-gram", "lookup-treeless"}
    | {"lookup-over-decoys", "lookup-key-path", "lookup-head-matters", "role-bag-present"},
    "04": {"fv-copy", "fv-bias", "fv-banked-fresh", "fv-beyond-bias", "fv-not-on-flat"},
    "05": {"repair-positive-control", "no-repair-on-treeless"},
    "06": {"shallow-before-deep", "tree-beyond-last-roles", "filter-stops"},
    "07": {"series-lookup"},
    "08": {"function", "look-up", "window", "similarity", "positive-controls"},
    "09": {"emergence-follows-value", "treeless-at-equal-value", "composition-alone"}
    | {"nothing-without-value"},
}


def sources(notebook):
    """The code of a notebook, as it was before parameters were injected."""
    cells = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    return [c.source for c in cells if "injected-parameters" not in c.metadata.get("tags", [])]


def parameters(values):
    return {name: value for name, value in values.items() if name not in ("out", "checkpoints")}


@pytest.mark.parametrize(
    ("notebooks", "profile", "reading"),
    [
        (NOTEBOOKS, "params/evening", READING),
        (LABS, "params/laptop/labs", READING / "labs"),
    ],
)
def test_the_reading_copy_is_of_these_notebooks_and_parameters(notebooks, profile, reading):
    stale, record = [], json.loads((reading / "run.json").read_text())
    for path in notebooks:
        values = check(read_yaml(f"{profile}/{path.stem}.yaml"), declared(path))
        same = parameters(values) == parameters(record[path.stem]["parameters"])
        if not same or sources(path) != sources(reading / path.name):
            stale.append(path.stem)
    assert not stale, "changed after they were executed: make run, or make labs; then make reading"


def test_the_reading_copy_is_small():
    assert sum(file.stat().st_size for file in READING.rglob("*") if file.is_file()) < 8_000_000


def test_each_lab_answers_our_question_with_at_most_four_claims():
    claims = claims_of(READING / "labs").reset_index()
    assert claims.groupby("file").id.apply(lambda ids: "hierarchy-matters" in set(ids)).all()
    assert len(LABS) == claims.file.nunique() and claims.groupby("file").size().max() <= 4
    assert answers(READING / "labs").count("(labs/") == len(LABS)


@pytest.mark.parametrize(
    ("high", "above", "verdict", "word"),
    [
        (0.9, 0.1, "as predicted", "yes"),
        (0.05, 0.1, "contradicted", "no"),
        (-0.2, 0.1, "contradicted", "yes, the other way"),
        (-0.2, math.nan, "as predicted", "yes"),  # a region below
        (math.nan, 0.1, "not tested", "not tested"),
    ],
)
def test_an_answer_tells_nothing_from_the_opposite(high, above, verdict, word):
    claim = {"high": high, "above": above, "null": 0.0, "verdict": verdict}
    assert matters(claim) == word


def test_it_shows_what_the_project_promises():
    claims = claims_of(READING)
    for number, ids in PROMISED.items():
        assert set(claims.loc[number].loc[sorted(ids), "verdict"]) <= {"present", "as predicted"}


def test_the_readme_shows_the_scorecard_and_its_pictures_are_there():
    readme = Path("README.md").read_text()
    shown = readme.split(BEGIN)[1].split(END)[0].strip()
    assert shown == scorecard(READING), "stale: run make report"
    assert as_markdown(READING) in (READING / "claims.md").read_text(), "stale: run make report"
    links = re.findall(r"\]\((.*?)\)|src=\"(.*?)\"", readme)
    here = [link for pair in links for link in pair if link and "://" not in link]
    assert here and all(Path(link).exists() for link in here)


@pytest.mark.parametrize(
    ("papers", "others", "word"),
    [
        (["present", "as predicted"], {}, "holds with binding"),
        (["present", "not tested"], {}, "holds with binding, as far as tested"),
        (["present"], {"against": "undecided"}, "holds with binding"),
        (["present", "undecided"], {"against": "as predicted"}, "contradicted in part"),
        (["absent"], {"against": "as predicted"}, "contradicted"),
        (["present"], {"explained": "as predicted"}, "but something simpler does as well"),
        (["present", "undecided"], {}, "holds in part with binding"),
        (["absent", "contradicted"], {}, "not found with binding"),
        (["absent", "not tested"], {}, "not found with binding, as far as tested"),
        (["absent", "undecided"], {}, "undecided"),
        (["not tested"], {}, "not tested"),
    ],
)
def test_a_row_of_the_scorecard_says_what_its_verdicts_say_together(papers, others, word):
    assert in_words(papers, "with binding", **others).endswith(word)


def test_one_notebook_is_taken_over_and_nothing_else(tmp_path):
    reading, run = tmp_path / "reading", tmp_path / "laptop"
    shutil.copytree(READING, reading)
    before = {file: file.read_bytes() for file in reading.rglob("*") if file.is_file()}
    for name in ("results", "figures", "tables", "checkpoints"):
        (run / name).mkdir(parents=True)
    names = ("03_induction_heads.ipynb", "results/03.json", "figures/03_new.png", "results/04.json")
    for name in (*names, "checkpoints/03_a.csv"):
        (run / name).write_text("new")
    source = json.loads(Path("notebooks/03_induction_heads.ipynb").read_text())
    title, *others = source["cells"]
    gone = title | {"id": "gone"}
    executed = {"cells": [title | {"source": ["an earlier title"]}, gone, *others]}
    (run / names[0]).write_text(json.dumps(executed))
    (run / "run.json").write_text(json.dumps({"03_induction_heads": 3, "04_function_vectors": 4}))
    copy(run, reading, "03")
    after = {file: file.read_bytes() for file in reading.rglob("*") if file.is_file()}
    changed = {f for f in before | after if before.get(f) != after.get(f)}
    changed = {file.relative_to(reading).as_posix() for file in changed}
    assert {name for name in changed if "03_" not in name} == {
        "results/03.json",
        "run.json",
        ".run.lock",
    }
    assert after[reading / "figures/03_new.png"] == b"new"
    assert not (reading / "figures/03_paths.png").exists()
    taken = json.loads(after[reading / names[0]])["cells"]  # with the sentences of today
    assert taken == source["cells"]
    record = json.loads((reading / "run.json").read_text())
    before = json.loads((READING / "run.json").read_text())
    assert record == before | {"03_induction_heads": 3}
