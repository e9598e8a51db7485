"""The release's measurement of the Hydra effect, kept under its own name: a logit lens without the final norm.

What it does not measure is compensation: see `as_released`. The field's definitions are in hydra.py.
"""

import pandas as pd
import torch
from nnsight import NNsight

from latentree.evidence.intervals import ratio
from latentree.inside.names import Internals, weight


@torch.no_grad()
def as_released(model, tokens, furthest: int = 2):
    """The release's measurement: clean (layer, batch) and ablated (m, layer, batch) logits, m = 1 .. `furthest`.

    The logit of the CURRENT token at the last position of `tokens` (batch, position), by unembedding the stream after each
    block without the final norm; ablated: when the whole stream after the block m layers before is set to 0. Not a number
    where there is no such block. In a model without biases a block maps 0 to 0, so nothing of this can show compensation.
    """
    traced = NNsight(model)
    inside = Internals(model, traced)
    row = weight(model.lm_head)[tokens[:, -1]]

    def logits(erased=-1):
        with traced.trace(input_ids=tokens, use_cache=False, logits_to_keep=1):
            streams = []
            for layer in range(inside.layers):
                if layer == erased:
                    inside.blocks[layer].output = torch.zeros_like(inside.blocks[layer].output)
                streams.append(inside.blocks[layer].output[:, -1])
            streams.save()
        return (torch.stack(streams) * row).sum(-1)

    clean = logits()
    ablated = torch.full((furthest, *clean.shape), torch.nan, device=clean.device)
    for erased in range(inside.layers - 1):
        found = logits(erased)
        for m in range(1, min(furthest, inside.layers - 1 - erased) + 1):
            ablated[m - 1, erased + m] = found[erased + m]
    return clean, ablated


def measure_as_released(model, tokens, furthest: int = 2) -> pd.DataFrame:
    """`as_released` as a table for sweep(): m, layer, and means over the batch of clean and ablated, with 95 % of clean."""
    clean, ablated = as_released(model, tokens.to(model.device), furthest)
    middle, low, high = ratio(clean.T.cpu().double(), torch.ones_like(clean.T.cpu()).double())
    rows = [
        (
            m + 1,
            layer,
            float(middle[layer]),
            float(low[layer]),
            float(high[layer]),
            float(ablated[m, layer].mean()),
        )
        for m in range(furthest)
        for layer in range(m + 1, len(clean))
    ]
    return pd.DataFrame(rows, columns=["m", "layer", "clean", "low", "high", "ablated"])
