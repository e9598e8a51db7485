import json
import shutil

import pytest
import torch
from latentree.series.checkpoints import LocalSeries, checkpoint_steps, new_folder, save_checkpoint
from latentree.train.model import build_model

torch.set_num_threads(1)
SIZES = {"layers": 1, "width": 8, "heads": 2, "context": 8}


def make_run(folder, architecture="llama", vocabulary_size=7, seed=0):
    """A run's folder with checkpoints at steps 0, 3 and 20."""
    folder.mkdir()
    identity = {"architecture": architecture, "vocabulary_size": vocabulary_size, "seed": seed}
    (folder / "training.json").write_text(json.dumps(identity))
    for step in (20, 0, 3):
        save_checkpoint(
            build_model(architecture, vocabulary_size, **SIZES, seed=step), folder, step
        )
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.mark.parametrize(
    "total, evenly, log_spaced, steps",
    [
        (100, 4, 0, [0, 25, 50, 75, 100]),
        (100, 0, 3, [0, 1, 10, 100]),
        (100, 2, 3, [0, 1, 10, 50, 100]),
        (7, 0, 0, [0, 7]),
        (1, 5, 5, [0, 1]),
    ],
)
def test_checkpoint_steps(total, evenly, log_spaced, steps):
    assert checkpoint_steps(total, evenly, log_spaced) == steps


def test_series_is_ordered_and_loads(run):
    series = LocalSeries(run)
    assert len(series) == 3 and series.steps == [0, 3, 20]
    assert [(step, folder.name) for step, folder in series][1] == (3, "step-00000003")
    model = series.load(3, attn_implementation="eager")
    assert not model.training and model.config._attn_implementation == "eager"
    assert torch.equal(
        model.lm_head.weight, build_model("llama", 7, **SIZES, seed=3).lm_head.weight
    )
    assert series.load(0, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="step: 4 .*choose one of"):
        series.load(4)


def test_half_written_folder_is_ignored_and_removed(run):
    with pytest.raises(KeyboardInterrupt), new_folder(run / "step-00000030") as partial:
        (partial / "config.json").write_text("{")
        raise KeyboardInterrupt
    assert len(LocalSeries(run)) == 3 and any(run.glob(".partial*"))
    save_checkpoint(build_model("llama", 7, **SIZES, seed=9), run, 3)
    assert not any(run.glob(".partial*")) and len(LocalSeries(run)) == 3
    assert torch.equal(
        LocalSeries(run).load(3).lm_head.weight,
        build_model("llama", 7, **SIZES, seed=9).lm_head.weight,
    )


def cut(folder, share):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def change(folder, **values):
    file = folder / "training.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


DAMAGE = {
    "cut in the tensors": (lambda f: cut(f, 0.9), "truncated"),
    "cut in the header": (lambda f: cut(f, 0.01), "truncated"),
    "empty weights": (lambda f: cut(f, 0), "truncated"),
    "longer weights": (lambda f: (f / "model.safetensors").open("ab").write(b"0"), "truncated"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "truncated"),
    "no config": (lambda f: (f / "config.json").unlink(), "truncated"),
    "half a config": (lambda f: (f / "config.json").write_text('{"model'), "truncated"),
    "no identity": (lambda f: (f / "training.json").unlink(), "training.json"),
    "other seed": (
        lambda f: change(f, seed=1),
        "foreign checkpoint, its seed is 1 and this run's is 0",
    ),
}


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_is_refused_by_name(run, damage, words):
    damage(run / "step-00000003")
    with pytest.raises(ValueError, match="step-00000003") as error:
        LocalSeries(run)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("other", [{"architecture": "gpt2"}, {"vocabulary_size": 9}])
def test_checkpoint_of_another_model_is_refused(run, tmp_path, other):
    other_run = make_run(tmp_path / "other", **other)
    shutil.rmtree(run / "step-00000020")
    shutil.copytree(other_run / "step-00000020", run / "step-00000020")
    shutil.copy(run / "training.json", run / "step-00000020")
    with pytest.raises(
        ValueError, match="step-00000020: foreign checkpoint, its " + next(iter(other))
    ):
        LocalSeries(run)


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="training.json"):
        LocalSeries(tmp_path)
