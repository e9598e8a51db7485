"""One verb to read and to change a run of a model: `run`.

Points of a run, by what is written there (names.py finds the modules of each architecture):

    stream     (layers + 1, batch, position, width)       before each block, and after the last
    z          (layer, batch, position, head, head_dim)   each head's mix of values, where heads are apart
    attention  (layer, batch, position, width)            what the attention adds to the stream
    mlp        (layer, batch, position, width)            what the MLP adds to the stream
    normed     (batch, position, width)                   the stream after the final norm
    logits     (batch, position, vocabulary)
    cache      keys and values, as transformers keeps them
"""

import torch
from nnsight import NNsight

from latentree.inside.attention import attention
from latentree.inside.names import Internals, readable_attention
from latentree.train.model import next_token_losses

BY_LAYER = ("stream", "z", "attention", "mlp")
ONCE = ("normed", "logits", "cache")


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
    found = {point: [] for point in read if point in BY_LAYER}
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
    known = (*BY_LAYER, *ONCE)
    for point in read:
        if point not in known:
            raise ValueError(f"read = {point!r}: is no point of a run; use {', '.join(known)}")
    for point, layer in change:
        last = inside.layers if point == "stream" else inside.layers - 1
        if point not in BY_LAYER or not 0 <= layer <= last:
            raise ValueError(
                f"change = {(point, layer)}: give one of {', '.join(BY_LAYER)} and a layer from 0 to {last}"
            )


# ------------------------------------------------------------------ old verbs, until their callers have moved

WAYS = ("mean", "resample", "pattern")


def head_outputs(model, tokens) -> torch.Tensor:
    """Every head's mix of values, z (layer, batch, position, head, head_dim), for tokens (batch, position)."""
    return heads_and_logits(model, tokens)[0]


@torch.no_grad()
def heads_and_logits(model, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """`head_outputs` and the logits (batch, position, vocabulary) of one run."""
    traced = NNsight(model)
    inside = Internals(model, traced)
    with traced.trace(input_ids=tokens, use_cache=False):
        mixes = [inside.o_proj(layer).input for layer in range(inside.layers)].save()
        logits = traced.output.logits.save()
    return torch.stack(mixes).unflatten(-1, (inside.heads, inside.head_dim)), logits


@torch.no_grad()
def added_logits(model, tokens, layer: int, vectors, to: str = "attention") -> torch.Tensor:
    """Logits at the last position (batch, vocabulary) when `vectors` (batch, width) are added there.

    to: `attention`, to what the layer's attention adds to the residual stream, so that its MLP, where it comes after (not in
    GPT-NeoX), reads the sum; `stream`, to the residual stream after the whole layer. ValueError for another place, or a layer
    that the model does not have.
    """
    traced = NNsight(model)
    inside = Internals(model, traced)
    if to not in ("attention", "stream") or not 0 <= layer < inside.layers:
        raise ValueError(
            f"layer = {layer}, to = {to!r}: give a layer below {inside.layers} and 'attention' or 'stream'"
        )
    points = inside.blocks[layer] if to == "stream" else inside.attention_written(layer)
    with traced.trace(input_ids=tokens, use_cache=False):
        points.output[:, -1] += vectors
        logits = traced.output.logits[:, -1].save()
    return logits


@torch.no_grad()
def attention_patterns(model, tokens) -> torch.Tensor:
    """Every head's attention probabilities (layer, batch, head, query, key) for tokens (batch, position)."""
    with readable_attention(model):
        return torch.stack(
            model(input_ids=tokens, use_cache=False, output_attentions=True).attentions
        )


@torch.no_grad()
def replaced_logits(model, tokens, replacements, patterns=None) -> torch.Tensor:
    """Logits (batch, position, vocabulary) of a run in which chosen heads' outputs are replaced.

    `replacements` maps (layer, head) to what takes the place of its z: (batch, position, head_dim), or a shape that
    broadcasts to it. Everything downstream is computed anew, except that with `patterns` (layer, batch, head, query,
    key) every head of the later layers attends as they say: it mixes the values of this run with those probabilities.
    ValueError for a head that the model does not have.
    """
    check_heads(Internals(model), replacements)
    first = min((layer for layer, _ in replacements), default=len(Internals(model).blocks))

    def putting(heads):
        def put(z):
            for head, replacement in heads.items():
                z[:, :, head] = replacement
            return z

        return put

    by_layer = {}
    for (layer, head), replacement in replacements.items():
        by_layer.setdefault(layer, {})[head] = replacement
    change = {("z", layer): putting(heads) for layer, heads in by_layer.items()}
    if patterns is None:
        return run(model, tokens, read=("logits",), change=change)["logits"]
    with attention(model, lambda layer, p: patterns[layer] if layer > first else None):
        return run(model, tokens, read=("logits",), change=change)["logits"]


def ablated_losses(model, tokens, heads, how, reference=None, seed=0, rows=32) -> torch.Tensor:
    """Losses in nats of predicting each next token, (batch, position - 1), with `heads` [(layer, head), ...] ablated.

    - mean: a head's z is replaced by its mean over all sequences and positions of `reference` (batch, position), which
      is `tokens` unless given. Later heads attend to what they then see.
    - resample: by its z for another sequence of `tokens` at the same position, drawn with `seed`; no sequence keeps its
      own. Later heads attend to what they then see.
    - pattern: as mean, while all heads of later layers keep the attention probabilities of the clean run (Olsson et al.
      2022, pattern-preserving ablation): the loss changes by what the heads move, not by where others then look.

    `tokens` (batch, position) run `rows` sequences at a time. With no heads, these are the clean losses.
    ValueError for another way, an unknown head, or a single sequence to resample.
    """
    if how not in WAYS:
        raise ValueError(f"how = {how!r}: is no way to ablate; use one of {', '.join(WAYS)}")
    check_heads(Internals(model), heads)
    source, donor = tokens if how == "resample" or reference is None else reference, None
    if heads:
        z = torch.cat([head_outputs(model, chunk) for chunk in source.split(rows)], 1)
        if how == "resample":
            donor = another(len(tokens), seed).to(tokens.device)
        else:
            z = z.mean((1, 2), keepdim=True).expand(-1, len(tokens), -1, -1, -1)
    losses = []
    for here in torch.arange(len(tokens), device=tokens.device).split(rows):
        chunk, taken = tokens[here], here if donor is None else donor[here]
        kept = attention_patterns(model, chunk) if how == "pattern" and heads else None
        logits = replaced_logits(
            model, chunk, {(layer, h): z[layer, taken, :, h] for layer, h in heads}, kept
        )
        losses.append(next_token_losses(logits, chunk))
    return torch.cat(losses)


def another(count: int, seed: int) -> torch.Tensor:
    """For each of `count` sequences the number of another one, each used once: a random cycle through all of them.

    ValueError if there is only one.
    """
    if count < 2:
        raise ValueError(
            f"tokens: has {count} sequence, and resampling needs another one; give 2 or more"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(order).scatter(0, order, order.roll(1))


def check_heads(inside: Internals, heads) -> None:
    """Raises ValueError for a (layer, head) that the model does not have."""
    for layer, head in heads:
        if not (0 <= layer < inside.layers and 0 <= head < inside.heads):
            raise ValueError(
                f"head {(layer, head)}: is not in the model; give layers below {inside.layers} and heads below "
                f"{inside.heads}"
            )
