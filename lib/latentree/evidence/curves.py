"""Curves along training whose points are means over sequences; when one is half-way.

A curve keeps each sequence's part of each point, a ratio of sums, so that all that is computed from
it has an interval over sequences, which are drawn for all curves together.
"""

from dataclasses import dataclass

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

    def at(self, checkpoints) -> "Curve":
        """The curve of some checkpoints (numbers, a mask or a slice)."""
        sums, counts = self.sums[:, checkpoints], self.counts[:, checkpoints]
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
        wide = rows.pivot(index="sequence", columns="step", values=["sum", "count"])
        tokens = wide["sum"].columns.to_numpy() * tokens_per_step
        found[name] = Curve(tokens, wide["sum"].to_numpy(), wide["count"].to_numpy())
    return found


def tidy(found: dict, names: list) -> pd.DataFrame:
    """Tables of curves {key: Curve} as one, with columns `names` for the parts of the keys."""
    tables = {key: curve.table() for key, curve in found.items()}
    return pd.concat(tables, names=names).reset_index(level=names).reset_index(drop=True)


def ended(curve: Curve) -> bool:
    """Whether the last quarter of the tokens brought at most 5 % of a curve's whole change."""
    values = curve.values
    late = values[-1] - np.interp(0.75 * curve.tokens[-1], curve.tokens, values)
    return bool(abs(late) <= 0.05 * abs(values[-1] - values[0]))


def half_way(curve: Curve, whole: float | None = None) -> tuple:
    """(tokens, low, high) after which `curve` first passes half of `whole`, its last value if None.

    Linear in log tokens (0 counts as 1); NaN if it never does. 95 % by bootstrap over sequences.
    """
    return _interval(_half_ways([curve], whole)[0])


def doublings_later(first: Curve, second: Curve, whole: float | None = None) -> tuple:
    """(log2 of the second's half-way tokens over the first's, low, high), 95 % by bootstrap.

    The ends are the widest of three: of all checkpoints, and of every other one, from the first and
    from the last on (the last is always there). ValueError for curves of other sizes.
    """
    last, intervals = len(first.tokens) - 1, []
    halves = np.union1d(np.arange(0, last, 2), last), np.arange(last % 2, last + 1, 2)
    for chosen in (slice(None), *halves):
        one, other = _half_ways([first.at(chosen), second.at(chosen)], whole)
        intervals.append(_interval(np.log2(other / one)))
    value, low, high = zip(*intervals)
    return value[0], min(low), max(high)


def successive(found: dict, whole: float) -> dict:
    """{(one, next): `doublings_later`} of curves {name: Curve} that reach half of `whole`.

    Each is compared with the one that comes next in the order given, among those that reach it.
    """
    reached = [name for name, curve in found.items() if np.isfinite(half_way(curve, whole)).all()]
    pairs = zip(reached, reached[1:])
    return {(a, b): doublings_later(found[a], found[b], whole) for a, b in pairs}


def _half_ways(found: list, whole) -> list:
    """Tokens (1 + draws,) after which each curve is half-way, of all sequences, then of draws."""
    shapes = [curve.sums.shape for curve in found]
    if len(set(shapes)) > 1:
        raise ValueError(f"curves: (sequences, checkpoints) are {shapes}; give curves of the same")
    count = shapes[0][0]
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_DRAWS)
    weights = np.concatenate([np.ones((1, count)), drawn])  # the first: every sequence once
    values = [(weights @ curve.sums) / (weights @ curve.counts) for curve in found]
    return [_half_way(curve.tokens, points, whole) for curve, points in zip(found, values)]


def _half_way(tokens, values, whole):
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


def _interval(values) -> tuple:
    """The first of values, and the 95 % interval of the others."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return float(values[0]), float(low), float(high)
