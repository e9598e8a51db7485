import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from latentree.data.corpus import Corpus, Documents
from latentree.series.checkpoints import CARD, IDENTITY, LocalSeries
from latentree.train import training
from latentree.train.model import build_model
from latentree.train.optimizers import BatchedMuon, build_optimizers, rate_share
from latentree.train.settings import TrainingConfig
from latentree.train.training import STATE, evaluate, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedModel


class Counting(Corpus):
    """Documents of 8 tokens that count upwards over 11 words, each from a place of its own."""

    def __init__(self):
        super().__init__("counting", "PCFG", 11, 0, 8, "counting")

    def documents(self, ids, device="cpu", detail=True):
        tokens = (ids[:, None] * 7 + torch.arange(8)) % 11
        document = torch.arange(len(ids)).repeat_interleave(8)
        return Documents({"tokens": tokens.flatten(), "document": document}, len(ids))


SMALL = {
    "layers": 1,
    "width": 16,
    "heads": 2,
    "context": 16,
    "batch_sequences": 4,
    "tokens": 64 * 24,
    "checkpoints_even": 3,
    "checkpoints_log": 3,
    "state_every_seconds": 0.0,
}
STEPS = [0, 1, 5, 8, 16, 24]
HELD_OUT = torch.randint(0, 11, (6, 16), generator=torch.Generator().manual_seed(99))


def small(folder, **settings):
    return train(TrainingConfig(**SMALL | settings), Counting(), HELD_OUT, folder, "cpu")


