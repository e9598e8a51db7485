import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import latentree.train.training
import pandas as pd
import pytest
import torch
from latentree.series.checkpoints import LocalSeries
from latentree.train.model import build_model, next_token_losses
from latentree.train.optimizers import BatchedMuon, build_optimizers, hidden_matrices, rate_share
from latentree.train.training import TrainingConfig, evaluate, train

torch.set_num_threads(1)


class FakeProcess:
    name, vocabulary_size, end = "fake", 11, 0


class FakeStream:
    """Rows that count upwards from anywhere, by a stride of their own or by `stride`: batch n is a function of n."""

    def __init__(self, stride=None):
        self.count, self.stride = 0, stride

    def next_batch(self):
        generator = torch.Generator().manual_seed(self.count)
        self.count += 1
        start, stride = torch.randint(0, 11, (2, 4, 1), generator=generator)
        stride = stride if self.stride is None else self.stride
        return (start + stride * torch.arange(16)) % 11

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, *states):
        self.count = states[0]["count"]


SMALL = {
    "layers": 1,
    "width": 16,
    "heads": 2,
    "context": 16,
    "batch_sequences": 4,
    "tokens": 64 * 24,
}
SMALL |= {"checkpoints_even": 3, "checkpoints_log": 3, "state_every_seconds": 0.0}
HELD_OUT = torch.randint(0, 11, (6, 16), generator=torch.Generator().manual_seed(99))
TABLES = ["losses.csv", "held_out.csv", "held_out_by_position.csv"]


def small(folder, stride=None, **settings):
    config = TrainingConfig(**SMALL | settings)
    return train(config, FakeProcess(), HELD_OUT, folder, stream=FakeStream(stride), progress=False)


def contents(folder):
    """Every byte that a rerun must give again: tables, weights, configurations."""
    files = [
        file
        for file in sorted(Path(folder).rglob("*"))
        if file.is_file() and file.name != "run_card.json"
    ]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    small(folder)
    return folder


def test_finished_run(finished):
    losses, held_out, by_position = (pd.read_csv(finished / name) for name in TABLES)
    assert list(losses) == ["step", "tokens", "loss", "learning_rate"]
    assert list(losses.step) == list(range(1, 25)) and list(losses.tokens) == [
        64 * step for step in losses.step
    ]
    steps = [0, 1, 5, 8, 16, 24]
    assert list(held_out.step) == steps == LocalSeries(finished).steps
    assert (held_out.standard_error > 0).all()
    assert list(by_position.position.unique()) == list(range(15)) and len(by_position) == 15 * len(
        steps
    )
    means = by_position.groupby("step").loss.mean()
    assert means.to_numpy() == pytest.approx(held_out.loss.to_numpy(), rel=1e-9)
    assert losses.learning_rate.max() == 3.0e-3
    card = json.loads((finished / "run_card.json").read_text())
    assert card["tokens"] == 64 * 24 and card["tokens_per_second"] > 0 and card["parameters"] > 0
    assert not [path for path in finished.iterdir() if path.name.startswith((".", "state"))]


def test_held_out_losses_are_those_of_the_checkpoint(finished):
    held_out = pd.read_csv(finished / "held_out.csv").set_index("step")
    losses = evaluate(LocalSeries(finished).load(16), HELD_OUT, rows=4)
    assert losses.shape == (6, 15) and losses.dtype == torch.float64
    assert losses.mean().item() == pytest.approx(held_out.loss[16], rel=1e-6)
    assert losses.mean(1).std().item() / 6**0.5 == pytest.approx(
        held_out.standard_error[16], rel=1e-5
    )


def test_losses_are_those_of_transformers():
    model = build_model("gpt2", 11, 1, 16, 2, 16)
    assert next_token_losses(
        model(input_ids=HELD_OUT).logits, HELD_OUT
    ).mean().item() == pytest.approx(
        model(input_ids=HELD_OUT, labels=HELD_OUT).loss.item(), rel=1e-5
    )


def test_second_run_does_nothing(finished, monkeypatch):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    monkeypatch.setattr(latentree.train.training, "loop", None)
    pd.testing.assert_frame_equal(small(finished), pd.read_csv(finished / "losses.csv"))
    assert before == {file: file.stat().st_mtime_ns for file in finished.rglob("*")}


def test_training_learns(tmp_path):
    losses = small(tmp_path, stride=1, tokens=64 * 100, state_every_seconds=60.0)
    assert losses.loss.iloc[:5].mean() > 2.3 and losses.loss.iloc[-5:].mean() < 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw"},
        {"precision": "bfloat16"},
        {"architecture": "gpt2", "schedule": "cosine"},
    ],
)
def test_other_settings_train(tmp_path, settings):
    assert small(tmp_path, **settings, state_every_seconds=60.0).loss.notna().all()


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
import test_training as t
from latentree.train import state
from latentree.train import training

