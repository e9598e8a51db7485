"""Several trainings at once are the same as one after the other, and end with what started them."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
import yaml
from latentree.data.codebook import Codebook
from latentree.data.corpus import held_out, load_corpus
from latentree.run.trainings import main, planned
from latentree.series.checkpoints import CARD, LocalSeries
from latentree.train import jobs
from latentree.train.jobs import plan, train_all, usable_cores
from latentree.train.processes import Bar, launched
from latentree.train.settings import TrainingConfig
from latentree.train.training import STATE, train

ROOT = Path(__file__).parents[1]
SMALL = {"layers": 1, "width": 16, "heads": 2, "context": 32, "batch_sequences": 4}
SMALL |= {"checkpoints_even": 1, "checkpoints_log": 0}


def jobs_in(folder, tokens=1280):
    corpora = [load_corpus("bound"), Codebook(segments=16)]
    return plan(corpora, [tokens] * 2, [0], folder, held_out_sequences=4, **SMALL)


def weights(folder):
    series = LocalSeries(folder)
    step = f"step-{series.steps[-1]:08d}"
    return (folder / step / "model.safetensors").read_bytes()


def test_side_by_side_or_alone_the_models_are_the_same_and_one_may_fail(tmp_path):
    jobs = jobs_in(tmp_path)
    config, *rest = jobs[tmp_path / "bound" / "seed-0"]
    rates = {"learning_rate": 1e30, "muon_learning_rate": 1e30}
    bad = {tmp_path / "bad": (config.model_copy(update=rates), *rest)}
    with pytest.raises(ValueError, match="not finite at step"):
        train_all(bad | jobs, "cpu")
    assert not (tmp_path / "bad" / CARD).exists()
    for folder, job in jobs.items():
        alone = tmp_path / "alone" / folder.parent.name
        assert train(*job, alone, "cpu").equals(pd.read_csv(folder / "losses.csv"))
        assert weights(folder) == weights(alone)
    before = [(folder / CARD).stat().st_mtime_ns for folder in jobs]
    train_all(jobs, "cpu")
    assert before == [(folder / CARD).stat().st_mtime_ns for folder in jobs]


def test_all_are_checked_before_one_starts(tmp_path):
    jobs = jobs_in(tmp_path)
    last = list(jobs)[-1]
    config, corpus, unseen = jobs[last]
    jobs[last] = config, corpus, unseen[:, :5]
    with pytest.raises(ValueError, match="held_out: has 5 tokens a sequence"):
        train_all(jobs)
    assert not list(tmp_path.iterdir())


def test_trainings_end_when_the_process_that_started_them_is_killed(tmp_path):
    script = tmp_path / "start.py"
    script.write_text(
        "import sys, pathlib, test_jobs\n"
        "if __name__ == '__main__':\n"
        "    jobs = test_jobs.jobs_in(pathlib.Path(sys.argv[1]), 10**8)\n"
        "    test_jobs.train_all(jobs, 'cpu')\n"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    command = [sys.executable, str(script), str(tmp_path)]
    parent = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
    while not (tmp_path / "bound" / "seed-0" / "step-00000000").exists():
        assert parent.poll() is None
        time.sleep(0.2)
    children = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert children and not alive


# ---------------------------------------------------------------------- the command


TINY = {
    "profile": "smoke",
    "corpora": ["bound", "bound-flat"],
    "once": ["bound-flat"],
    "tokens": [40 * 4 * 32, 512],
    "seeds": [1, 0],
    "layers": 1,
    "width": 16,
    "heads": 2,
    "context": 32,
    "batch_sequences": 4,
    "checkpoints_even": 3,
    "checkpoints_log": 3,
    "held_out_sequences": 4,
}


def command(folder, *more, **changes):
    """The arguments of `python -m latentree.run.trainings`, with a parameter file in `folder`."""
    (folder / "02_training.yaml").write_text(yaml.safe_dump(TINY | changes))
    return ["--params", str(folder), "--out", str(folder), *more]


def as_trained(identity) -> TrainingConfig:
    """The settings of a run, from its series' identity."""
    known = {name: identity[name] for name in TrainingConfig.model_fields if name in identity}
    return TrainingConfig(**known)


def test_one_of_several_trainings_is_started_with_its_own_settings(tmp_path):
    main(command(tmp_path, "--corpus", "bound-flat", "--seed", "1"))
    (card,) = tmp_path.rglob(CARD)
    assert card.parent == tmp_path / "checkpoints" / "bound-flat" / "seed-1"
    identity = LocalSeries(card.parent).identity
    config = as_trained(identity)
    assert (config.tokens, config.seed, config.width) == (512, 1, 16)
    assert config.learning_rate == 0.03  # the notebook's own
    assert identity["grammar"] == load_corpus("bound-flat").digest


def test_bad_input_is_told_in_one_line_before_anything_is_trained(tmp_path, capsys):
    line = command(tmp_path)
    for more in (["--corpus", "bond"], ["--seed", "7"], ["--notebook", "03_x"]):
        assert main([*line, *more]) == 1
        assert "no such training; choose others" in capsys.readouterr().err
    for bad, told in (({"layer": 3}, "layer is not a parameter"), ({"device": "cuda"}, "no GPU")):
        if bad.get("device") == "cuda" and torch.cuda.is_available():
            continue
        assert main(command(tmp_path, **bad)) == 1
        assert told in capsys.readouterr().err
    assert not list(tmp_path.rglob(CARD))


