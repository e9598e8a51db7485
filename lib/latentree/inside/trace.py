"""One verb to read and to change a run of a model: `run`.

Points of a run, by what is written there (names.py finds the modules of each architecture):

    stream     (layers + 1, batch, position, width)       before each block, and after the last
    q, k, v    (layer, batch, position, head, head_dim)   queries, keys, values, before any norm of
               theirs and the rotary positions; not where one matrix projects all three
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

_BY_HEAD = {"q", "k", "v", "z"}
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
    sites = _sites(inside)
    by_layer = dict.fromkeys(point for point, *_ in sites)
    known = (*by_layer, *_ONCE)
    for point in read:
        if point not in known:
            raise ValueError(f"read = {point!r}: is no point of a run; use {', '.join(known)}")
    for place in change:
        if place not in [site[:2] for site in sites]:
            raise ValueError(
                f"change = {place}: give one of {', '.join(by_layer)} and a layer from 0 to "
                f"{inside.layers - 1} (stream: to {inside.layers})"
            )
    if "logits" not in read:
        inputs = {"logits_to_keep": 1} | inputs
    inputs = {"use_cache": "cache" in read} | inputs
    shape = (-1, inside.head_dim)
    found = {point: [] for point in read if point in by_layer}
    with traced.trace(input_ids=tokens.to(model.device), **inputs):
        for point, layer, module, side in sites:
            if (point, layer) in change:
                written = getattr(module, side).clone()
                if point in _BY_HEAD:
                    written = change[point, layer](written.unflatten(-1, shape)).flatten(-2)
                else:
                    written = change[point, layer](written)
                setattr(module, side, written)
            if point in found:
                found[point].append(getattr(module, side))
        if "normed" in read:
            found["normed"] = inside.final_norm.output
        if "logits" in read:
            found["logits"] = traced.output.logits
        if "cache" in read:
            found["cache"] = traced.output.past_key_values
        found.save()
    for point in found.keys() - set(_ONCE):
        found[point] = torch.stack(found[point])
        if point in _BY_HEAD:
            found[point] = found[point].unflatten(-1, shape)
    return found


def _sites(inside: Internals) -> list:
    """(point, layer, module, its input or output), in the order in which a run reaches them."""
    sites = []
    for layer in range(inside.layers):
        projectors = inside.projectors(layer).items()
        sites += [
            ("stream", layer, inside.blocks[layer], "input"),
            *((point, layer, module, "output") for point, module in projectors),
            ("z", layer, inside.o_proj(layer), "input"),
            ("attention", layer, inside.attention_written(layer), "output"),
            ("mlp", layer, inside.mlp_written(layer), "output"),
        ]
    return [*sites, ("stream", inside.layers, inside.final_norm, "input")]
