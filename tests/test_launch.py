"""Trainings in several processes (gloo on a CPU) are the same as in one, and go on in another number of them."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from latentree.data.corpus import Stream, held_out, load_corpus
from latentree.run.parameters import declared
from latentree.series.checkpoints import LocalSeries
from latentree.train.launch import jobs_of, main
from latentree.train.side_by_side import train_all
from latentree.train.training import CARD, TrainingConfig, train

torch.set_num_threads(1)
TINY = {
    "profile": "smoke",
    "corpora": ["bound"],
    "tokens": [40 * 4 * 32],
    "layers": 2,
    "width": 16,
    "heads": 2,
    "context": 32,
    "batch_sequences": 4,
    "checkpoints": 3,
    "held_out_sequences": 4,
}


def params(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "params.yaml").write_text(json.dumps(TINY | changes))
    return ["--params", str(folder / "params.yaml"), "--out", str(folder)]


def launched(folder, processes, **changes):
    """What accelerate launch starts on several GPUs, on CPUs."""
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        "-m",
        "latentree.train.launch",
    ]
    line += params(folder, **changes)
    return subprocess.Popen(
        line, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )


def losses(folder):
    return pd.read_csv(folder / "checkpoints" / "bound" / "seed-0" / "losses.csv")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert main(params(folder)) == 0
    return folder


def test_two_processes_give_the_losses_of_one(alone, tmp_path):
    two = launched(tmp_path, 2)
    assert two.wait(timeout=180) == 0, two.stderr.read()[-2000:]
    card = json.loads((tmp_path / "checkpoints" / "bound" / "seed-0" / CARD).read_text())
    assert card["processes"] == 2
    one, other = losses(alone), losses(tmp_path)
    assert list(one.step) == list(other.step) and np.abs(one.loss - other.loss).max() < 1e-5


def test_what_two_processes_began_one_finishes(alone, tmp_path):
    folder = tmp_path / "checkpoints" / "bound" / "seed-0"
    two = launched(tmp_path, 2)
    while not any(int(state.name[6:]) >= 3 for state in folder.glob("state-*")):
        assert two.poll() is None, two.stderr.read()[-2000:]
        time.sleep(0.01)
    for process in [*psutil.Process(two.pid).children(recursive=True), psutil.Process(two.pid)]:
        process.kill()
    two.wait()
    assert not (folder / CARD).exists()
    assert main(params(tmp_path)) == 0
    one, other = losses(alone), losses(tmp_path)
    assert list(one.step) == list(other.step) and np.abs(one.loss - other.loss).max() < 1e-5
    assert json.loads((folder / CARD).read_text())["processes"] == 1


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (4, 2), (2, 4)])
def test_a_stream_goes_on_with_another_number_of_processes(before, after):
    process, rows = load_corpus("bound", "params/grammars"), 4

    def streams(count):
        return [
            Stream(process, rows // count, 48, first_row=i * rows // count, total_rows=rows)
            for i in range(count)
        ]

    def batch(parts):
        return torch.cat([part.next_batch() for part in parts])

    whole, first = streams(1), streams(before)
    for _ in range(700):
        assert torch.equal(batch(first), batch(whole))
    then = streams(after)
    for stream in then:
        stream.load_state_dict(*(one.state_dict() for one in first))
    for _ in range(400):
        assert torch.equal(batch(then), batch(whole))


def test_micro_batches_change_the_memory_and_not_the_training(tmp_path):
    process = load_corpus("bound", "params/grammars")
    sizes = {
        "layers": 1,
        "width": 16,
        "heads": 2,
        "context": 32,
        "batch_sequences": 5,
        "tokens": 20 * 5 * 32,
        "checkpoints_log": 0,
    }
    found = [
        train(
            TrainingConfig(**sizes, micro_batches=parts),
            process,
            held_out(process, 4, 32)["tokens"],
            tmp_path / str(parts),
            device="cpu",
            progress=False,
        )
        for parts in (1, 2)
    ]
    assert np.abs(found[0].loss - found[1].loss).max() < 1e-5


def test_a_compiled_model_trains_alike_and_its_checkpoints_load(alone, tmp_path, monkeypatch):
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model: original(model, backend="aot_eager")
    )  # needs no compiler
    assert main(params(tmp_path, compiled=True)) == 0
    assert np.abs(losses(alone).loss - losses(tmp_path).loss).max() < 1e-5
    series = LocalSeries(tmp_path / "checkpoints" / "bound" / "seed-0")
    other = LocalSeries(alone / "checkpoints" / "bound" / "seed-0")
    pair = [one.load(one.steps[-1]).state_dict() for one in (series, other)]
    assert pair[0].keys() == pair[1].keys() and all(
        (pair[0][name] - pair[1][name]).abs().max() < 1e-3 for name in pair[0]
    )


def test_the_notebook_finds_what_was_launched(alone):
    values = {name: one.default for name, one in declared("notebooks/02_training.ipynb").items()}
    jobs = jobs_of(values | TINY | {"out": str(alone)})
    (folder,) = jobs
    before = (folder / CARD).stat().st_mtime_ns
    train_all(jobs, progress=False)
    assert (folder / CARD).stat().st_mtime_ns == before and len(LocalSeries(folder).steps) >= 4


def test_one_of_several_trainings_is_launched(tmp_path, capsys):
    given = params(tmp_path, corpora=["bound", "bound-flat"], tokens=[512, 512], seeds=[0, 1])
    assert main([*given, "--corpus", "bound-flat", "--seed", "1"]) == 0
    assert [
        str(card.parent.relative_to(tmp_path / "checkpoints")) for card in tmp_path.rglob(CARD)
    ] == ["bound-flat/seed-1"]
    assert main([*given, "--corpus", "bound", "--seed", "7"]) == 2
    assert (
        "--corpus bound --seed 7: not in params.yaml; its corpora are bound, bound-flat, its seeds [0, 1]"
        in capsys.readouterr().err
    )


def test_bad_parameters_are_told_in_one_line(tmp_path, capsys):
    assert main(params(tmp_path, batch_sequences=0)) == 2
    line = capsys.readouterr().err.strip()
    assert (
        "\n" not in line
        and "batch_sequences = 0" in line
        and not (tmp_path / "checkpoints").exists()
    )
