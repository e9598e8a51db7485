"""Choosing heads without flattering them, intervals over sequences, and the step from which on something is there.

A score is a ratio: what is summed within each sequence, over what is counted there.
"""

import numpy as np
import pandas as pd
import torch

from latentree.evidence.intervals import ratio


def choose_and_score(sums, counts):
    """The best head, chosen on one half of the sequences and scored on the other, both ways together.

    `sums` (sequence, head), `counts` (sequence,). Returns (value, low, high) as `ratio` over all sequences, and the heads
    (2,) chosen by the odd and the even ones. The maximum over heads does not bias the value, for no sequence chooses the
    head that it scores; the interval takes the choice as given.
    """
    half = torch.arange(len(sums), device=sums.device) % 2
    chosen = torch.stack([best_head(sums[half != h], counts[half != h]) for h in (0, 1)])
    return *ratio(sums.gather(1, chosen[half][:, None])[:, 0], counts), chosen


def best_head(sums, counts):
    """The head with the largest score over all these sequences: sums (sequence, head), counts (sequence,)."""
    return (sums.sum(0) / counts.sum()).nan_to_num(-torch.inf).argmax()


def control_heads(chosen, heads: int, seed: int = 0) -> list[tuple[int, int]]:
    """As many heads as `chosen` [(layer, head), ...], drawn with `seed` from the other heads of the same layers.

    `heads` is the number of heads in a layer. ValueError if a layer has too few others.
    """
    generator, drawn = np.random.default_rng(seed), []
    for layer in sorted({layer for layer, _ in chosen}):
        others = [head for head in range(heads) if (layer, head) not in chosen]
        needed = heads - len(others)
        if needed > len(others):
            raise ValueError(
                f"chosen: has {needed} of the {heads} heads of layer {layer}; choose at most half of them"
            )
        drawn += [
            (layer, int(head)) for head in sorted(generator.choice(others, needed, replace=False))
        ]
    return drawn


def emergence_step(curve: pd.DataFrame, null, margin: float) -> int | None:
    """The first step from which on the interval's lower end stays above null + margin; None if it never does.

    `curve` has one row a step, with columns step and low; `null` is a number, or the name of a column (`chance`).
    ValueError for several rows of one step.
    """
    if curve["step"].duplicated().any():
        raise ValueError(
            f"curve: has {len(curve)} rows for {curve['step'].nunique()} steps; choose one curve of the table"
        )
    curve = curve.sort_values("step")
    clear = (curve["low"] > (curve[null] if isinstance(null, str) else null) + margin).to_numpy()
    stays = np.logical_and.accumulate(clear[::-1])[::-1]
    return int(curve["step"].iloc[stays.argmax()]) if stays.any() else None