def test_a_pool_holds_what_every_notebook_trains_and_no_model_twice():
    jobs, out = {}, Path("/nowhere")
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        params = ROOT / f"params/smoke/{notebook.stem}.yaml"
        found, _ = planned(notebook, params, out)
        assert not set(found) & set(jobs)
        jobs |= found
    under = {str(folder.relative_to(out / "checkpoints")) for folder in jobs}
    bound = ["seed-0", "seed-1", "seed-2", "layers-3-seed-0", "attention-only-seed-0"]
    assert {f"bound/{name}" for name in bound} | {"released-ngram/seed-0"} <= under
    assert "released-ngram/seed-1" not in under  # trained once
    assert {
        "sectioned/seed-0",
        "filtered-0/seed-1",
        "filtered-4/seed-0",
        "codebook-8/seed-1",
    } <= under
    layers = {folder.parts[-2:]: config.layers for folder, (config, _, _) in jobs.items()}
    assert layers["bound", "layers-3-seed-0"] == 3 and layers["bound", "seed-0"] == 2


def test_as_many_at_once_as_there_are_cores_to_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 5}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert usable_cores() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert usable_cores() == 2


@pytest.mark.parametrize(
    "screen",
    [
        lambda: None,
        lambda: open("/dev/full", "w"),
        lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
    ],
    ids=["none", "full", "ascii"],
)
def test_a_bar_that_cannot_be_shown_ends_nothing(monkeypatch, screen):
    monkeypatch.setattr(sys, "stderr", screen())
    bar = Bar(desc="grün", total=5)
    bar.update(3)
    bar.close()
    assert bar.n == 3


def test_cores_follow_a_list_of_threads_and_a_containers_quota(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    for asked, cores in {"2,1": 2, "": 8, "all": 8, "0": 8}.items():
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert usable_cores() == cores
    (tmp_path / "cpu").mkdir()
    monkeypatch.setattr(jobs, "_GROUPS", tmp_path)
    for quota, cores in {"-1": 8, "200000": 2}.items():  # control groups 1
        (tmp_path / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
        assert usable_cores() == cores
    shutil.rmtree(tmp_path / "cpu")
    for quota, cores in {"max 100000": 8, "350000 100000": 3, "50000 100000": 1}.items():
        (tmp_path / "cpu.max").write_text(quota)
        assert usable_cores() == cores


@pytest.mark.parametrize(
    "line, limited",
    [("0::/slice/job", "slice"), ("0::/slice/job", "slice/job"), ("4:cpu:/job", "cpu/job")],
)
def test_a_quota_of_a_group_within_others_counts(monkeypatch, tmp_path, line, limited):
    """As systemd, SLURM and Kubernetes give it, which a container's own root does not show."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(jobs, "_GROUPS", tmp_path)
    monkeypatch.setattr(jobs, "_OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(f"9:name=systemd:/\n{line}\n")
    (tmp_path / limited).mkdir(parents=True)
    if limited.startswith("cpu"):
        (tmp_path / limited / "cpu.cfs_quota_us").write_text("300000\n")
        (tmp_path / limited / "cpu.cfs_period_us").write_text("100000\n")
    else:
        (tmp_path / limited / "cpu.max").write_text("300000 100000\n")
    assert usable_cores() == 3


@pytest.mark.parametrize("name", ["SLURM_CPUS_PER_TASK", "NSLOTS", "OMP_THREAD_LIMIT"])
def test_the_cores_that_a_scheduler_gives_to_a_task_count(monkeypatch, name):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv(name, "5")
    assert usable_cores() == 5


@pytest.mark.parametrize("left", ["WORLD_SIZE", "PMI_SIZE", "ACCELERATE_USE_DEEPSPEED"])
def test_what_a_scheduler_left_in_the_environment_is_ignored_and_told(monkeypatch, left):
    monkeypatch.setenv(left, "4")
    with pytest.warns(UserWarning, match=f"ignored in the environment: {left}"):
        assert not launched()
    assert left not in os.environ and not launched()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match="WORLD_SIZE = 2: waits for so many processes"):
        assert launched()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # would divide gradients
    with pytest.warns(UserWarning, match="ignored in the environment: ACCELERATE_GRADIENT"):
        assert launched()
    monkeypatch.setenv("WORLD_SIZE", "x")
    with pytest.raises(ValueError, match="WORLD_SIZE = 'x': is no number of processes"):
        launched()


def in_two_processes(folder):
    """What accelerate launch starts on two GPUs, on CPUs."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    module = ["-m", "latentree.run.trainings", *command(folder, "--corpus", "bound", "--seed", "0")]
    here = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(launch + module, env=here, stderr=subprocess.PIPE, text=True)


def test_two_processes_give_the_losses_of_one_and_go_on_when_they_are_killed(tmp_path):
    folder = tmp_path / "checkpoints" / "bound" / "seed-0"
    two = in_two_processes(tmp_path)
    while not (folder / STATE).exists():
        assert two.poll() is None, two.stderr.read()[-2000:]
        time.sleep(0.01)
    for process in [*psutil.Process(two.pid).children(recursive=True), psutil.Process(two.pid)]:
        process.kill()
    two.wait()
    assert not (folder / CARD).exists()
    two = in_two_processes(tmp_path)
    assert two.wait(timeout=180) == 0, two.stderr.read()[-2000:]
    assert json.loads((folder / CARD).read_text())["processes"] == 2

    series, corpus = LocalSeries(folder), load_corpus("bound")
    config, unseen = as_trained(series.identity), held_out(corpus, 4, 32)["tokens"]
    alone = train(config, corpus, unseen, tmp_path / "alone", "cpu")
    together = pd.read_csv(folder / "losses.csv")
    assert alone.step.equals(together.step)
    assert (alone.loss - together.loss).abs().max() < 1e-5
