"""Curves along training: means and half-way tokens against ones that are known."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latentree.evidence.curves import (
    Curve,
    curves,
    doublings_later,
    half_way,
    half_way_of,
    sequence_sums,
    widest,
)


def test_sums_merge_names_and_leave_out_what_is_not_there():
    values, group = (
        torch.tensor([[1.0, 2.0, torch.nan], [3.0, 4.0, 5.0]]),
        torch.tensor([[0, 1, 2], [0, 2, 3]]),
    )
    table = sequence_sums(values, group, ["a", "b", "b", "c", "never"])
    totals = table.groupby("name")[["sum", "count"]].sum()
    assert totals["sum"].to_dict() == {"a": 4, "b": 6, "c": 5} and totals["count"].to_dict() == {
        "a": 2,
        "b": 2,
        "c": 1,
    }
    assert (
        len(table) == 6
    )  # each name for each sequence, so that every curve has the same sequences
    assert sequence_sums(values)["sum"].tolist() == [3, 12]


def test_curves_of_a_sweep_have_means_and_shares():
    draw = np.random.default_rng(0)
    sums, counts = draw.random((5, 3)) + 1, draw.integers(1, 9, (5, 3))
    rows = [
        (step, "x", s, sums[s, i], counts[s, i])
        for i, step in enumerate((0, 2, 8))
        for s in range(5)
    ]
    table = pd.DataFrame(rows, columns=["step", "name", "sequence", "sum", "count"])
    curve = curves(table, "name", 100)["x"]
    assert curve.tokens.tolist() == [0, 200, 800] and np.array_equal(curve.sums, sums)
    means = curve.table()
    assert means["value"].to_numpy() == pytest.approx(sums.sum(0) / counts.sum(0))
    assert (means["low"] < means["value"]).all() and (means["value"] < means["high"]).all()
    without, aware = np.full(5, 3.0), np.full(5, 1.0)
    assert curve.recovered(without, aware).table()["value"].to_numpy() == pytest.approx(
        ((3 - sums) / 2).mean(0)
    )


def test_half_way_is_linear_in_log_tokens():
    assert half_way([0, 10, 1000], [0, 0.2, 0.8]) == pytest.approx(10 ** (1 + 2 / 3))
    assert half_way([100, 10_000], [0.0, 1.0]) == pytest.approx(1000)
    assert half_way([5, 10], [0.9, 1.0]) == pytest.approx(5) and half_way(
        [0, 100], [0, 1]
    ) == pytest.approx(10)
    assert np.isnan(half_way([1, 2], [0.5, 0.0])) and np.isnan(half_way([1, 2], [0.5, np.nan]))
    both = half_way([1, 100], [[0.4, 1.0], [0.4, 0.4]], base=[0.4, 0.4])
    assert both[0] == pytest.approx(10) and np.isnan(both[1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.1, 10), st.floats(-1, 1))
@settings(max_examples=100, deadline=None)
def test_half_way_does_not_depend_on_scale_or_base(values, factor, base):
    values = np.array([*values, 1.0])
    tokens = 10 ** np.arange(len(values))
    found = half_way(tokens, values)
    assert tokens[0] <= found <= tokens[-1] * (1 + 1e-9)
    assert found == pytest.approx(half_way(tokens, values * factor + base, base), rel=1e-4)


def curve_with(middle, noise=0.0, sequences=40):
    """A curve over log-spaced tokens that is half-way at `middle` tokens, up to noise over sequences."""
    tokens = np.geomspace(1, 1e6, 25)
    value = 1 / (1 + (middle / tokens) ** 3)
    draw = np.random.default_rng(int(middle))
    counts = draw.integers(5, 15, (sequences, 1)) * np.ones((1, 25))
    shift = np.exp(noise * draw.standard_normal((sequences, 1)))
    return Curve(
        tokens, counts / (1 + (middle * shift / tokens) ** 3) if noise else value * counts, counts
    )


def test_intervals_of_half_way_tokens_cover_them_and_order_is_found():
    value, low, high = half_way_of(curve_with(1000))
    assert (
        low == pytest.approx(value) == pytest.approx(high) and abs(value - 1000) < 100
    )  # all sequences agree
    value, low, high = half_way_of(curve_with(1000, noise=0.5))
    assert low < 1000 < high < 2000
    later, low, high = doublings_later(curve_with(1000, 0.3), curve_with(8000, 0.3))
    assert low < later < high and abs(later - 3) < 0.3 and low > 2
    same = curve_with(3000, 0.3)
    assert doublings_later(same, same) == (0, 0, 0)


def test_a_rise_is_counted_from_the_first_point():
    curve = curve_with(1000)
    lifted = Curve(curve.tokens, curve.sums + 0.4 * curve.counts, curve.counts)
    assert half_way_of(lifted)[0] < 900 and half_way_of(lifted, rise=True)[0] == pytest.approx(
        half_way_of(curve)[0], rel=0.01
    )
    assert doublings_later(curve, lifted, (False, True))[0] == pytest.approx(0, abs=0.02)
    falling = Curve(curve.tokens, -curve.sums, curve.counts)
    assert np.isnan(half_way_of(falling)).all()


def test_the_widest_interval_holds_those_of_every_other_checkpoint():
    early, late = curve_with(1000, 0.3), curve_with(8000, 0.3)
    value, low, high = widest(doublings_later, early, late)
    assert (value, low, high)[0] == doublings_later(early, late)[0]
    for start in (0, 1):
        kept = (
            np.arange(24 if start else 25)[start::2]
            if start == 0
            else np.arange(25)[::-1][::2][::-1]
        )
        pair = [Curve(c.tokens[kept], c.sums[:, kept], c.counts[:, kept]) for c in (early, late)]
        _, other_low, other_high = doublings_later(*pair)
        assert low <= other_low and other_high <= high
