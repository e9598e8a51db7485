"""One verb to read and to change a run of a model: `run`.

Points of a run, by what is written there (names.py finds the modules of each architecture):

    stream     (layers + 1, batch, position, width)       before each block, and after the last
    z          (layer, batch, position, head, head_dim)   each head's mix of values
    attention  (layer, batch, position, width)            what the attention adds to the stream
    mlp        (layer, batch, position, width)            what the MLP adds to the stream
    normed     (batch, position, width)                   the stream after the final norm
    logits     (batch, position, vocabulary)
    cache      keys and values, as transformers keeps them
"""

import torch
from nnsight import NNsight

from latentree.inside.names import Internals

_BY_LAYER = ("stream", "z", "attention", "mlp")
_ONCE = ("normed", "logits", "cache")


@torch.no_grad()
def run(model, tokens, read=(), change=None, **inputs) -> dict:
    """What a run on tokens (batch, position) writes at the points `read`: {point: tensor}.

    `change` {(point, layer): function} puts function(tensor) in the place of what is written at a
    point of one layer; the function gets a copy. ("stream", layers) is the stream after the last
    block. `inputs` go to the model as they are (attention_mask, past_key_values, ...).
    Raises ValueError for an unknown point, or a layer that the model does not have.
    """
    change = change or {}
    traced = NNsight(model)
    inside = Internals(model, traced)
    _check_points(inside, read, change)
    if "logits" not in read:
        inputs = {"logits_to_keep": 1} | inputs
    inputs = {"use_cache": "cache" in read} | inputs
    shape = (inside.heads, inside.head_dim)
    found = {point: [] for point in read if point in _BY_LAYER}
    with traced.trace(input_ids=tokens.to(model.device), **inputs):
        for point, layer, module, side in _sites(inside):
            if (point, layer) in change:
                written = getattr(module, side).clone()
                if point == "z":
                    written = change[point, layer](written.unflatten(-1, shape)).flatten(-2)
                else:
                    written = change[point, layer](written)
                setattr(module, side, written)
            if point in found:
                found[point].append(getattr(module, side))
        found.save()
        once = {}
        if "normed" in read:
            once["normed"] = inside.final_norm.output
        if "logits" in read:
            once["logits"] = traced.output.logits
        if "cache" in read:
            once["cache"] = traced.output.past_key_values
        once.save()
    found = {point: torch.stack(written) for point, written in found.items()}
    if "z" in found:
        found["z"] = found["z"].unflatten(-1, shape)
    return found | once


def _sites(inside: Internals) -> list:
    """(point, layer, module, its input or output), in the order in which a run reaches them."""
    sites = []
    for layer in range(inside.layers):
        sites += [
            ("stream", layer, inside.blocks[layer], "input"),
            ("z", layer, inside.o_proj(layer), "input"),
            ("attention", layer, inside.attention_written(layer), "output"),
            ("mlp", layer, inside.mlp_written(layer), "output"),
        ]
    return [*sites, ("stream", inside.layers, inside.final_norm, "input")]


def _check_points(inside: Internals, read, change) -> None:
    known = (*_BY_LAYER, *_ONCE)
    for point in read:
        if point not in known:
            raise ValueError(f"read = {point!r}: is no point of a run; use {', '.join(known)}")
    for point, layer in change:
        last = inside.layers if point == "stream" else inside.layers - 1
        if point not in _BY_LAYER or not 0 <= layer <= last:
            raise ValueError(
                f"change = {(point, layer)}: give one of {', '.join(_BY_LAYER)} and a layer from "
                f"0 to {last}"
            )