def die_in(module, name, call, before, when=lambda *_: True):
    real, calls = getattr(module, name), []
    def replacement(*arguments, **options):
        calls.extend([1] * when(*arguments))
        if len(calls) == call:
            before(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(module, name, replacement)

def half(model, folder):
    model.config.save_pretrained(folder)
    (Path(folder) / "model.safetensors").write_bytes(b"0" * 100)

def second_rename(source, target):
    return ".partial-new-step" in str(source) and any(source.parent.glob(".partial-old-*"))

moments = {{
    "in the first checkpoint": lambda: die_in(t.transformers_model(), "save_pretrained", 1, half),
    "in a table": lambda: die_in(training, "write_text", 5, lambda path, text: path.with_name("." + path.name + ".1.tmp").write_text(text[:9])),
    "in a state": lambda: die_in(torch, "save", 9, lambda state, file, *_: Path(file).write_bytes(b"half")),
    "before an older state is removed": lambda: die_in(state, "remove_states", 2, lambda *_, **__: None),
    "in a later checkpoint": lambda: die_in(t.transformers_model(), "save_pretrained", 2, half),
    "between the renames of a checkpoint": lambda: die_in(os, "replace", 1, lambda *_: None, second_rename),
    "at the end": lambda: die_in(training, "remove_states", 1, lambda *_: None),
}}
moments[sys.argv[1]]()
t.small(sys.argv[2])
"""
MOMENTS = [
    "in the first checkpoint",
    "in a table",
    "between the renames of a checkpoint",
    "in a state",
]
MOMENTS += ["before an older state is removed", "in a later checkpoint", "at the end"]


def transformers_model():
    from transformers import PreTrainedModel

    return PreTrainedModel


def test_killed_at_many_moments_it_ends_bit_for_bit_the_same(finished, tmp_path):
    script = KILLED.format(tests=str(Path(__file__).parent))
    folder, steps = tmp_path / "run", []
    for moment in MOMENTS:
        killed = subprocess.run(
            [sys.executable, "-c", script, moment, str(folder)], capture_output=True, text=True
        )
        assert killed.returncode == -9, (moment, killed.stderr[-2000:])
        steps.append(max((int(state.name[6:]) for state in folder.glob("state-*")), default=0))
    assert steps == sorted(steps) and 0 < steps[4] <= steps[5] < 24
    small(folder)
    assert contents(folder) == contents(finished)


def test_interrupted_in_process_it_goes_on_from_the_state(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            latentree.train.training,
            "rate_share",
            lambda step, *_: 1 / 0 if step == 13 else rate_share(step, *_),
        )
        with pytest.raises(ZeroDivisionError):
            small(tmp_path)
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-00000013"]
    small(tmp_path, state_every_seconds=60.0)  # how often the state is kept changes no result
    assert contents(tmp_path) == contents(finished)


def test_full_disk_is_told_and_resumes(finished, tmp_path, monkeypatch):
    real, calls = transformers_model().save_pretrained, []

    def save(model, folder, **options):
        calls.append(folder)
        if len(calls) == 3:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(model, folder, **options)

    monkeypatch.setattr(transformers_model(), "save_pretrained", save)
    with pytest.raises(ValueError, match="no space left on the disk; free some"):
        small(tmp_path)
    assert not list(tmp_path.glob(".*")) and LocalSeries(tmp_path).steps == [0, 1]
    small(tmp_path)
    assert contents(tmp_path) == contents(finished)


def test_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    def spoilt(logits, tokens):
        losses = next_token_losses(logits, tokens)
        return (
            losses * float("inf")
            if logits.requires_grad and tokens.shape[0] == 4 and spoilt.count() == 10
            else losses
        )

    calls = []
    spoilt.count = lambda: calls.append(1) or len(calls)
    monkeypatch.setattr(latentree.train.training, "next_token_losses", spoilt)
    with pytest.raises(ValueError, match="not finite at step 10 .*lower learning rate"):
        small(tmp_path)
    assert LocalSeries(tmp_path).steps == [0, 1, 5, 8]
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-00000009"]


@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", 1),
        ("width", 32),
        ("learning_rate", 1.0e-3),
        ("tokens", 640),
        ("optimizer", "adamw"),
    ],
)
def test_folder_of_another_training_is_refused(finished, name, value):
    before = contents(finished)
    with pytest.raises(ValueError, match=f"was trained with {name} = .*; name a new folder"):
        small(finished, **{name: value})
    assert contents(finished) == before


def test_foreign_checkpoints_are_not_trained_over(tmp_path):
    (tmp_path / "step-00000000").mkdir()
    with pytest.raises(ValueError, match="no training.json; name a new folder"):
        small(tmp_path)


BAD = [
    ({"architecture": "bert"}, "architecture: 'bert'", "choose"),
    ({"layers": 0}, "layers = 0", "greater than 0"),
    ({"layers": 1.5}, "layers = 1.5", "integer"),
    ({"width": 15}, "width: 15", "multiple of 2"),
    ({"heads": "two"}, "heads = 'two'", "integer"),
    ({"context": 1}, "context = 1", "greater than or equal to 2"),
    ({"tokens": 0}, "tokens = 0", "greater than 0"),
    ({"tokens": 3.0e6}, "tokens = 3000000.0", "integer"),
    ({"batch_sequences": -4}, "batch_sequences = -4", "greater than 0"),
    ({"optimizer": "sgd"}, "optimizer = 'sgd'", "'adamw' or 'muon'"),
    ({"schedule": "step"}, "schedule = 'step'", "'linear' or 'cosine'"),
    ({"precision": "fp16"}, "precision = 'fp16'", "'float32' or 'bfloat16'"),
    ({"learning_rate": "1e-3"}, "learning_rate = '1e-3'", "valid number"),
    ({"learning_rate": float("nan")}, "learning_rate = nan", "finite number"),
    ({"muon_learning_rate": 0.0}, "muon_learning_rate = 0.0", "greater than 0"),
    ({"weight_decay": -0.1}, "weight_decay = -0.1", "greater than or equal to 0"),
    ({"beta2": 1.0}, "beta2 = 1.0", "less than 1"),
    ({"warmup": 1.5}, "warmup = 1.5", "less than 1"),
    ({"gradient_clip": 0.0}, "gradient_clip = 0.0", "greater than 0"),
    ({"seed": -1}, "seed = -1", "greater than or equal to 0"),
    ({"learning_rat": 0.1}, "learning_rat = 0.1", "did you mean learning_rate?"),
    ({"device": "tpu"}, "device = 'tpu'", "auto, cpu or cuda"),
    ({"held_out": HELD_OUT[:, :8]}, "held_out: is torch.int64 (6, 8)", "of 16 tokens"),
    ({"held_out": HELD_OUT[:1]}, "held_out: is torch.int64 (1, 16)", "2 sequences"),
    (
        {"held_out": HELD_OUT + 5},
        "held_out: has tokens from 5 to 15",
        "below the vocabulary_size 11",
    ),
]


@pytest.mark.parametrize("change, thing, mend", BAD, ids=[thing for _, thing, _ in BAD])
def test_bad_input_is_told_in_one_line_and_nothing_is_written(tmp_path, change, thing, mend):
    arguments = {"held_out": HELD_OUT, "device": "auto"}
    arguments |= {name: change[name] for name in arguments if name in change}
    settings = {name: value for name, value in change.items() if name not in arguments}
    with pytest.raises(ValueError) as error:
        train(
            TrainingConfig(**SMALL | settings),
            FakeProcess(),
            folder=tmp_path / "run",
            stream=FakeStream(),
            **arguments,
        )
    message = str(error.value)
    assert message.startswith(thing) and mend in message and "\n" not in message
    assert not (tmp_path / "run").exists()


def test_schedule():
    linear = [rate_share(step, 10, 0.2, "linear") for step in range(10)]
    assert linear == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    cosine = [rate_share(step, 4, 0.0, "cosine") for step in range(5)]
    assert cosine == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0])


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    model = build_model("llama", 11, 2, 16, 2, 16)
    adamw, muon = build_optimizers(
        model, TrainingConfig(**SMALL, optimizer="muon", weight_decay=0.1)
    )
    taken = [
        {id(p) for group in optimizer.param_groups for p in group["params"]}
        for optimizer in (adamw, muon)
    ]
    assert taken[1] == {id(p) for p in hidden_matrices(model)} and not taken[0] & taken[1]
    assert taken[0] | taken[1] == {id(p) for p in model.parameters()}
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]
    assert [group["peak"] for group in muon.param_groups] == [1.0e-2]
    assert len(build_optimizers(model, TrainingConfig(**SMALL, optimizer="adamw"))) == 1


def test_batched_muon_is_torchs():
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (32, 16), (16, 32), (16, 16)]
    start, gradients = (
        [torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)
    )
    results = []
    for optimizer_class in (torch.optim.Muon, BatchedMuon):
        matrices = [torch.nn.Parameter(matrix.clone()) for matrix in start]
        optimizer = optimizer_class(matrices, lr=0.1, weight_decay=0.1)
        for scale in (1, 2, -1):
            for matrix, gradient in zip(matrices, gradients):
                matrix.grad = gradient * scale
            optimizer.step()
        results.append(matrices)
    for torchs, ours in zip(*results):  # torch's are in bfloat16
        assert (torchs - ours).norm() < 0.02 * ours.norm()


def test_lines_of_progress_where_there_is_no_terminal(tmp_path, capsys):
    train(TrainingConfig(**SMALL), FakeProcess(), HELD_OUT, tmp_path, stream=FakeStream())
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("fake: 1,536 of 1,536 tokens, loss ") and told[-1].endswith(
        " s left"
    )
