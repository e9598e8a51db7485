"""Several trainings at once are the same as one after the other, and end with the process that started them."""

import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from latentree.data.corpus import held_out, load_corpus
from latentree.data.two_level import TwoLevel
from latentree.series.checkpoints import LocalSeries
from latentree.train.side_by_side import train_all
from latentree.train.training import CARD, TrainingConfig, train

torch.set_num_threads(1)
TINY = {
    "layers": 1,
    "width": 16,
    "heads": 2,
    "context": 32,
    "batch_sequences": 4,
    "checkpoints_even": 1,
    "checkpoints_log": 0,
}


def jobs_in(folder, **settings):
    config = TrainingConfig(**TINY | {"tokens": 1280} | settings)
    processes = {"bound": load_corpus("bound", "params/grammars"), "toy": TwoLevel(segments=4)}
    return {
        folder / name: (config, process, held_out(process, 4, 32)["tokens"])
        for name, process in processes.items()
    }


def test_side_by_side_or_alone_the_models_are_the_same(tmp_path, capfd):
    jobs = jobs_in(tmp_path)
    train_all(jobs)
    assert "2 models: 2,560 of 2,560 tokens" in capfd.readouterr().err
    for folder, job in jobs.items():
        train(*job, tmp_path / f"alone-{folder.name}", device="cpu", progress=False)
        pair = [LocalSeries(path) for path in (folder, tmp_path / f"alone-{folder.name}")]
        weights = [series.load(series.steps[-1]).state_dict() for series in pair]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert pd.read_csv(folder / "losses.csv").equals(
            pd.read_csv(tmp_path / f"alone-{folder.name}" / "losses.csv")
        )
    before = {folder: (folder / CARD).stat().st_mtime_ns for folder in jobs}
    train_all(jobs)
    assert before == {folder: (folder / CARD).stat().st_mtime_ns for folder in jobs}


def test_one_that_fails_does_not_stop_the_other(tmp_path):
    jobs = jobs_in(tmp_path)
    bad = tmp_path / "bad"
    config, process, unseen = jobs[tmp_path / "toy"]
    jobs = {
        bad: (
            config.model_copy(update={"learning_rate": 1e30, "muon_learning_rate": 1e30}),
            process,
            unseen,
        )
    } | jobs
    with pytest.raises(ValueError, match="not finite at step"):
        train_all(jobs, progress=False)
    assert (
        not (bad / CARD).exists()
        and (tmp_path / "bound" / CARD).exists()
        and (tmp_path / "toy" / CARD).exists()
    )


def test_all_are_checked_before_one_starts(tmp_path):
    jobs = jobs_in(tmp_path)
    config, process, unseen = jobs[tmp_path / "toy"]
    with pytest.raises(ValueError, match="held_out"):
        train_all(jobs | {tmp_path / "wrong": (config, process, unseen[:, :5])})
    assert not list(tmp_path.iterdir())


def test_trainings_end_when_the_process_that_started_them_is_killed(tmp_path):
    script = tmp_path / "start.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from latentree.train.side_by_side import train_all
from test_side_by_side import jobs_in
if __name__ == "__main__":
    train_all(jobs_in(Path({str(tmp_path)!r}), tokens=100_000_000))
""")
    parent = subprocess.Popen([sys.executable, str(script)])
    started = tmp_path / "bound" / "step-00000000"
    while not started.exists():
        assert parent.poll() is None
        time.sleep(0.2)
    children = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    assert len(children) >= 1
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
