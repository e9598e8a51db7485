"""Curves along training whose points are means over sequences, and the training tokens after which one is half-way.

A curve keeps each sequence's part of each point, so that everything computed from it has an interval over sequences:
a mean is a ratio of sums, and two curves of the same sequences are resampled together.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from latentree.evidence.intervals import bootstrap, ratio


@dataclass
class Curve:
    """tokens (checkpoint,), seen in training; sums and counts (sequence, checkpoint): a point is a sum over the other."""

    tokens: np.ndarray
    sums: np.ndarray
    counts: np.ndarray

    def table(self) -> pd.DataFrame:
        """DataFrame (tokens, value, low, high), 95 % over sequences as `ratio`."""
        value, low, high = (
            part.numpy() for part in ratio(torch.tensor(self.sums), torch.tensor(self.counts))
        )
        return pd.DataFrame({"tokens": self.tokens, "value": value, "low": low, "high": high})

    def recovered(self, without, aware) -> "Curve":
        """Share (without - loss) / (without - aware) of this loss's sums, with those of two predictors (sequence,)."""
        gap = np.broadcast_to((without - aware)[:, None], self.sums.shape)
        return Curve(self.tokens, without[:, None] - self.sums, gap)


def sequence_sums(values: torch.Tensor, group=None, names=("",)) -> pd.DataFrame:
    """Sums of values (sequence, position) over positions, NaN left out: DataFrame (name, sequence, sum, count).

    `group` (sequence, position) numbers each place's name among `names`; equal names are one group.
    """
    labels, merged = np.unique(np.asarray(names), return_inverse=True)
    group = (
        torch.zeros(values.shape, dtype=torch.int64)
        if group is None
        else torch.as_tensor(merged)[group]
    )
    sums, counts = (
        torch.zeros(len(values), len(labels), dtype=torch.float64).scatter_add(
            1, group, part.double()
        )
        for part in (values.nan_to_num(0.0), ~values.isnan())
    )
    index = pd.MultiIndex.from_product([range(len(values)), labels], names=["sequence", "name"])
    table = pd.DataFrame(
        {"sum": sums.flatten(), "count": counts.flatten().long()}, index
    ).reset_index()
    there = table.groupby("name")["count"].transform("sum") > 0
    return table[there][["name", "sequence", "sum", "count"]]


def curves(table: pd.DataFrame, by, tokens_per_step: int) -> dict:
    """A `Curve` for each value of the column (or columns) `by` of a sweep over `sequence_sums`."""
    found = {}
    for name, rows in table.groupby(by, sort=False):
        sums, counts = (
            rows.pivot(index="sequence", columns="step", values=part) for part in ("sum", "count")
        )
        found[name] = Curve(
            sums.columns.to_numpy() * tokens_per_step, sums.to_numpy(), counts.to_numpy()
        )
    return found


def half_way(tokens, values, base=0.0) -> np.ndarray:
    """Training tokens after which values (..., checkpoint) first pass the middle between `base` and their last.

    Linear in log tokens (0 counts as 1). NaN where the last value is not above `base` (...,).
    """
    x = np.log(np.maximum(np.asarray(tokens, float), 1))
    values = np.asarray(values, float)
    if not 2 <= len(x) == values.shape[-1]:
        raise ValueError(
            f"values: {values.shape[-1]} for {len(x)} counts of tokens; give one for each, and 2 or more"
        )
    rise = values - np.asarray(base, float)[..., None]
    over = rise / np.where(rise[..., -1:] > 0, rise[..., -1:], np.nan) - 0.5
    after = np.maximum((over >= 0).argmax(-1), 1)[..., None]
    left, right = (np.take_along_axis(over, after - back, -1)[..., 0] for back in (1, 0))
    share = np.clip(-left / np.where(right > left, right - left, 1), 0, 1)
    found = np.exp(x[after[..., 0] - 1] + share * (x[after] - x[after - 1])[..., 0])
    return np.where(np.isnan(over[..., -1]), np.nan, found)


def half_way_of(curve: Curve, rise=False) -> tuple:
    """(tokens, low, high) after which `curve` is half-way, 95 % by bootstrap over sequences; `rise`: from its first point."""
    return bootstrap(_stacked(curve), lambda drawn: _half_ways(drawn, curve.tokens, (rise,))[0])


def doublings_later(first: Curve, second: Curve, rises=(False, False)) -> tuple:
    """(log2 of the second's half-way tokens over the first's, low, high): by how many doublings it is later.

    95 % by bootstrap over sequences, resampled together; both curves are of the same sequences and checkpoints.
    """
    if first.sums.shape != second.sums.shape:
        raise ValueError(
            f"curves: of {first.sums.shape} and {second.sums.shape} (sequences, checkpoints); give two of the same"
        )

    def later(drawn):
        a, b = _half_ways(drawn, first.tokens, rises)
        return np.log2(b / a)

    return bootstrap(np.concatenate([_stacked(first), _stacked(second)], 1), later)


def widest(measure, *found: Curve) -> tuple:
    """(value, low, high) of measure(*curves), with the widest ends of all checkpoints and of every other one to the last."""

    def thinned(curve, start):
        kept = (
            np.arange(len(curve.tokens))[::-1][::2][::-1]
            if start
            else np.unique([*range(len(curve.tokens))[::2], len(curve.tokens) - 1])
        )
        return Curve(curve.tokens[kept], curve.sums[:, kept], curve.counts[:, kept])

    value, *ends = measure(*found)
    more = [measure(*(thinned(curve, start) for curve in found)) for start in (0, 1)]
    return (
        value,
        min(ends[0], *(low for _, low, _ in more)),
        max(ends[1], *(high for _, _, high in more)),
    )


def _stacked(curve):
    return np.stack([curve.sums, curve.counts], 1)  # (sequence, 2, checkpoint)


def _half_ways(drawn, tokens, rises):
    """Half-way tokens (draws,) of each curve in drawn (draws, sequence, 2 curves, checkpoint)."""
    means = drawn.mean(1)
    values = [means[:, 2 * i] / means[:, 2 * i + 1] for i in range(len(rises))]
    return [
        half_way(tokens, value, value[:, 0] if rise else 0.0) for value, rise in zip(values, rises)
    ]
