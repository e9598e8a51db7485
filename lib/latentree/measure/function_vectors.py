"""Is what a context says of its latent a vector? Taken out of one run, added to another, and read.

A vector is taken where a run in context has read a sentence up to some state, and added at the last
position of a zero-shot prompt in the same state (prompts.py). How much closer the prediction then
comes to the latent's own is the improvement. Layer by layer: Figure 3 of Rohweder et al. (2026).
A vector is a function if it does what no output bias can: `best_bias` is the best one of each
latent. Means over many contexts, head by head: Todd et al. (2024).
"""

from functools import partial
from itertools import product

import pandas as pd
import torch

from latentree.evidence.intervals import ratio
from latentree.inside.names import Internals
from latentree.inside.trace import run
from latentree.measure.induction import choose_and_score
from latentree.measure.prompts import Contexts, Prompts, fresh_words, in_context

SAME, FRESH = "same word", "fresh word"  # of a prompt, beside the context's
DIFFERENCE, BEST = "own - another", "best layer"


def divergence(logits, prompts: Prompts) -> torch.Tensor:
    """KL in nats (prompt,) from the truth to a prediction, logits (prompt, vocabulary)."""
    surprise = -(prompts.gold * logits.double().log_softmax(-1)).sum(-1)
    return surprise + torch.special.xlogy(prompts.gold, prompts.gold).sum(-1)


def accuracy(logits, prompts: Prompts) -> torch.Tensor:
    """Whether the top word is the one most likely in truth: (prompt,) 0 or 1, float64."""
    return (logits.argmax(-1) == prompts.gold.argmax(-1)).double()


def _surprise(logits, prompts: Prompts) -> torch.Tensor:
    """Minus the log-probability, in nats (prompt,), of the word that is most likely in truth."""
    likely = prompts.gold.argmax(1, keepdim=True)
    return -logits.double().log_softmax(-1).gather(1, likely)[:, 0]


# ------------------------------------------------------------------ vectors taken and added


def _states(model, contexts: Contexts, rows: int = 64):
    """Head outputs z (layer, query, head, head_dim) and logits (query, vocabulary) at queries."""
    z, logits = [], []
    for first in range(0, len(contexts.tokens), rows):
        found = run(model, contexts.tokens[first : first + rows], ("z", "logits"))
        here = (contexts.document >= first) & (contexts.document < first + rows)
        at = (contexts.document[here] - first, contexts.position[here])
        z.append(found["z"][:, *at].cpu())
        logits.append(found["logits"][at].cpu())
    return torch.cat(z, 1), torch.cat(logits)


@torch.no_grad()
def attention_outputs(model, z) -> torch.Tensor:
    """What each layer's attention writes (layer, query, width), from z, without any bias."""
    inside, z = Internals(model), z.to(model.device)
    written = [inside.head_written(layer, mixes).sum(-2) for layer, mixes in enumerate(z)]
    return torch.stack(written).cpu()


def last_logits(model, tokens, change=None) -> torch.Tensor:
    """Logits (batch, vocabulary) after the last token of a run, with `change` (trace.run)."""
    return run(model, tokens, ["logits"], change, logits_to_keep=1)["logits"][:, -1].cpu()


def added_logits(model, tokens, layer: int, vectors, to: str = "attention") -> torch.Tensor:
    """`last_logits` when `vectors` (batch, width) are added at the last position.

    to: `attention`, to what the layer's attention adds, so that an MLP that comes after it reads
    the sum; `stream`, to the stream after the whole layer.
    """

    def add(written):
        written[:, -1] += vectors.to(written.device)
        return written

    point = ("stream", layer + 1) if to == "stream" else (to, layer)
    return last_logits(model, tokens, {point: add})


def replaced_logits(model, tokens, z, layers, heads=slice(None)) -> torch.Tensor:
    """`last_logits` when `heads` of each of `layers` write z at the last position.

    `z` (layer, batch, head, head_dim) holds all layers and heads.
    """

    def replace(written, own):
        written[:, -1, heads] = own[:, heads].to(written.device)
        return written

    change = {("z", layer): partial(replace, own=z[layer]) for layer in layers}
    return last_logits(model, tokens, change)


def _of_next_latent(contexts: Contexts, seed: int = 0) -> torch.Tensor:
    """For each query (query,) the number of a query of the next latent, drawn with `seed`."""
    latent = contexts.query_latent
    there, place = latent.unique(return_inverse=True)
    count, order = torch.bincount(place), place.argsort(stable=True)
    wanted = (place + 1) % len(there)
    drawn = torch.rand(len(latent), generator=torch.Generator().manual_seed(seed))
    return order[(count.cumsum(0) - count)[wanted] + (drawn * count[wanted]).long()]


def _random_like(vectors, seed: int = 0) -> torch.Tensor:
    """Vectors (..., width) in random directions, of the same norms."""
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed))
    return noise * vectors.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)


