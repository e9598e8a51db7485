"""How far a model of filtered trees has come: its distance to each exact rung, and level by level.

A **rung** is the exact law of the next symbol under one filter. The lowest (filter = depth) knows
what the root says of each place; each further one reads subtrees twice as large. Below all of them
stands who knows nothing: every symbol alike.
"""

import numpy as np
import pandas as pd
import torch

from latentree.data.filtered import FilteredTree
from latentree.evidence.curves import sequence_sums
from latentree.exact.filtered import next_symbol_laws
from latentree.inside.attention import patterns
from latentree.train.model import log_probabilities


def ladder(process: FilteredTree, leaves: torch.Tensor) -> torch.Tensor:
    """Laws (rung, sequence, leaf, symbol) of the next symbol: all alike, filter = depth, ..., 0."""
    laws = [next_symbol_laws(process, leaves, k) for k in range(process.depth, -1, -1)]
    return torch.stack([torch.full_like(laws[0], 1 / process.symbols), *laws])


def distances(log_p: torch.Tensor, laws: torch.Tensor) -> torch.Tensor:
    """KL divergence (rung, sequence, leaf), nats, of predictions (sequence, leaf, symbol)."""
    return torch.special.xlogy(laws, laws).sum(-1) - (laws * log_p).sum(-1)


def level_gains(log_p: torch.Tensor, laws: torch.Tensor) -> torch.Tensor:
    """What predictions use of each level (level, sequence, leaf), nats; see `climb`.

    A level is the step from one rung p to the next, p': sum((p' - p) log q) over symbols.
    """
    return (laws.diff(dim=0) * log_p).sum(-1)


def climb(log_p: torch.Tensor, laws: torch.Tensor) -> pd.DataFrame:
    """DataFrame (quantity, name, sequence, sum, count) of predictions log_p, as `curves` takes it.

    quantity "distance": KL to each rung, by its number in `laws`. quantity "share", by the number
    of each level's upper rung: its gain over that of the highest rung. Who predicts all symbols
    alike has 0 of every level, the highest rung 1; who takes all levels at one pace, with log q
    everywhere a times that of the highest rung, has a of each, exactly.
    """
    log_p, tables = log_p.double(), []
    own, best = level_gains(log_p, laws), level_gains(laws[-1].log(), laws)
    for number, far in enumerate(distances(log_p, laws)):
        tables.append(sequence_sums(far).assign(quantity="distance", name=number))
    for number, (gain, whole) in enumerate(zip(own.sum(-1), best.sum(-1)), 1):
        columns = {"sequence": np.arange(len(gain)), "sum": gain, "count": whole}
        tables.append(pd.DataFrame(columns).assign(quantity="share", name=number))
    return pd.concat(tables)[["quantity", "name", "sequence", "sum", "count"]]


def climbed(model, tokens: torch.Tensor, laws: torch.Tensor) -> pd.DataFrame:
    """`climb` of a model on tokens (sequence, 1 + leaf), whose first one marks the beginning."""
    return climb(log_probabilities(model, tokens)[:, :-1, : laws.shape[-1]], laws)


def attention_by_distance(model, tokens: torch.Tensor) -> pd.DataFrame:
    """Attention from leaves to earlier leaves, over even attention: (layer, distance, value).

    The distance of two leaves is the height of the smallest subtree that has both. Even attention
    pays every token so far as much. Mean over heads and queries that have keys at this distance.
    """
    paid, leaves = patterns(model, tokens).mean((1, 2)), tokens.shape[1] - 1
    place = torch.arange(leaves)
    height = torch.tensor([[(q ^ k).bit_length() for k in range(leaves)] for q in range(leaves)])
    found = []
    for distance in range(1, int(height.max()) + 1):
        keys = ((height == distance) & (place < place[:, None])).float()
        queries = keys.any(1)
        even = (keys.sum(1) / (place + 2))[queries].mean()
        for layer, of_layer in enumerate(paid[:, 1:, 1:]):
            value = float((of_layer * keys).sum(1)[queries].mean() / even)
            found.append({"layer": layer, "distance": distance, "value": value})
    return pd.DataFrame(found)
