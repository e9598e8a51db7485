"""Intervals over independent units (sequences, documents, seeds); tests of paired differences."""

import numpy as np
import pandas as pd
import torch
from scipy import stats


def bootstrap(values, statistic=None, draws=2000, level=0.95, seed=0):
    """(value, low, high) of a statistic of independent units, by the percentile bootstrap.

    `values` (units, ...) is resampled along its first axis; `statistic` maps arrays
    (draws, units, ...) to (draws,) and is the mean by default.
    """
    values = np.asarray(values)
    statistic = statistic or (lambda sample: sample.mean(1))
    chosen = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    parts = np.array_split(chosen, max(1, draws // 200))  # for memory's sake
    drawn = np.concatenate([statistic(values[part]) for part in parts])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(values[None])[0]), float(low), float(high)


def t_interval(values, level=0.95):
    """(mean, low, high) of a few independent estimates (seeds), by Student's t."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    reach = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values))
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
    seeds = groups["seed"].nunique()
    several, values = seeds[seeds >= 3].index, groups["value"]
    found = first.assign(over="sequences", seeds=seeds)
    found[numbers] = found[numbers].astype(float)
    found.loc[several, numbers] = groups[numbers].mean().loc[several]
    found.loc[several, "over"] = "seeds"
    reach = values.sem() * stats.t.ppf(0.975, seeds - 1)
    low, high = values.min(), values.max()
    if spread == "t":
        low, high = values.mean() - reach, values.mean() + reach
    found.loc[several, "low"], found.loc[several, "high"] = low.loc[several], high.loc[several]
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


def paired(differences, draws=2000, seed=0) -> dict:
    """Do paired differences (pairs,) lie above 0? Every test is one-sided.

    Returns their mean; Cohen's d of paired differences (mean / standard deviation) with 95 % by
    bootstrap; p by permutation (all signs, exact: never below 2^-pairs), wilcoxon and t.
    Raises ValueError for fewer than 2 pairs, or one that is not finite.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"differences = {values.tolist()}: give 2 or more, all of them finite")

    def effect(sample):
        spread = sample.std(1, ddof=1)
        return sample.mean(1) / np.where(spread > 0, spread, np.nan)

    chosen = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.nanquantile(effect(values[chosen]), [0.025, 0.975])
    exact = {"permutation_type": "samples", "n_resamples": np.inf, "alternative": "greater"}
    return {
        "mean": float(values.mean()),
        "d": float(effect(values[None])[0]),
        "d_low": float(low),
        "d_high": float(high),
        "permutation": float(stats.permutation_test((values,), np.mean, **exact).pvalue),
        "wilcoxon": float(stats.wilcoxon(values, 0, "zsplit", False, "greater").pvalue),
        "t": float(stats.ttest_1samp(values, 0, alternative="greater").pvalue),
    }


def holm(p) -> np.ndarray:
    """p-values (tests,) adjusted for their number, by Holm's step-down method (Holm 1979)."""
    p = np.asarray(p, dtype=float)
    order = p.argsort()
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return stepped[order.argsort()]
