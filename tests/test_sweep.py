import pandas as pd
import pytest
import torch
from latentree.series.checkpoints import LocalSeries
from latentree.series.sweep import sweep
from test_checkpoints import make_run

torch.set_num_threads(1)


class Series:
    """A series whose "models" are numbers, that remembers what was loaded."""

    def __init__(self, *steps, identity=None):
        self.steps, self.loaded, self.identity = list(steps), [], identity

    def load(self, step, device="cpu", **options):
        self.loaded.append(step)
        self.options = options | {"device": device}
        return step


def measure(model):
    return pd.DataFrame({"head": [0, 1], "value": [model / 3, None], "score": ["a", "b"]})


@pytest.fixture
def table(tmp_path):
    return tmp_path / "tables" / "03_scores.csv"


def run(series, table, measure=measure, **options):
    return sweep(series, measure, table, progress=False, **options)


def test_table_of_all_steps(table):
    series = Series(0, 3, 20)
    whole = run(series, table, device="cuda", revision="main")
    assert series.options == {"device": "cuda", "revision": "main"}
    assert list(whole) == ["step", "head", "value", "score"] and whole.step.tolist() == [
        0,
        0,
        3,
        3,
        20,
        20,
    ]
    assert whole.value.dropna().tolist() == [0.0, 1.0, 20 / 3]
    pd.testing.assert_frame_equal(whole, pd.read_csv(table))
    assert [path.name for path in table.parent.iterdir() if not path.name.startswith(".")] == [
        "03_scores.csv"
    ]


def test_interrupted_sweep_goes_on(table):
    def interrupted(model):
        if model == 3:
            raise KeyboardInterrupt
        return measure(model)

    series = Series(0, 3, 20)
    with pytest.raises(KeyboardInterrupt):
        run(series, table, interrupted)
    assert not table.exists() and series.loaded == [0, 3]
    resumed = run(series, table)
    assert series.loaded == [0, 3, 3, 20]
    assert run(series, table).equals(resumed) and series.loaded == [0, 3, 3, 20]
    assert resumed.equals(run(Series(0, 3, 20), table.with_name("again.csv")))
    series.steps.append(30)
    assert len(run(series, table)) == 8 and series.loaded[4:] == [30]
    assert run(series, table, steps=[3]).step.unique().tolist() == [3]


@pytest.mark.parametrize(
    "series, key",
    [(Series(0, 3), {"seed": 1}), (Series(0, 3, identity={"seed": 1}), {"seed": 0})],
    ids=["key", "series"],
)
def test_other_measurement_is_not_mixed(table, series, key):
    run(Series(0, 3), table, key={"seed": 0})
    whole = run(series, table, lambda model: measure(model + 3), key=key)
    assert series.loaded == [0, 3] and whole.value.dropna().tolist() == [1.0, 2.0]


def test_foreign_folder_is_not_mixed(table):
    parts = table.parent / ".03_scores"
    parts.mkdir(parents=True)
    (parts / "step-00000000.csv").write_text("step,value\n0,99\n")
    assert 99 not in run(Series(0), table).value.tolist()


def test_bad_input_is_named(table):
    with pytest.raises(ValueError, match=r"steps = \[4\].*choose among \[0, 3\]"):
        run(Series(0, 3), table, steps=[0, 4])
    with pytest.raises(ValueError, match=r"steps = \[\]"):
        run(Series(), table)
    with pytest.raises(ValueError, match="column step"):
        run(Series(0), table, lambda model: pd.DataFrame({"step": [1]}))


def test_progress_is_told_in_lines(table, capsys):
    sweep(Series(0, 3), measure, table)
    assert "03_scores: 2 of 2 checkpoints, step 3" in capsys.readouterr().err


def test_training_run(tmp_path, table):
    series = LocalSeries(make_run(tmp_path / "run"))
    found = run(
        series, table, lambda model: pd.DataFrame({"value": [model.lm_head.weight.sum().item()]})
    )
    assert found.value.tolist() == [
        series.load(step).lm_head.weight.sum().item() for step in series.steps
    ]
