"""Curves along training whose points are means over sequences; when one is half-way.

A curve keeps each sequence's part of each point, so that all that is computed from it has an
interval over sequences: a mean is a ratio of sums, and sequences are drawn for all curves together.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch

from latentree.evidence.intervals import ratio

_DRAWS = 2000  # of the bootstrap over sequences


@dataclass
class Curve:
    """tokens (checkpoint,) seen in training; a point is a ratio of sums (sequence, checkpoint)."""

    tokens: np.ndarray
    sums: np.ndarray
    counts: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """The points (checkpoint,)."""
        return self.sums.sum(0) / self.counts.sum(0)

    def table(self) -> pd.DataFrame:
        """DataFrame (tokens, value, low, high), 95 % over sequences as `ratio`."""
        value, low, high = ratio(torch.tensor(self.sums), torch.tensor(self.counts))
        return pd.DataFrame({"tokens": self.tokens, "value": value, "low": low, "high": high})

    def at(self, checkpoints=slice(None), sequences=slice(None)) -> "Curve":
        """The curve of some checkpoints and sequences (numbers, masks or slices)."""
        sums, counts = self.sums[sequences][:, checkpoints], self.counts[sequences][:, checkpoints]
        return Curve(self.tokens[checkpoints], sums, counts)

    def rise(self) -> "Curve":
        """The curve less its first point, whose counts are those of all points."""
        return Curve(self.tokens, self.sums - self.sums[:, :1], self.counts)


def sequence_sums(values: torch.Tensor, group=None, names=("",)) -> pd.DataFrame:
    """Sums of values (sequence, position), NaN left out: DataFrame (name, sequence, sum, count).

    `group` (sequence, position) numbers each place's name among `names`; equal names are one group.
    """
    labels, merged = np.unique(np.asarray(names), return_inverse=True)
    if group is None:
        group = torch.zeros(values.shape, dtype=torch.int64)
    group = torch.as_tensor(merged)[group]
    zeros = torch.zeros(len(values), len(labels), dtype=torch.float64)
    sums = zeros.scatter_add(1, group, values.nan_to_num(0.0).double())
    counts = zeros.scatter_add(1, group, (~values.isnan()).double())
    index = pd.MultiIndex.from_product([range(len(values)), labels], names=["sequence", "name"])
    columns = {"sum": sums.flatten(), "count": counts.flatten().long()}
    table = pd.DataFrame(columns, index).reset_index()
    seen = table.groupby("name")["count"].transform("sum") > 0
    return table[seen][["name", "sequence", "sum", "count"]]


def curves(table: pd.DataFrame, by, tokens_per_step: int) -> dict:
    """{value of the column or columns `by`: its `Curve`}, of a sweep over `sequence_sums`."""
    found = {}
    for name, rows in table.groupby(by, sort=False):
        sums = rows.pivot(index="sequence", columns="step", values="sum")
        counts = rows.pivot(index="sequence", columns="step", values="count")
        tokens = sums.columns.to_numpy() * tokens_per_step
        found[name] = Curve(tokens, sums.to_numpy(), counts.to_numpy())
    return found


def tidy(found: dict, names: list) -> pd.DataFrame:
    """Tables of curves {key: Curve} as one, with columns `names` for the parts of the keys."""
    tables = {key: curve.table() for key, curve in found.items()}
    return pd.concat(tables, names=names).reset_index(level=names).reset_index(drop=True)


def ended(curve: Curve, share: float = 0.05) -> bool:
    """Whether the last quarter of the tokens brought at most `share` of a curve's whole change."""
    values = curve.values
    late = values[-1] - np.interp(0.75 * curve.tokens[-1], curve.tokens, values)
    return bool(abs(late) <= share * abs(values[-1] - values[0]))


def half_way(curve: Curve, whole: float | None = None) -> tuple:
    """(tokens, low, high) after which `curve` first passes half of `whole`, its last value if None.

    Linear in log tokens (0 counts as 1); NaN if it never does. 95 % by bootstrap.
    """
    return _resampled(lambda values: _half_way(curve.tokens, values, whole), curve)


def doublings_later(first: Curve, second: Curve, whole: float | None = None) -> tuple:
    """(log2 of the second's half-way tokens over the first's, low, high), 95 % by bootstrap."""

    def later(one, other):
        halves = [_half_way(c.tokens, v, whole) for c, v in ((first, one), (second, other))]
        return np.log2(halves[1] / halves[0])

    return _resampled(later, first, second)


def successive(found: dict, whole: float) -> dict:
    """{(one, next): `widest` `doublings_later`} of curves {name: Curve} that reach half of `whole`.

    Each is compared with the one that comes next in the order given, among those that reach it.
    """
    reached = [name for name, curve in found.items() if np.isfinite(half_way(curve, whole)).all()]
    later = partial(doublings_later, whole=whole)
    return {(a, b): widest(later, found[a], found[b]) for a, b in zip(reached, reached[1:])}


def widest(measure, *found: Curve) -> tuple:
    """(value, low, high) of measure(*curves), with the widest ends of all and half the checkpoints.

    Every other one is taken from the first and from the last on; the last is always there.
    """
    last = len(found[0].tokens) - 1
    intervals = [measure(*found)]
    for chosen in (np.union1d(np.arange(0, last, 2), last), np.arange(last % 2, last + 1, 2)):
        intervals.append(measure(*[curve.at(chosen) for curve in found]))
    value, low, high = zip(*intervals)
    return value[0], min(low), max(high)


def _half_way(tokens, values, whole=None):
    """Tokens (...,) after which values (..., checkpoint) are half-way to `whole` or the last."""
    x = np.log(np.maximum(tokens, 1.0))
    end = values[..., -1:] if whole is None else np.full_like(values[..., -1:], whole)
    over = values / np.where(end > 0, end, np.nan) - 0.5
    after = np.maximum((over >= 0).argmax(-1), 1)[..., None]
    left = np.take_along_axis(over, after - 1, -1)
    right = np.take_along_axis(over, after, -1)
    share = np.clip(-left / np.where(right > left, right - left, 1), 0, 1)
    found = np.exp(x[after - 1] + share * (x[after] - x[after - 1]))[..., 0]
    return np.where((over >= 0).any(-1), found, np.nan)


def _resampled(statistic, *found: Curve) -> tuple:
    """Bootstrap over sequences of a statistic of each curve's points (draws, checkpoint)."""
    shapes = [curve.sums.shape for curve in found]
    if len(set(shapes)) > 1:
        raise ValueError(f"curves: (sequences, checkpoints) are {shapes}; give curves of the same")
    parts = [part for curve in found for part in (curve.sums, curve.counts)]
    count, points = len(parts[0]), len(found[0].tokens)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_DRAWS)
    weights = np.concatenate([np.ones((1, count)), drawn])  # the first: every sequence once
    totals = (weights @ np.concatenate(parts, 1)).reshape(len(weights), len(found), 2, points)
    values = statistic(*np.moveaxis(totals[:, :, 0] / totals[:, :, 1], 1, 0))
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return float(values[0]), float(low), float(high)
