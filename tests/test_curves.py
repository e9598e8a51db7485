"""Curves along training: means and half-way tokens against ones that are known."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latentree.evidence.curves import (
    Curve,
    _half_ways,
    _interval,
    curves,
    doublings_later,
    ended,
    half_way,
    sequence_sums,
    successive,
    tidy,
)


def one_sequence(tokens, values):
    """A curve of a single sequence, so that its points are `values`."""
    values = np.array([values], dtype=float)
    return Curve(np.array(tokens), values, np.ones_like(values))


def rising(middle, noise=0.0, sequences=40):
    """A curve that is half-way at `middle` tokens, up to noise over sequences."""
    tokens = np.geomspace(1, 1e6, 25)
    draw = np.random.default_rng(int(middle))
    counts = draw.integers(5, 15, (sequences, 1)) * np.ones((1, 25))
    shift = np.exp(noise * draw.standard_normal((sequences, 1)))
    return Curve(tokens, counts / (1 + (middle * shift / tokens) ** 3), counts)


def test_sums_merge_names_and_leave_out_what_is_not_there():
    values = torch.tensor([[1.0, 2.0, torch.nan], [3.0, 4.0, 5.0]])
    group = torch.tensor([[0, 1, 2], [0, 2, 3]])
    table = sequence_sums(values, group, ["a", "b", "b", "c", "never"])
    assert len(table) == 6  # each name for each sequence: every curve has the same sequences
    totals = table.groupby("name")[["sum", "count"]].sum()
    assert totals["sum"].to_dict() == {"a": 4, "b": 6, "c": 5}
    assert totals["count"].to_dict() == {"a": 2, "b": 2, "c": 1}
    assert sequence_sums(values)["sum"].tolist() == [3, 12]


def test_curves_of_a_sweep_are_ratios_of_sums():
    draw = np.random.default_rng(0)
    sums, counts = draw.random((5, 3)) + 1, draw.integers(1, 9, (5, 3))
    tables = []
    for column, step in enumerate((0, 2, 8)):
        part = {"sum": sums[:, column], "count": counts[:, column], "sequence": range(5)}
        tables.append(pd.DataFrame(part).assign(step=step, name="x", layer=1))
    found = curves(pd.concat(tables), ["name", "layer"], 100)
    curve = found["x", 1]
    assert curve.tokens.tolist() == [0, 200, 800] and np.array_equal(curve.sums, sums)
    assert curve.values == pytest.approx(sums.sum(0) / counts.sum(0))
    table = tidy(found, ["name", "layer"])
    assert list(table) == ["name", "layer", "tokens", "value", "low", "high"]
    assert table["value"].to_numpy() == pytest.approx(curve.values)
    assert (table["low"] < table["value"]).all() and (table["value"] < table["high"]).all()
    assert curve.at([-1]).values == pytest.approx(sums[:, -1].sum() / counts[:, -1].sum())


def test_half_way_is_linear_in_log_tokens():
    known = [
        ([0, 10, 1000], [0, 0.2, 0.8], 10 ** (1 + 2 / 3)),
        ([100, 10_000], [0, 1], 1000),
        ([5, 10], [0.9, 1], 5),  # past it from the first on
        ([0, 100], [0, 1], 10),  # 0 tokens count as 1
    ]
    for tokens, values, expected in known:
        assert half_way(one_sequence(tokens, values))[0] == pytest.approx(expected)
    assert np.isnan(half_way(one_sequence([1, 2], [0.5, 0]))).all()
    lifted = one_sequence([1, 100], [0.4, 1.0])
    assert half_way(lifted.rise())[0] == pytest.approx(10)
    flat = one_sequence([1, 100], [0.4, 0.4])
    assert np.isnan(half_way(flat.rise())).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.1, 10), st.floats(-1, 1))
@settings(max_examples=50, deadline=None)
def test_half_way_does_not_depend_on_scale_or_first_point(values, factor, base):
    values = np.array([0.0, *values, 1.0])
    tokens = 10 ** np.arange(len(values))
    found, _, _ = half_way(one_sequence(tokens, values))
    assert tokens[0] <= found <= tokens[-1] * (1 + 1e-9)
    moved, _, _ = half_way(one_sequence(tokens, values * factor + base).rise())
    assert found == pytest.approx(moved, rel=1e-4)


def test_intervals_of_half_way_tokens_cover_them_and_order_is_found():
    value, low, high = half_way(rising(1000))
    assert low == pytest.approx(value) == pytest.approx(high)  # all sequences agree
    assert abs(value - 1000) < 100
    value, low, high = half_way(rising(1000, noise=0.5))
    assert low < 1000 < high < 2000
    early, late = rising(1000, 0.3), rising(8000, 0.3)
    later, low, high = doublings_later(early, late)
    assert low < later < high and abs(later - 3) < 0.3 and low > 2
    assert doublings_later(late, late) == (0, 0, 0)
    lifted = Curve(early.tokens, early.sums + 0.4 * early.counts, early.counts)
    assert doublings_later(early.rise(), lifted.rise())[0] == pytest.approx(0, abs=1e-6)


def test_half_of_a_whole_that_is_given_and_of_one_that_is_never_reached():
    curve = one_sequence([1, 10, 100, 1000], [0, 0.2, 0.6, 0.8])
    assert half_way(curve)[0] == pytest.approx(10 ** (1 + 0.5))
    assert half_way(curve, 1.2)[0] == pytest.approx(100)
    assert np.isnan(half_way(curve, 2.0)[0])
    later = one_sequence([1, 10, 100, 1000], [0, 0, 0.2, 1.0])
    assert doublings_later(curve, later, 1.2)[0] == pytest.approx(np.log2(10**0.5))
    with pytest.raises(ValueError, match=r"\(1, 4\).*\(1, 2\).*give curves of the same"):
        doublings_later(curve, later.at(slice(2)))


def test_an_order_holds_for_every_other_checkpoint_too():
    for size in (24, 25):
        pair = [rising(middle, 0.3).at(slice(size)) for middle in (1000, 8000)]
        value, low, high = doublings_later(*pair)
        assert value == pytest.approx(np.log2(half_way(pair[1])[0] / half_way(pair[0])[0]))
        for chosen in ([*range(0, size - 1, 2), size - 1], [*range((size - 1) % 2, size, 2)]):
            one, other = _half_ways([curve.at(chosen) for curve in pair], None)
            _, other_low, other_high = _interval(np.log2(other / one))
            assert low <= other_low and other_high <= high


def test_a_curve_has_ended_if_its_last_quarter_hardly_changed_it():
    tokens = np.linspace(0, 100, 21)
    assert ended(one_sequence(tokens, 1 - np.exp(-tokens / 5)))
    assert ended(one_sequence(tokens, np.exp(-tokens / 5)))
    assert not ended(one_sequence(tokens, tokens))
    assert not ended(one_sequence(tokens, -tokens))


def test_successive_curves_are_compared_where_they_reach_it():
    found = {name: rising(middle, 0.3) for name, middle in (("a", 100), ("b", 1600), ("d", 6400))}
    low = rising(1600, 0.3)
    found = found | {"c": Curve(low.tokens, 0.1 * low.sums, low.counts)}
    order = {name: found[name] for name in "abcd"}  # of which c never rises to a quarter
    steps = successive(order, 0.5)
    assert list(steps) == [("a", "b"), ("b", "d")]
    assert steps["a", "b"][0] == pytest.approx(4, abs=0.3)
    assert steps["b", "d"][0] == pytest.approx(2, abs=0.3)