# ------------------------------------------------------------------ one context, layer by layer


def layerwise(model, contexts: Contexts, prompts: dict, seed=0, rows=64) -> pd.DataFrame:
    """Improvement of zero-shot prompts by a context's attention output, added layer by layer.

    `prompts` {name: one for each query of the contexts}; `rows` contexts run at a time. Columns
    prompt, vector, layer, quantity, value, low, high (95 % over latents), latents. quantity: by how
    many nats the `KL` from the truth falls, or the log-probability of the `gold word` rises.
    vector: the `own` document's, `another` one's, of the next latent, a `random` one of the same
    norm, and `own - another`. Without a layer (-1): `zero-shot` and, for SAME, `in context` are the
    distances themselves; `best layer` is own - another, each half of the latents choosing for the
    other half.
    """
    z, in_context = _states(model, contexts, rows)
    own = attention_outputs(model, z)
    another = own[:, _of_next_latent(contexts, seed)]
    sets = {"own": own, "another": another, "random": _random_like(own, seed)}
    found = {}
    for name, prompt in prompts.items():
        logits = {("zero-shot", -1): last_logits(model, prompt.tokens)}
        if name == SAME:
            logits["in context", -1] = in_context
        for vector, layer in product(sets, range(len(own))):
            added = sets[vector][layer]
            logits[vector, layer] = added_logits(model, prompt.tokens, layer, added)
        for quantity, distance in (("KL", divergence), ("gold word", _surprise)):
            off = {key: distance(predicted, prompt) for key, predicted in logits.items()}
            for (vector, layer), value in off.items():
                gain = value if layer == -1 else off["zero-shot", -1] - value
                found[name, vector, layer, quantity] = gain
            for layer in range(len(own)):
                found[name, DIFFERENCE, layer, quantity] = off["another", layer] - off["own", layer]
    return _over_latents(found, contexts.query_latent)


def _over_latents(rows: dict, latent) -> pd.DataFrame:
    """The table of `layerwise`, of {(prompt, vector, layer, quantity): values (query,)}."""
    there, place = latent.unique(return_inverse=True)
    count = torch.bincount(place).double()
    table, differences = [], {}
    for (prompt, vector, layer, quantity), values in rows.items():
        sums = torch.zeros_like(count).index_add(0, place, values.double())
        table.append((prompt, vector, layer, quantity, *map(float, ratio(sums, count))))
        if vector == DIFFERENCE:
            differences.setdefault((prompt, quantity), []).append(sums)
    for (prompt, quantity), layers in differences.items():
        best = choose_and_score(torch.stack(layers, 1), count)
        table.append((prompt, BEST, -1, quantity, *map(float, best)))
    columns = ["prompt", "vector", "layer", "quantity", "value", "low", "high"]
    return pd.DataFrame(table, columns=columns).assign(latents=len(there))


# ------------------------------------------------------------------ a function, or a bias


def best_bias(logits, prompts: Prompts) -> torch.Tensor:
    """Logits (prompt, vocabulary) plus the output bias of each latent that predicts best.

    It is fitted to the very prompts, by iterative scaling (Darroch and Ratcliff 1972): each step
    adds log(mean truth) - log(mean prediction), and brings the predictions closer to the truth.
    """
    log_p = logits.double().log_softmax(-1)
    there, place = prompts.latent.unique(return_inverse=True)
    nothing = torch.zeros(len(there), log_p.shape[1], dtype=torch.float64)
    wanted = nothing.index_add(0, place, prompts.gold).clamp(min=1e-9).log()
    for _ in range(500):
        given = nothing.index_add(0, place, log_p.exp()).clamp(min=1e-9).log()
        log_p = (log_p + (wanted - given)[place]).log_softmax(-1)
    return log_p


def mean_heads(z, contexts: Contexts, prompts: Prompts, latent=None) -> torch.Tensor:
    """For each prompt the mean head outputs of its latent: (layer, prompt, head, head_dim).

    `z` (layer, query, head, head_dim) are those of the contexts' queries; those at the prompt's own
    last word are left out. `latent` (prompt,) gives other latents. ValueError if none is left.
    """
    word = contexts.tokens[contexts.document, contexts.position]
    latent = prompts.latent if latent is None else latent
    here = (latent[:, None] == contexts.query_latent) & (prompts.tokens[:, -1:] != word)
    if not here.any(1).all():
        raise ValueError("contexts: a latent has no query at another word; give more documents")
    return torch.einsum("pq,lqhd->lphd", here / here.sum(1, keepdim=True), z)


def wrong_contexts(model, contexts: Contexts, length: int, seed: int = 0):
    """Fresh words in another latent's contexts, and the mean head outputs of their own latent.

    Returns Prompts, each after `length` tokens of a query's context and under the next latent; the
    head outputs z (layer, query, head, head_dim) of the queries; and `mean_heads` of the prompts.
    """
    under = _of_next_latent(contexts, seed)
    prompts = in_context(contexts, fresh_words(contexts, seed, under), length)
    z, _ = _states(model, contexts)
    return prompts, z, mean_heads(z, contexts, prompts)


