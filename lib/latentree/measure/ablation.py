"""What the loss rises by when heads are switched off, and which heads to compare them with."""

from contextlib import nullcontext
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import torch

from latentree.evidence.intervals import ratio
from latentree.inside.attention import attention, patterns
from latentree.inside.trace import run
from latentree.train.model import next_token_losses

_WAYS = ("mean", "resample", "pattern")


@torch.no_grad()
def ablated_losses(model, tokens, heads, how, seed=0, rows=32, z=None) -> torch.Tensor:
    """Losses in nats of predicting each next token, (batch, position - 1), without `heads`.

    `heads` [(layer, head), ...] are ablated together in tokens (batch, position), `rows` sequences
    at a time; with none of them, these are the clean losses. `z`, if it is known, is what
    `clean_z` gives. `how`:

    - mean: a head's mix of values z is replaced by its mean over all sequences and positions.
    - resample: by its z for another sequence at the same position, drawn with `seed`.
    - pattern: as mean, while all heads keep the attention of the clean run (Olsson et al. 2022,
      pattern-preserving ablation): what the heads move counts, not where others then look.

    ValueError for another way, or a single sequence to resample.
    """
    if how not in _WAYS:
        raise ValueError(f"how = {how!r}: is no way to ablate; use one of {', '.join(_WAYS)}")
    tokens = tokens.to(model.device)
    z = clean_z(model, tokens, rows) if z is None else z
    if how == "resample":
        instead = z[:, _another(len(tokens), seed)]
    else:
        instead = z.mean((1, 2), keepdim=True).expand_as(z)
    by_layer, losses = {}, []
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)

    def replace(z, own, new):
        z[:, :, own] = new[:, :, own]
        return z

    for here in torch.arange(len(tokens)).split(rows):
        chunk, change, opened = tokens[here], {}, nullcontext()
        for layer, own in by_layer.items():
            change["z", layer] = partial(replace, own=own, new=instead[layer, here])
        if how == "pattern":
            clean = patterns(model, chunk)
            opened = attention(model, lambda layer, probabilities: clean[layer].to(probabilities))
        with opened:
            logits = run(model, chunk, ["logits"], change)["logits"]
        losses.append(next_token_losses(logits, chunk).cpu())
    return torch.cat(losses)


def clean_z(model, tokens, rows=32) -> torch.Tensor:
    """Mixes of values of all heads, (layer, batch, position, head, head_dim)."""
    return torch.cat([run(model, chunk, read=["z"])["z"] for chunk in tokens.split(rows)], 1)


def each_head(model, tokens, where: dict) -> pd.DataFrame:
    """What the loss rises by without each head, one at a time, its z replaced by its mean.

    `where` {name: (batch, position - 1), booleans} says at which predictions. Columns layer, head,
    where, value, low, high: nats a token, 95 % over sequences.
    """
    z = clean_z(model, tokens.to(model.device))
    clean, found = ablated_losses(model, tokens, [], "mean", z=z), []
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    for layer, head in product(range(layers), range(heads)):
        rise = ablated_losses(model, tokens, [(layer, head)], "mean", z=z) - clean
        for name, here in where.items():
            interval = ratio((rise * here).sum(1), here.sum(1))
            found.append([layer, head, name, *map(float, interval)])
    return pd.DataFrame(found, columns=["layer", "head", "where", "value", "low", "high"])


def control_heads(chosen, heads: int, seed: int = 0) -> list[tuple[int, int]]:
    """As many heads as `chosen` [(layer, head), ...], drawn from the others of the same layers.

    `heads` is the number of heads in a layer. Raises ValueError if a layer has too few others.
    """
    generator, drawn = np.random.default_rng(seed), []
    for layer in sorted({layer for layer, _ in chosen}):
        others = [head for head in range(heads) if (layer, head) not in chosen]
        needed = heads - len(others)
        if needed > len(others):
            has = f"{needed} of the {heads} heads of layer {layer}"
            raise ValueError(f"chosen: has {has}; choose at most half")
        others = sorted(generator.choice(others, needed, replace=False))
        drawn += [(layer, int(head)) for head in others]
    return drawn


def _another(count: int, seed: int) -> torch.Tensor:
    """For each of `count` sequences another one, each used once: a random cycle through all."""
    if count < 2:
        raise ValueError(f"tokens: has {count} sequence; give 2 or more, to resample from another")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(order).scatter(0, order, order.roll(1))