def contents(folder):
    """Every byte that a rerun must give again: tables, weights, configurations."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != CARD]
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in files
        if not file.name.endswith(".tmp")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    small(folder)
    return folder


def test_a_finished_run_has_its_tables_and_checkpoints(finished):
    losses, held_out = (pd.read_csv(finished / name) for name in ("losses.csv", "held_out.csv"))
    assert losses.step.tolist() == list(range(1, 25))
    assert losses.tokens.tolist() == [64 * step for step in losses.step]
    assert losses.learning_rate.max() == TrainingConfig().learning_rate
    assert held_out.step.tolist() == STEPS == LocalSeries(finished).steps
    card = json.loads((finished / CARD).read_text())
    assert card["tokens"] == 64 * 24 and card["parameters"] > 0
    assert not (finished / STATE).exists()


def test_held_out_losses_are_those_of_the_checkpoint(finished):
    held_out = pd.read_csv(finished / "held_out.csv").set_index("step").loc[16]
    losses = evaluate(LocalSeries(finished).load(16), HELD_OUT, rows=4)
    assert losses.shape == (6, 15)
    assert losses.mean().item() == pytest.approx(held_out.loss, rel=1e-6)
    error = losses.mean(1).std().item() / 6**0.5
    assert error == pytest.approx(held_out.standard_error, rel=1e-5)


def test_a_finished_run_is_not_repeated(finished, monkeypatch):
    monkeypatch.setattr(training, "_loop", None)
    assert small(finished).equals(pd.read_csv(finished / "losses.csv"))


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw"},
        {"precision": "bfloat16"},
        {"architecture": "gpt2", "packing": "stream"},
    ],
)
def test_a_model_learns_to_count(tmp_path, settings):
    losses = small(tmp_path, tokens=64 * 100, state_every_seconds=60.0, **settings).loss
    assert losses.iloc[0] > 2.2 and losses.iloc[-5:].mean() < 1.4


def test_micro_batches_and_compilation_change_rounding_only(finished, tmp_path, monkeypatch):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode: compiler(model, backend="aot_eager"))
    before = pd.read_csv(finished / "losses.csv").loss
    for name, settings in {"parts": {"micro_batches": 2}, "compiled": {"compiled": True}}.items():
        losses = small(tmp_path / name, **settings)
        assert (losses.loss - before).abs().max() < 1e-5
        assert LocalSeries(tmp_path / name).load(24)


def test_each_model_of_a_process_is_compiled(tmp_path, monkeypatch):
    compiler, compiled = torch.compile, []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    monkeypatch.setattr(torch, "compile", lambda model, mode: compiler(model, backend=backend))
    counts = []
    for number in range(3):
        small(tmp_path / str(number), compiled=True, seed=number)
        counts.append(len(compiled))
    assert counts[0] and counts == [counts[0], 2 * counts[0], 3 * counts[0]]


# ---------------------------------------------------------------------- watched from elsewhere


def test_a_tracker_shows_what_the_tables_say_with_the_exact_losses_beside_it(tmp_path):
    losses = small(tmp_path / "run", trackers=["tensorboard"], lines={"syntax_only": 2.5})
    events = EventAccumulator(str(tmp_path / "run/trackers/latentree"))
    events.Reload()
    shown = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert [event.step for event in shown["loss"]] == list(losses.step)
    assert np.allclose([event.value for event in shown["loss"]], losses.loss)
    assert {event.value for event in shown["syntax_only"]} == {2.5}
    held_out = pd.read_csv(tmp_path / "run/held_out.csv")
    assert [event.step for event in shown["held_out_loss"]] == list(held_out.step)
    assert np.allclose([event.value for event in shown["held_out_loss"]], held_out.loss)
    assert min(event.value for event in shown["tokens_per_second"]) > 0
    assert small(tmp_path / "alone").equals(losses)  # watching changes nothing


def test_a_tracker_that_is_not_installed_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("latentree.train.training.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="trackers: wandb is not installed; `pip install wandb`"):
        small(tmp_path / "run", trackers=["wandb"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["store_init_configuration", "log", "finish"])
def test_a_tracker_that_fails_is_told_and_ends_no_training(tmp_path, monkeypatch, name):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"accelerate.tracking.TensorBoardTracker.{name}", fail)
    with pytest.warns(UserWarning, match="trackers: .*No space left on device; nothing more is"):
        losses = small(tmp_path / "run", trackers=["tensorboard"])
    assert small(tmp_path / "alone").equals(losses)


# ---------------------------------------------------------------------- kill and resume


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"no state"])
def test_a_state_that_cannot_be_read_is_told_with_the_reason(tmp_path, content):
    small(tmp_path / "run")
    (tmp_path / "run" / "run_card.json").unlink()
    (tmp_path / "run" / STATE).write_bytes(content)
    with pytest.raises(ValueError, match=f"run/{STATE}: cannot be read: .+; if it is damaged"):
        small(tmp_path / "run")


def die_in(module, name, call, half=None, when=lambda *_: True):
    """Kill this process at the nth call of a function, once `half` has done a part of its work."""
    whole, calls = getattr(module, name), []

    def replacement(*arguments, **options):
        calls.extend([1] * bool(when(*arguments)))
        if len(calls) == call:
            if half:
                half(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **options)

    setattr(module, name, replacement)


def half_a_model(model, folder):
    model.config.save_pretrained(folder)
    (Path(folder) / "model.safetensors").write_bytes(b"0" * 100)


MOMENTS = {
    "in the first checkpoint": lambda: die_in(PreTrainedModel, "save_pretrained", 1, half_a_model),
    "in a table": lambda: die_in(training, "write_text", 5),
    "in a state": lambda: die_in(
        torch, "save", 9, lambda state, file: Path(file).write_bytes(b"half")
    ),
    "in a later checkpoint": lambda: die_in(PreTrainedModel, "save_pretrained", 2, half_a_model),
    "before a checkpoint is in its place": lambda: die_in(
        os, "replace", 1, when=lambda source, _: Path(source).name == ".partial-step"
    ),
    "at the end": lambda: die_in(
        Path, "unlink", 1, when=lambda path, *_: path.name == STATE and path.exists()
    ),
}


def die_at_all_moments(folder):
    """Train in children of this process, each killed at another moment; their exit statuses."""
    statuses = []
    for moment in MOMENTS.values():
        child = os.fork()
        if child == 0:
            moment()
            small(folder)
            os._exit(0)
        statuses.append(os.waitpid(child, 0)[1])
    return statuses


def test_killed_at_many_moments_it_ends_bit_for_bit_the_same(finished, tmp_path):
    script = "import sys, test_training as t; print(t.die_at_all_moments(t.Path(sys.argv[1])))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str([signal.SIGKILL.value] * len(MOMENTS)), done.stderr[-2000:]
    small(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(finished)


def test_interrupted_it_goes_on_from_its_state(finished, tmp_path, monkeypatch):
    def interrupted(step, *schedule):
        return 1 / 0 if step == 13 else rate_share(step, *schedule)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(training, "rate_share", interrupted)
        small(tmp_path)
    assert torch.load(tmp_path / STATE)["run"]["step"] == 13
    small(tmp_path, state_every_seconds=60.0)  # how often the state is kept changes no result
    assert contents(tmp_path) == contents(finished)


def test_a_loss_that_is_not_finite_stops_the_run_and_what_was_good_stays(tmp_path):
    with pytest.raises(ValueError, match="loss: not finite at step .*lower learning rate"):
        small(tmp_path, learning_rate=1e30, muon_learning_rate=1e30)
    series = LocalSeries(tmp_path)
    assert all(evaluate(series.load(step), HELD_OUT).isfinite().all() for step in series.steps)


# ---------------------------------------------------------------------- what is refused


class OtherGrammar(Counting):
    digest = "0" * 8


def test_the_folder_of_another_training_is_refused(finished):
    before = contents(finished)
    with pytest.raises(ValueError, match="holds a training with other width, seed; name a new"):
        small(finished, width=32, seed=1)
    with pytest.raises(ValueError, match="holds a training with other grammar"):
        train(TrainingConfig(**SMALL), OtherGrammar(), HELD_OUT, finished)
    with pytest.raises(ValueError, match="holds a training with other held_out"):
        train(TrainingConfig(**SMALL), Counting(), HELD_OUT + 1, finished)
    assert contents(finished) == before


def test_a_training_from_before_a_setting_existed_had_its_default(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    identity = tmp_path / "run" / IDENTITY
    before = json.loads(identity.read_text())
    del before["resampled_from"]
    identity.write_text(json.dumps(before))
    assert small(tmp_path / "run").equals(small(finished))
    with pytest.raises(ValueError, match="holds a training with other resampled_from"):
        small(tmp_path / "run", resampled_from="zero")


@pytest.mark.parametrize("name, value", [("optimizer", "sgd"), ("tokens", 3.0e6), ("layer", 2)])
def test_settings_that_cannot_be_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        TrainingConfig(**SMALL | {name: value})


def test_a_model_that_cannot_be_leaves_no_identity_behind(tmp_path):
    with pytest.raises(ValueError, match="architecture = 'lama'"):
        small(tmp_path / "run", architecture="lama")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- optimizers


def test_the_schedule():
    shares = [rate_share(step, 10, warmup=0.2, decay=0.5) for step in range(10)]
    assert shares == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    constant = [rate_share(step, 4, warmup=0.0, decay=0.0) for step in range(4)]
    assert constant == [1.0] * 4
    falling = [rate_share(step, 4, warmup=0.0, decay=1.0) for step in range(4)]
    assert falling == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest(architecture):
    model = build_model(architecture, 11, 2, 16, 2, 16)
    adamw, muon = build_optimizers(model, TrainingConfig(weight_decay=0.1))
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert not taken & rest
    assert taken | rest == {id(p) for p in model.parameters()}
    for name, p in model.named_parameters():
        of_a_layer = ".layers." in name or ".h." in name
        assert (id(p) in taken) == (p.ndim == 2 and of_a_layer)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]


def test_queries_and_keys_have_a_rate_of_their_own():
    model = build_model("llama", 11, 2, 16, 2, 16)
    config = TrainingConfig(muon_learning_rate=0.01, query_key_rate=0.04)
    _, muon = build_optimizers(model, config)
    rate_of = {id(p): group["peak"] for group in muon.param_groups for p in group["params"]}
    for layer in model.model.layers:
        for name, part in layer.self_attn.named_children():
            assert rate_of[id(part.weight)] == (0.04 if name in ("q_proj", "k_proj") else 0.01)


@pytest.mark.parametrize("instead", ["another sequence", "zero"])
def test_resampled_attention_is_missing_at_its_share_of_places_in_training_only(instead):
    settings = {"resampled_attention": 0.5, "resampled_from": instead}
    model = build_model("llama", 11, 2, 16, 2, 16)
    written, module = [], model.model.layers[1].self_attn.o_proj
    module.register_forward_hook(lambda module, inputs, output: written.append(output))
    training._resample_attention(model, TrainingConfig(**settings), "cpu")
    module.register_forward_hook(lambda module, inputs, output: written.append(output))
    read = torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        module.train()(read)
        module.eval()(read)
    own, found, again, quiet = written
    other = own.roll(1, 0) if instead == "another sequence" else torch.zeros_like(own)
    missing = (found == other).all(-1)
    assert 0.3 < missing.float().mean() < 0.7
    assert torch.equal(found[~missing], own[~missing])
    assert torch.equal(again, quiet)


def test_resampled_attention_changes_the_training_and_resumes_exactly(
    finished, tmp_path, monkeypatch
):
    settings = {"resampled_attention": 0.5}
    whole = small(tmp_path / "whole", **settings)
    assert abs(whole.loss - pd.read_csv(finished / "losses.csv").loss).max() > 0.01
    schedule = rate_share

    def interrupted(step, *more):
        return 1 / 0 if step == 13 else schedule(step, *more)

    with monkeypatch.context() as patch:
        patch.setattr(training, "rate_share", interrupted)
        with pytest.raises(ZeroDivisionError):
            small(tmp_path / "parts", **settings)
    small(tmp_path / "parts", **settings)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_model_of_attention_only_is_trained_and_read_back(tmp_path):
    small(tmp_path, mlp_width=0)
    model = LocalSeries(tmp_path).load(24)
    assert model.model.layers[0].mlp.down_proj.weight.shape == (16, 0)
    assert not any("mlp" in name for name, p in model.named_parameters() if p.numel())


def test_batched_muon_is_torchs():
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (32, 16), (16, 32), (16, 16)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
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
