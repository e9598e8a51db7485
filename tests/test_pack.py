"""A pack of a run's models, unpacked elsewhere, is read by a notebook's workspace."""

import json
import shutil
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
import torch
from latentree.data.corpus import load_corpus
from latentree.run import pack
from latentree.run.workspace import Workspace
from latentree.series.checkpoints import IDENTITY
from test_checkpoints import make_run


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of three corpora, each with checkpoints at steps 0, 3 and 20, that pool would find."""
    folder, jobs = tmp_path / "smoke", {}
    for name in ("bound", "bound-flat", "sectioned"):
        made = folder / "checkpoints" / name / "seed-0"
        made.parent.mkdir(parents=True)
        shutil.copytree(make_run(tmp_path / name), made)
        identity = {"corpus": name, "grammar": load_corpus(name).digest}
        for part in (made, *made.glob("step-*")):
            (part / IDENTITY).write_text(json.dumps(identity))
        for file in ("run_card.json", "losses.csv", "held_out.csv", "03_lookup.csv"):
            (made / file).write_text("{}")
        jobs[made] = None, SimpleNamespace(name=name), None
    monkeypatch.setattr(pack, "pool", lambda *_, **__: (jobs, "auto"))
    return folder


def test_a_workspace_reads_what_was_unpacked(run, tmp_path, capsys):
    file, there = tmp_path / "pack.zip", tmp_path / "there"
    assert pack.main([str(run), str(file)]) == 0 and "MB" in capsys.readouterr().out
    with ZipFile(file) as packed:
        names = packed.namelist()
        packed.extractall(there)
    assert all(name.startswith("outputs/smoke/checkpoints/") for name in names)
    assert not any("03_lookup" in name for name in names)  # measured again
    work = Workspace("03_x", "smoke", tmp_path / "out", there / "outputs/smoke/checkpoints")
    assert work.series(work.corpus("bound-flat")).steps == [0, 20]
    assert work.series(work.corpus("sectioned")).steps == [20]  # of which 03 asks nothing
    series = work.series(work.corpus("bound"))
    assert series.steps == [0, 3, 20]  # the main corpus, for its curves: 3 is the nearest to 20 / 3
    before = Workspace("03_x", "smoke", tmp_path / "out", run / "checkpoints")
    for step in series.steps:
        weights = before.series(work.corpus("bound")).load(step).state_dict()
        for name, weight in series.load(step).state_dict().items():
            assert torch.equal(weight, weights[name])


def test_a_run_that_is_not_finished_is_not_packed(run, tmp_path, capsys):
    (run / "checkpoints/bound-flat/seed-0/run_card.json").unlink()
    assert pack.main([str(run), str(tmp_path / "pack.zip")]) == 1
    said = capsys.readouterr().err
    assert "bound-flat/seed-0: is not finished; run `make run PROFILE=smoke`" in said
    assert not (tmp_path / "pack.zip").exists()


@pytest.mark.parametrize("missing", ["losses.csv", "held_out.csv"])
def test_a_pack_that_fails_leaves_the_one_before(run, tmp_path, missing):
    (run / "checkpoints/sectioned/seed-0" / missing).unlink()
    file = tmp_path / "pack.zip"
    file.write_text("before")
    assert pack.main([str(run), str(file)]) == 1 and file.read_text() == "before"
