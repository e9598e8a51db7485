"""Intervals over independent units: sequences, documents, seeds."""

import numpy as np
import pandas as pd
import torch
from scipy import stats


def bootstrap(values, statistic=None, draws=2000):
    """(value, low, high), 95 %, of a statistic of independent units, by the percentile bootstrap.

    `values` (units, ...) is resampled along its first axis; `statistic` maps arrays
    (draws, units, ...) to (draws,) and is the mean by default.
    """
    values = np.asarray(values)
    statistic = statistic or (lambda sample: sample.mean(1))
    chosen = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    parts = np.array_split(chosen, max(1, draws // 200))  # for memory's sake
    drawn = np.concatenate([statistic(values[part]) for part in parts])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(statistic(values[None])[0]), float(low), float(high)


def t_interval(values):
    """(mean, low, high), 95 %, of a few independent estimates (seeds), by Student's t."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    reach = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, mean - reach, mean + reach


def pooled(intervals) -> tuple:
    """One (value, low, high) of several seeds': by Student's t, no narrower than any one's own.

    Of fewer than three seeds it is the first one's.
    """
    if len(intervals) < 3:
        return tuple(intervals[0])
    value, low, high = zip(*intervals)
    middle, lower, upper = t_interval(value)
    return middle, min(lower, *low), max(upper, *high)


def over_seeds(table: pd.DataFrame, keys: list, spread: str = "range") -> pd.DataFrame:
    """Rows that agree in `keys` and differ in `seed` as one row: the means of their numbers.

    `low` and `high` are the `range` over seeds, or with spread `t` their 95 % interval by Student's
    t, and column `over` says `seeds`; where a row has fewer than three seeds they stay as they
    were, over sequences, and it is the first seed's.
    """
    numbers = table.select_dtypes("number").columns.difference(["seed", *keys])
    groups, first = table.groupby(keys, sort=False), table.drop_duplicates(keys).set_index(keys)
    seeds, means, values = groups["seed"].nunique(), groups[numbers].mean(), groups["value"]
    means["low"], means["high"] = values.min(), values.max()
    if spread == "t":
        reach = values.sem() * stats.t.ppf(0.975, seeds - 1)
        means["low"], means["high"] = values.mean() - reach, values.mean() + reach
    found = first.assign(over="sequences", seeds=seeds)
    found[numbers] = found[numbers].astype(float)
    several = seeds.index[seeds >= 3]
    found.loc[several, means.columns] = means.loc[several]
    found.loc[several, "over"] = "seeds"
    return found.drop(columns="seed").reset_index()


def ratio(sums, counts):
    """(value, low, high) of sum(sums) / sum(counts) over sequences, the first axis of tensors.

    low and high bound 95 %, by the linearised ratio's standard error (Cochran 1977, 6.4) and
    Student's t, with as many degrees of freedom as sequences count, less one. NaN for fewer than 2.
    """
    total, counted = counts.sum(0), (counts > 0).sum(0)
    value = sums.sum(0) / total
    spread = ((sums - value * counts) ** 2).sum(0) * counted / (counted - 1)
    quantile = torch.as_tensor(stats.t.ppf(0.975, (counted - 1).cpu()), device=sums.device)
    reach = quantile * spread.sqrt() / total
    return value, value - reach, value + reach
