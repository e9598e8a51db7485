"""Intervals on data whose coverage is known, and tests of pairs against their definitions."""

import numpy as np
import pandas as pd
import pytest
import torch
from latentree.evidence.intervals import bootstrap, over_seeds, pooled, ratio, t_interval


def test_intervals_cover_as_often_as_they_say():
    samples = np.random.default_rng(0).exponential(size=(300, 60))
    for interval in (lambda sample: bootstrap(sample, draws=400), t_interval):
        bounds = np.array([interval(sample) for sample in samples])
        covered = (bounds[:, 1] <= 1) & (bounds[:, 2] >= 1)
        assert 0.88 < covered.mean() < 0.985
    assert np.isnan(t_interval([3.0])[1:]).all()  # one estimate has no interval


def test_the_bootstrap_resamples_whole_units_of_any_shape():
    """The draws are numpy's own for seed 0, so that the digits of an interval stay."""
    values = np.random.default_rng(1).normal(size=(20, 2))
    chosen = np.random.default_rng(0).integers(20, size=(300, 20))
    shares = values[chosen, 0].sum(1) / values[chosen, 1].sum(1)
    found = bootstrap(values, lambda d: d[..., 0].sum(1) / d[..., 1].sum(1), draws=300)
    assert found[1:] == pytest.approx(np.quantile(shares, [0.025, 0.975]))
    assert found[0] == pytest.approx(values[:, 0].sum() / values[:, 1].sum())


def test_a_ratio_weighs_sequences_by_what_they_count():
    sums, counts = torch.tensor([1.0, 9.0, 0.0]), torch.tensor([1.0, 3.0, 0.0])
    assert ratio(sums, counts)[0].item() == 2.5  # not the mean of 1 and 3
    scores = torch.tensor([[1.0], [2.0], [4.0], [5.0]]).double()
    found = torch.stack(ratio(scores, torch.ones(4, 1)))[:, 0]
    assert found.tolist() == pytest.approx(t_interval(scores[:, 0]))


def test_over_seeds_takes_means_and_leaves_single_seeds_as_they_were():
    rows = []
    for seed, value in enumerate((1.0, 2.0, 6.0)):
        rows.append(["a", 0, seed, value, value - 9, value + 9, 0.1 * seed, "x"])
    rows.append(["b", 0, 0, 5.0, 4.0, 7.0, 0.5, "y"])
    columns = ["corpus", "step", "seed", "value", "low", "high", "null", "told"]
    table = pd.DataFrame(rows, columns=columns)
    found = over_seeds(table, ["corpus", "step"]).set_index("corpus")
    assert found.loc["a", ["value", "low", "high"]].tolist() == [3.0, 1.0, 6.0]
    assert found.loc["a", "null"] == pytest.approx(0.1)
    assert found.loc["b", ["value", "low", "high", "null"]].tolist() == [5.0, 4.0, 7.0, 0.5]
    assert found.over.tolist() == ["seeds", "sequences"] and found.seeds.tolist() == [3, 1]
    assert found.told.tolist() == ["x", "y"]
    exact = over_seeds(table, ["corpus", "step"], "t").set_index("corpus")
    expected = t_interval([1.0, 2.0, 6.0])
    assert exact.loc["a", ["value", "low", "high"]].tolist() == pytest.approx(list(expected))


def test_seeds_pooled_are_no_surer_than_each_of_them():
    assert pooled([(1, 0, 2), (5, 4, 6)]) == (1, 0, 2)
    agree = [(1.0, 0.5, 1.5), (1.1, 0.6, 1.6), (0.9, 0.3, 1.4)]
    assert pooled(agree) == (pytest.approx(1), 0.3, 1.6)
    value, low, high = pooled([(v, v - 0.1, v + 0.1) for v in (0, 1, 2)])
    assert (value, low, high) == pytest.approx(t_interval([0, 1, 2]))
