"""How far a model of filtered trees has come: its distance to each exact rung, and level by level.

A **rung** is the exact law of the next symbol under one filter. The lowest (filter = depth) knows
what the root says of each place; each further one reads subtrees twice as large. Below all of them
stands who knows nothing: every symbol alike.
"""

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import one_hot

from latentree.data.filtered import FilteredTree
from latentree.evidence.curves import sequence_sums
from latentree.exact.filtered import next_symbol_laws
from latentree.inside.attention import patterns
from latentree.train.model import log_probabilities


def ladder(process: FilteredTree, leaves: torch.Tensor) -> dict:
    """{rung: law (sequence, leaf, symbol)} of the next symbol: "nothing", "filter 4", ... to 0."""
    filters = range(process.depth, -1, -1)
    laws = {f"filter {k}": next_symbol_laws(process, leaves, k) for k in filters}
    return {"nothing": torch.full_like(laws["filter 0"], 1 / process.symbols)} | laws


def level_names(laws: dict) -> list:
    """The levels, each a step of the ladder from one rung to the next, by what it reads."""
    return ["places", *[f"{2**height} leaves" for height in range(1, len(laws) - 1)]]


def distance(log_p: torch.Tensor, law: torch.Tensor) -> torch.Tensor:
    """KL divergence (sequence, leaf), nats, of predictions (sequence, leaf, symbol) from a rung."""
    return (torch.special.xlogy(law, law) - law * log_p).sum(-1)


def climb(log_p: torch.Tensor, laws: dict) -> pd.DataFrame:
    """DataFrame (quantity, name, sequence, sum, count) of predictions log_p, as `curves` takes it.

    quantity "distance": KL to each rung. quantity "share", of each level, the step from a rung p to
    the next one p': sum over symbols of (p' - p) log q, over the same with the highest rung for q.
    Who predicts all symbols alike has 0 of every level, the highest rung 1; who takes all levels at
    one pace, with log q everywhere a times that of the highest rung, has a of each, exactly.
    """
    log_p, tables, rungs = log_p.double(), [], list(laws.values())
    for name, law in laws.items():
        tables.append(sequence_sums(distance(log_p, law)).assign(quantity="distance", name=name))
    for name, law, above in zip(level_names(laws), rungs, rungs[1:]):
        gain, whole = (((above - law) * log_q).sum((1, 2)) for log_q in (log_p, rungs[-1].log()))
        columns = {"sequence": np.arange(len(gain)), "sum": gain, "count": whole}
        tables.append(pd.DataFrame(columns).assign(quantity="share", name=name))
    return pd.concat(tables)[["quantity", "name", "sequence", "sum", "count"]]


def climbed(model, tokens: torch.Tensor, laws: dict) -> pd.DataFrame:
    """`climb` of a model on tokens (sequence, 1 + leaf), whose first one marks the beginning."""
    symbols = laws["nothing"].shape[-1]
    return climb(log_probabilities(model, tokens)[:, :-1, :symbols], laws)


def tops(process: FilteredTree, rows: dict, height: int) -> tuple:
    """Tops of subtrees of a height (sequence, position), and where these end (bool).

    `rows` are windows of whole trees. After the last leaf nothing is predicted: it is left out.
    """
    place = rows["position"]
    ends = (place % 2**height == 0) & (place > 0) & (place < 2**process.depth)
    return rows[f"level{process.depth - height}"], ends


def without_model(process: FilteredTree, rows: dict, height: int) -> dict:
    """What stands at the end of a subtree without a model: {name: (sequence, position, width)}.

    One-hot, each beside the place: the place alone, the last symbol, all symbols of the subtree,
    and all its pairs of sisters, each pair as one.
    """
    tokens, size = rows["tokens"], process.vocabulary_size
    place, symbol = one_hot(rows["position"]).float(), one_hot(tokens, size).float()
    pair = one_hot(tokens * size + tokens.roll(1, 1), size**2).float()
    symbols = [symbol.roll(back, 1) for back in range(2**height)]
    pairs = [pair.roll(2 * back, 1) for back in range(2 ** (height - 1))]
    known = {"place": [], "last symbol": [symbol], "its symbols": symbols, "its pairs": pairs}
    return {name: torch.cat([place, *parts], -1) for name, parts in known.items()}


def attention_by_distance(model, tokens: torch.Tensor) -> pd.DataFrame:
    """Attention from leaves to earlier leaves, over even attention: (block, distance, value).

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
        over_even = (paid[:, 1:, 1:] * keys).sum(2)[:, queries].mean(1) / even
        found += [(block, distance, value) for block, value in enumerate(over_even.tolist(), 1)]
    return pd.DataFrame(found, columns=["block", "distance", "value"])
