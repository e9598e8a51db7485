import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from latentree.series.checkpoints import LocalSeries, checkpoint_steps, save_checkpoint
from latentree.train.model import build_model
from safetensors.torch import load_file, save_file

SIZES = {"layers": 1, "width": 8, "heads": 2, "context": 8}
WEIGHTS = "model.safetensors"


def make_run(folder, seed=0, **told):
    """A run's folder with checkpoints at steps 0, 3 and 20, that differ in their weights."""
    folder.mkdir()
    identity = {"corpus": "bound", "seed": seed} | told
    (folder / "training.json").write_text(json.dumps(identity))
    for step in (20, 0, 3):
        save_checkpoint(model_at(step), folder, step)
    return folder


def model_at(step):
    return build_model("llama", 7, **SIZES, seed=step)


@pytest.mark.parametrize(
    "total, evenly, log_spaced, steps",
    [
        (100, 4, 0, [0, 25, 50, 75, 100]),
        (100, 2, 3, [0, 1, 10, 50, 100]),
        (1, 5, 5, [0, 1]),
    ],
)
def test_checkpoint_steps(total, evenly, log_spaced, steps):
    assert checkpoint_steps(total, evenly, log_spaced) == steps


def test_a_series_is_in_order_and_loads_ready_to_be_measured(tmp_path):
    series = LocalSeries(make_run(tmp_path / "run"))
    assert series.steps == [0, 3, 20] and series.config().vocab_size == 7
    model = series.load(3, dtype=torch.bfloat16)
    assert not model.training
    assert torch.equal(model.lm_head.weight, model_at(3).lm_head.weight.bfloat16())


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path):
    run = make_run(tmp_path / "run")
    (run / ".partial-step").mkdir()  # what a killed run left
    save_checkpoint(model_at(9), run, 3)
    assert torch.equal(LocalSeries(run).load(3).lm_head.weight, model_at(9).lm_head.weight)
    assert len(list(run.iterdir())) == 4


def test_weights_that_the_config_does_not_say_are_refused_and_not_left_out(tmp_path):
    file = make_run(tmp_path / "run") / "step-00000003" / WEIGHTS
    weights = load_file(file)
    first = {name: weights[name] for name in weights if ".layers.0." in name}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    save_file(weights | buffer, file, {"format": "pt"})
    LocalSeries(tmp_path / "run").load(3)  # a buffer is computed
    more = {name.replace(".0.", ".7."): weight.clone() for name, weight in first.items()}
    save_file(weights | more, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"that its config does not say, model\.layers\.7"):
        LocalSeries(tmp_path / "run").load(3)


def test_missing_weights_are_refused_and_not_drawn_at_random(tmp_path):
    file = make_run(tmp_path / "run") / "step-00000003" / WEIGHTS
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="step-00000003: lacks the weights lm_head.weight"):
        LocalSeries(tmp_path / "run").load(3)


def test_what_may_not_be_read_and_what_is_damaged_is_told_as_such(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    (run / "step-00000003 (copy)").mkdir()  # no checkpoint
    opened = Path.open

    def refuse(path, *mode, **options):
        if path.name == WEIGHTS:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *mode, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        with pytest.raises(PermissionError, match=f"Permission denied: .*{WEIGHTS}"):
            LocalSeries(run).load(3)
    (run / "training.json").write_text("")
    with pytest.raises(ValueError, match=r"training\.json: is damaged: Expecting value"):
        LocalSeries(run)


@pytest.mark.parametrize("change", [{"vocab_size": 9}, {"num_key_value_heads": 1}])
def test_weights_of_another_shape_than_the_config_says_are_refused(tmp_path, change):
    file = make_run(tmp_path / "run") / "step-00000003/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"its config does not say, [\w.]+ \(\d+, \d+\) \(and"):
        LocalSeries(tmp_path / "run").load(3)


@pytest.mark.parametrize("kept", [-100, 4])
def test_cut_weights_are_refused_with_the_librarys_reason(tmp_path, kept):
    file = make_run(tmp_path / "run") / "step-00000003" / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{WEIGHTS}: Error while deserializing header: "):
        LocalSeries(tmp_path / "run").load(3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    file = make_run(tmp_path / "run") / "step-00000003" / WEIGHTS
    weights = load_file(file)
    weights["model.norm.weight"][3] = value
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="step-00000003: has weights that are not finite; choose"):
        LocalSeries(tmp_path / "run").load(3)


def test_quantised_weights_without_their_scales_are_refused_and_not_read_as_numbers(tmp_path):
    file = make_run(tmp_path / "run") / "step-00000003" / WEIGHTS
    weights = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = (weights[name] * 127).to(torch.int8)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{WEIGHTS}: {name} holds whole numbers"):
        LocalSeries(tmp_path / "run").load(3)


def test_heads_split_otherwise_than_they_were_trained_are_refused(tmp_path):
    run = make_run(tmp_path / "run", heads=2)
    file = run / "step-00000003/config.json"
    told = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 2}
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    with pytest.raises(ValueError, match="config says 4 heads, and it was trained with 2"):
        LocalSeries(run).load(3)
    assert LocalSeries(run).load(20).config.num_attention_heads == 2


@pytest.mark.parametrize("error", [PermissionError, InterruptedError])
def test_a_folder_that_cannot_be_looked_into_is_not_told_as_empty(tmp_path, monkeypatch, error):
    run = make_run(tmp_path / "run")

    def refuse(folder):
        raise error(13, "refused")

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(error, match="refused"):
        LocalSeries(run)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", seed=1)
    shutil.rmtree(run / "step-00000020")
    shutil.copytree(other / "step-00000020", run / "step-00000020")
    with pytest.raises(ValueError, match="step-00000020: is of another run"):
        LocalSeries(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no training.json; train there first"):
        LocalSeries(tmp_path)