def transplants(model, contexts: Contexts, layer: int, length: int, seed: int = 0) -> pd.DataFrame:
    """What is predicted after a fresh word in another latent's context: `transplanted` there."""
    asked, z, _ = wrong_contexts(model, contexts, length, seed)
    return transplanted(model, contexts, asked, z, layer, seed)


def transplanted(model, contexts: Contexts, asked: Prompts, z, layer: int, seed: int = 0):
    """What is predicted of prompts in another latent's context, by what is changed there.

    `z` (layer, query, head, head_dim) are the head outputs at the contexts' queries. Columns latent
    (the wanted one, whose truth counts), divergence (nats) and hit (the top word is the right one)
    for each prompt and each change: `no change`; at the last token all heads give the mean of the
    `wanted latent`, of `a third latent`, the `mean of all` queries, or that `mean and noise` as
    long as the wanted latent's difference from it; or those of `other layers` only than this one
    the wanted latent's; and the `best bias` on top of the mean of all, for that takes away what the
    wrong context says, as the wanted latent's means do.
    """
    means = mean_heads(z, contexts, asked)
    there, place = asked.latent.unique(return_inverse=True)
    every = z.mean(1, keepdim=True).expand_as(means)
    noise = _random_like((means - every).flatten(2), seed).view_as(means)
    layers = range(len(means))
    given = {
        "wanted latent": (means, layers),
        "a third latent": (mean_heads(z, contexts, asked, there[(place + 1) % len(there)]), layers),
        "mean of all": (every, layers),
        "mean and noise": (every + noise, layers),
        "other layers": (means, [at for at in layers if at != layer]),
    }
    predicted = {"no change": last_logits(model, asked.tokens)}
    for change, (written, changed) in given.items():
        predicted[change] = replaced_logits(model, asked.tokens, written, changed)
    predicted["best bias"] = best_bias(predicted["mean of all"], asked)
    tables = []
    for change, logits in predicted.items():
        scores = {"divergence": divergence(logits, asked), "hit": accuracy(logits, asked)}
        tables.append(pd.DataFrame(scores | {"latent": asked.latent}).assign(change=change))
    return pd.concat(tables, ignore_index=True)


def steering(model, contexts: Contexts, layer: int, scales, seed: int = 0) -> pd.DataFrame:
    """What share of a fresh word's zero-shot divergence goes, by the scale of the latent's vector.

    The vector is what the layer's attention writes when its heads give the latent's means, less the
    mean of all queries. Columns scale, way (added to that attention's output, `through the model`,
    or after the last layer, `directly` to the logits) and value.
    """
    asked, (z, _) = fresh_words(contexts, seed), _states(model, contexts)
    written = attention_outputs(model, mean_heads(z, contexts, asked))[layer]
    vector = written - attention_outputs(model, z)[layer].mean(0)
    before = divergence(last_logits(model, asked.tokens), asked).mean()
    ways = {"through the model": (layer, "attention"), "directly": (len(z) - 1, "stream")}
    rows = []
    for scale, (way, (at, to)) in product(scales, ways.items()):
        logits = added_logits(model, asked.tokens, at, scale * vector, to)
        rows.append([scale, way, float(1 - divergence(logits, asked).mean() / before)])
    return pd.DataFrame(rows, columns=["scale", "way", "value"])


def head_effects(model, means, prompts: Prompts) -> torch.Tensor:
    """Average indirect effect of each head (layer, head), nats, on prompts in a wrong context.

    A head's output at the last position is replaced by its mean for the prompt's latent, `means`
    (layer, prompt, head, head_dim); the effect is by how much the KL from that latent's truth falls
    (Todd et al. 2024, section 2.3, there by how much more probable the answer gets).
    """
    before = divergence(last_logits(model, prompts.tokens), prompts)
    effects = torch.zeros(means.shape[0], means.shape[2], dtype=torch.float64)
    for layer, head in product(*map(range, effects.shape)):
        after = replaced_logits(model, prompts.tokens, means, [layer], [head])
        effects[layer, head] = (before - divergence(after, prompts)).mean()
    return effects


def readable(vectors, contexts: Contexts) -> float:
    """How often the nearest mean of a latent's vectors is the right one's; vectors (query, width).

    Means are over every other document, and name the latents of the rest. Chance: 1 / latents.
    """
    learns, latent = contexts.document % 2 == 0, contexts.query_latent
    there = latent[learns].unique()
    means = torch.stack([vectors[learns & (latent == one)].mean(0) for one in there])
    named = there[torch.cdist(vectors[~learns], means).argmin(1)]
    return float((named == latent[~learns]).double().mean())
