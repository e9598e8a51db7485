"""Intervals: bootstrap over independent units (sequences, documents), and over seeds."""

import numpy as np
import torch
from scipy import stats


def bootstrap(values, statistic=None, draws=2000, level=0.95, seed=0):
    """(value, low, high) of a statistic of independent units, by the percentile bootstrap.

    `values` (units, ...) is resampled along its first axis; `statistic` maps arrays (draws, units, ...) to (draws,) and
    is the mean by default.
    """
    values = np.asarray(values)
    statistic = statistic or (lambda sample: sample.mean(1))
    chosen = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    drawn = np.concatenate(
        [statistic(values[part]) for part in np.array_split(chosen, max(1, draws // 200))]
    )
    tail = (1 - level) / 2
    return float(statistic(values[None])[0]), *(
        float(q) for q in np.quantile(drawn, [tail, 1 - tail])
    )


def t_interval(values, level=0.95):
    """(mean, low, high) of a few independent estimates (seeds, groups of documents), by Student's t."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    reach = (
        stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    )
    return mean, mean - float(reach), mean + float(reach)


def ratio(sums, counts):
    """(value, low, high) of sum(sums) / sum(counts) over sequences, the first axis, for tensors that broadcast.

    low and high bound 95 %, by the linearised ratio's standard error (Cochran 1977, 6.4) and Student's t with as many
    degrees of freedom as sequences count, less one. Not a number where less than 2 count (the value: less than 1).
    """
    total, counted = counts.sum(0), (counts > 0).sum(0)
    value = sums.sum(0) / total
    spread = ((sums - value * counts) ** 2).sum(0) * counted / (counted - 1)
    quantile = torch.as_tensor(stats.t.ppf(0.975, (counted - 1).cpu()), device=sums.device)
    reach = quantile * spread.sqrt() / total
    return value, value - reach, value + reach


def recovered_share(loss, without, aware):
    """Bootstrap over sequences of (without - loss) / (without - aware), losses (sequences,) on the same tokens.

    0 says no better than the predictor without the latents, 1 as good as the one that knows them.
    """
    stacked = np.stack([np.asarray(loss), np.asarray(without), np.asarray(aware)], 1)

    def share(sample):
        means = sample.mean(1)
        return (means[:, 1] - means[:, 0]) / (means[:, 1] - means[:, 2])

    return bootstrap(stacked, share)


def paired(differences, draws=2000, seed=0) -> dict:
    """Do paired differences (pairs,) lie above 0? Every test is one-sided.

    Returns the mean; d, Cohen's of paired differences (mean / standard deviation), and d_low, d_high, its 95 % by bootstrap
    (of the samples that spread); p by permutation (all signs, exact), wilcoxon and t. With n pairs no p by permutation is
    below 2^-n. ValueError for less than 2 pairs.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        raise ValueError(f"differences: has {len(values)} pair; give 2 or more")
    if not np.isfinite(values).all():
        raise ValueError(
            f"differences: {values.tolist()} are not all finite; give pairs that are, or leave out the others"
        )

    def effect(sample):
        spread = sample.std(1, ddof=1)
        return sample.mean(1)[spread > 0] / spread[spread > 0]

    drawn = effect(
        values[np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))]
    )
    if not len(effect(values[None])):  # all the same
        same = 0.5 ** len(values) if values[0] > 0 else 1.0
        nothing = dict.fromkeys(("d", "d_low", "d_high"), np.nan)
        return (
            {"mean": float(values[0])}
            | nothing
            | dict.fromkeys(("permutation", "wilcoxon", "t"), same)
        )
    low, high = np.quantile(drawn, [0.025, 0.975])
    signs = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    return {
        "mean": float(values.mean()),
        "d": float(effect(values[None])[0]),
        "d_low": float(low),
        "d_high": float(high),
        "permutation": float(signs.pvalue),
        "wilcoxon": float(
            stats.wilcoxon(values, alternative="greater", zero_method="zsplit").pvalue
        ),
        "t": float(stats.ttest_1samp(values, 0, alternative="greater").pvalue),
    }


def holm(p) -> np.ndarray:
    """p-values (tests,) adjusted for their number, by Holm's step-down method (Holm 1979)."""
    p = np.asarray(p, dtype=float)
    order = p.argsort()
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return stepped[order.argsort()]
