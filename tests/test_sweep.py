import pandas as pd
import pytest
from latentree.series.checkpoints import LocalSeries
from latentree.series.sweep import sweep
from test_checkpoints import make_run


class Series:
    """A series whose "models" are numbers, that remembers what was loaded."""

    def __init__(self, *steps, identity=None):
        self.steps, self.loaded, self.identity = list(steps), [], identity

    def load(self, step, **options):
        self.loaded.append(step)
        self.options = options
        return step


def measure(model):
    return pd.DataFrame({"head": [0, 1], "value": [model / 3, None], "score": ["a", "b"]})


@pytest.fixture
def table(tmp_path):
    return tmp_path / "tables" / "03_scores.csv"


def interrupt(model):
    raise KeyboardInterrupt


def test_the_table_has_the_rows_of_all_steps(table):
    series = Series(0, 3, 20)
    whole = sweep(series, measure, table, device="cuda", dtype="half")
    assert series.options == {"device": "cuda", "dtype": "half"}
    assert list(whole) == ["step", "head", "value", "score"]
    assert whole.step.tolist() == [0, 0, 3, 3, 20, 20]
    assert whole.value.dropna().tolist() == [0.0, 1.0, 20 / 3]
    pd.testing.assert_frame_equal(whole, pd.read_csv(table))


def test_a_sweep_goes_on_where_it_was_and_grows_with_its_series(table):
    series = Series(0, 3, 20)
    sweep(series, measure, table, steps=[0, 3])
    assert sweep(series, measure, table).equals(sweep(series, measure, table))
    series.steps.append(30)
    assert len(sweep(series, measure, table)) == 8 and series.loaded == [0, 3, 20, 30]


@pytest.mark.parametrize("identity, key", [(None, {"seed": 1}), ({"seed": 1}, {"seed": 0})])
def test_another_measurement_is_not_mixed_with_the_one_before(table, identity, key):
    sweep(Series(0, 3), measure, table, key={"seed": 0})
    series = Series(0, 3, identity=identity)
    whole = sweep(series, lambda model: measure(model + 3), table, key=key)
    assert series.loaded == [0, 3] and whole.value.dropna().tolist() == [1.0, 2.0]


def test_another_library_measures_again(table, monkeypatch):
    series = Series(0)
    for library in ("one", "other"):
        monkeypatch.setattr("latentree.series.sweep._library", lambda: library)
        sweep(series, measure, table)
    assert series.loaded == [0, 0]


def test_what_is_measured_stays_until_another_measurement_is_whole(table):
    series = Series(0, 3)
    before = sweep(series, measure, table, key="a")
    with pytest.raises(KeyboardInterrupt):
        sweep(series, interrupt, table, key="b")
    assert pd.read_csv(table).equals(before)
    assert sweep(series, measure, table, key="a").equals(before) and series.loaded == [0, 3, 0]


def test_a_step_without_a_checkpoint_is_refused(table):
    with pytest.raises(ValueError, match=r"steps = \[4\]: have no checkpoints; .*\[0, 3\]"):
        sweep(Series(0, 3), measure, table, steps=[0, 4])


def test_the_checkpoints_of_a_run(tmp_path, table):
    series = LocalSeries(make_run(tmp_path / "run"))

    def total(model):
        return pd.DataFrame({"value": [model.lm_head.weight.sum().item()]})

    found = sweep(series, total, table)
    assert found.value.tolist() == [total(series.load(step)).value[0] for step in series.steps]
