"""A notebook reads and writes where its workspace says, and refuses models that are not its own."""

import json
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
from latentree.evidence.claims import Claim
from latentree.run import workspace
from latentree.run.workspace import NotTrained, Workspace
from latentree.series.checkpoints import IDENTITY
from latentree.train.settings import TrainingConfig
from matplotlib import pyplot as plt
from test_checkpoints import make_run


def claim(id="a-claim"):
    return Claim(id, "Figure 2", "it holds", "bound", (0.5, 0.4, 0.6), above=0.3, n=8, seeds=[0])


@pytest.fixture
def trained(tmp_path):
    """A workspace with a finished run of the corpus bound, as far as its folder says."""
    work = Workspace("03_x", "smoke", tmp_path / "out", tmp_path / "trained")
    run = work.checkpoints / "bound" / "seed-0"
    run.parent.mkdir(parents=True)
    shutil.copytree(make_run(tmp_path / "made"), run)
    (run / "run_card.json").write_text("{}")
    identity = json.loads((run / IDENTITY).read_text())
    for folder in [run, *run.glob("step-*")]:
        told = identity | {"grammar": work.corpus("bound").digest}
        (folder / IDENTITY).write_text(json.dumps(told))
    return work


def test_figures_tables_and_results_land_in_out(tmp_path):
    work = Workspace("03_x", "smoke", tmp_path / "out")
    figure, axes = plt.subplots()
    axes.plot([1, 2])
    work.save(figure, "03_line")
    work.save(pd.DataFrame({"value": [1 / 3]}), "03_table")
    shown = work.finish([claim(), claim("another")])
    assert list(shown.index) == ["a-claim", "another"]
    assert (work.out / "figures" / "03_line.png").exists()
    assert (work.out / "tables" / "03_table.csv").read_text() == "value\n0.333333\n"
    results = json.loads((work.out / "results" / "03.json").read_text())
    assert results["notebook"] == "03_x" and results["claims"][1]["id"] == "another"


def test_two_claims_of_one_name_leave_no_result(tmp_path):
    work = Workspace("03_x", "smoke", tmp_path / "out")
    with pytest.raises(ValueError, match="a-claim is there twice"):
        work.finish([claim(), claim()])
    assert not (work.out / "results").exists()


def test_an_answer_tells_the_claims_that_were_made(tmp_path, monkeypatch):
    work, told = Workspace("03_x", "smoke", tmp_path / "out"), []
    room = SimpleNamespace(update=lambda shown: told.append(shown))
    monkeypatch.setattr(workspace, "display", lambda *_, **__: room)
    work.answer("03_line", "a-claim", "of-another-profile")
    work.finish([claim()])
    (words,) = told  # and no picture, for none was saved
    assert words.data.startswith("- ") and claim().verdict in words.data
    work.save(plt.figure(), "03_line")
    work.finish([claim()])
    assert told[-1].data == (work.out / "figures/03_line.png").read_bytes()


def test_relative_folders_are_the_projects_wherever_jupyter_started(tmp_path, monkeypatch):
    here = Workspace("03_x", "smoke", "outputs/scratch")
    monkeypatch.chdir(here.out.parents[1] / "notebooks")
    there = Workspace("03_x", "smoke", "outputs/scratch")
    assert there.out == here.out and there.grammars == here.grammars
    assert there.checkpoints == here.out.parents[1] / "outputs" / "smoke" / "checkpoints"


def test_a_missing_run_is_told_by_the_first_line(tmp_path):
    with pytest.raises(NotTrained, match="no trained model of bound; run `make run"):
        Workspace("03_x", "smoke", tmp_path / "out", tmp_path).needs(["bound"])


def test_only_the_seeds_that_were_trained_are_read(trained):
    corpus = trained.corpus("bound")
    assert list(trained.all_series(corpus, [0, 1])) == [0]
    with pytest.raises(NotTrained, match="seed-1"):
        trained.all_series(corpus, [1, 0])


def test_the_recipe_is_that_of_notebook_02_in_this_profile(tmp_path):
    recipe = Workspace("05_x", "smoke", tmp_path).recipe(layers=7)
    config = TrainingConfig(**recipe)
    assert (config.layers, config.width, config.batch_sequences) == (7, 32, 16)
    assert config.learning_rate == TrainingConfig().learning_rate
    assert (config.tokens, config.seed) == (TrainingConfig().tokens, 0)
    file = tmp_path / "mine.yaml"
    file.write_text("profile: smoke\nwidth: 24\n")
    own = Workspace("05_x", "smoke", tmp_path).recipe(str(file))
    assert own["width"] == 24 and own["layers"] == 2


def test_checkpoints_of_another_grammar_are_refused(trained):
    assert trained.series(trained.corpus("bound")).steps == [0, 3, 20]
    edited = trained.corpus("bound")
    edited.digest = "another"
    for other, told in ((edited, "this one is another, seed 0"), (trained.corpus("bound", 1), "1")):
        with pytest.raises(ValueError, match=f"was trained on another grammar bound .*{told}"):
            trained.series(other)


def test_a_parameter_of_another_type_is_refused_in_the_notebook(tmp_path, monkeypatch):
    """papermill -p gives a list as a text, and only warns."""
    shell = SimpleNamespace(user_ns={"profile": "smoke", "corpora": "[bound]"})
    monkeypatch.setattr(workspace, "get_ipython", lambda: shell)
    with pytest.raises(ValueError, match=r"corpora = '\[bound\]': Input should be a valid list"):
        Workspace("02_training", "smoke", tmp_path)
    shell.user_ns["corpora"] = ["bound"]
    Workspace("02_training", "smoke", tmp_path)


def test_a_path_is_told_from_a_name_and_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    work = Workspace("03_x", "smoke", "~/out", "~/trained")
    assert work.out == tmp_path / "out" and work.checkpoints == tmp_path / "trained"
    assert work.folder("maker/model") is None and work.folder("lib") == work._root / "lib"
    for given in ("~/none", "/none", "outputs/none"):
        with pytest.raises(ValueError, match=f"{given}: there is no such folder"):
            work.folder(given)
    (tmp_path / "none").mkdir()
    assert work.folder("~/none") == tmp_path / "none"
