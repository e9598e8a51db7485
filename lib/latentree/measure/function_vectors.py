"""Is what a context says of its document a vector? Taken out of one run, added to another, and read.

The function of a context is its document's latent: which words are frequent in it, and which ones its words call for. A
vector is taken where a contextual run has read a sentence up to some state, and added at the last position of a zero-shot
prompt in the same state (prompts.py). How much closer the prediction then comes to the latent's own is the improvement.

Layer by layer: Figure 3 of Rohweder et al. (2026). From many contexts and few heads: Todd et al. (2024).
"""

from itertools import product

import pandas as pd
import torch

from latentree.evidence.intervals import ratio
from latentree.inside.names import Internals, norm_gain
from latentree.inside.trace import added_logits, heads_and_logits, replaced_logits
from latentree.measure.ablation import control_heads
from latentree.measure.induction import choose_and_score
from latentree.measure.prompts import Contexts, Prompts

SAME, FRESH = "same word", "fresh word"  # of a prompt, beside the context's
DIFFERENCE, BEST = "own - another", "best layer"
COLUMNS = ["prompt", "vector", "layer", "quantity", "value", "low", "high", "latents"]


# ---------------------------------------------------------------------- how far a prediction is off


def divergence(logits, prompts: Prompts) -> torch.Tensor:
    """KL in nats (prompt,) from the latent-aware predictive to a prediction, logits (prompt, vocabulary)."""
    predicted = logits.double().log_softmax(-1)
    return torch.special.xlogy(prompts.gold, prompts.gold).sum(-1) - (prompts.gold * predicted).sum(
        -1
    )


def surprise(logits, prompts: Prompts) -> torch.Tensor:
    """Minus the log-probability, in nats (prompt,), of the word that the latent makes most likely."""
    return -logits.double().log_softmax(-1).gather(1, prompts.gold.argmax(1, keepdim=True))[:, 0]


DISTANCES = {"KL": divergence, "gold word": surprise}


# ---------------------------------------------------------------------- one context, layer by layer


@torch.no_grad()
def states(model, tokens, row, position, rows: int = 64):
    """Head outputs z (layer, query, head, head_dim) and logits (query, vocabulary) at queries of a run on `tokens`.

    `tokens` (sequence, position) run `rows` sequences at a time; row and position (query,), in order of rows.
    """
    z, logits = [], []
    for first in range(0, len(tokens), rows):
        here = (row >= first) & (row < first + rows)
        found, predicted = heads_and_logits(model, tokens[first : first + rows].to(model.device))
        z.append(found[:, row[here] - first, position[here]].cpu())
        logits.append(predicted[row[here] - first, position[here]].cpu())
    return torch.cat(z, 1), torch.cat(logits)


@torch.no_grad()
def attention_outputs(model, z) -> torch.Tensor:
    """What each layer's attention writes (layer, query, width), from z: a bias that all contexts share is left out."""
    inside = Internals(model)
    return torch.stack(
        [
            inside.head_written(layer, part.to(model.device)).sum(-2).cpu()
            for layer, part in enumerate(z)
        ]
    )


@torch.no_grad()
def layerwise(
    model, contexts: Contexts, prompts: dict[str, Prompts], seed: int = 0, rows: int = 64
) -> pd.DataFrame:
    """Improvement of zero-shot prompts by a contextual run's attention output, added layer by layer: tidy, in COLUMNS.

    `prompts` {name: one for each query of the contexts}. quantity: by how many nats the KL from the latent-aware predictive
    falls, or the log-probability of the gold word rises. vector: `own` document's, `another` document's (of the next
    latent), a `random` direction of the own vector's norm, and the difference `own - another`. Without a layer (-1):
    `zero-shot` and, for prompts of the queries' own words, `in context` are the distances themselves; `best layer` is the
    difference in the layer that is best on one half of the latents, scored on the other, both ways. low and high bound
    95 % over latents. `rows` contexts run at a time.
    """
    z, in_context = states(model, contexts.tokens, contexts.document, contexts.position, rows)
    own = attention_outputs(model, z)
    sets = {
        "own": own,
        "another": own[:, of_next_latent(contexts, seed)],
        "random": random_like(own, seed),
    }
    found = {}
    for name, prompt in prompts.items():
        zero_shot = last_logits(model, prompt.tokens)
        for quantity, distance in DISTANCES.items():
            found[name, "zero-shot", -1, quantity] = distance(zero_shot, prompt)
            if name == SAME:
                found[name, "in context", -1, quantity] = distance(in_context, prompt)
        repeated = prompt.tokens.repeat(len(sets), 1).to(model.device)
        for layer in range(len(own)):
            added = torch.cat([vectors[layer] for vectors in sets.values()]).to(model.device)
            logits = added_logits(model, repeated, layer, added).cpu()
            for vector, after in zip(sets, logits.chunk(len(sets)), strict=True):
                for quantity, distance in DISTANCES.items():
                    before = found[name, "zero-shot", -1, quantity]
                    found[name, vector, layer, quantity] = before - distance(after, prompt)
            for quantity in DISTANCES:
                pair = (found[name, vector, layer, quantity] for vector in ("own", "another"))
                found[name, DIFFERENCE, layer, quantity] = next(pair) - next(pair)
    return over_latents(found, contexts.query_latent)


def of_next_latent(contexts: Contexts, seed: int = 0) -> torch.Tensor:
    """For each query (query,) the number of a query of the next latent, drawn with `seed`."""
    latent = contexts.query_latent
    there, place = latent.unique(return_inverse=True)
    count, order = torch.bincount(place), place.argsort(stable=True)
    wanted = (place + 1) % len(there)
    drawn = torch.rand(len(latent), generator=torch.Generator().manual_seed(seed))
    return order[(count.cumsum(0) - count)[wanted] + (drawn * count[wanted]).long()]


def random_like(vectors, seed: int = 0) -> torch.Tensor:
    """Vectors (..., width) in random directions, of the same norms."""
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed))
    return noise * vectors.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)


@torch.no_grad()
def last_logits(model, tokens) -> torch.Tensor:
    """Logits (batch, vocabulary) after the last token."""
    return model(input_ids=tokens.to(model.device), use_cache=False).logits[:, -1].cpu()


def over_latents(rows: dict, latent) -> pd.DataFrame:
    """Means over latents of rows {(prompt, vector, layer, quantity): values (query,)}, `latent` (query,); see `layerwise`.

    Where some are of `own - another`, its cross-fitted best layers come last.
    """
    there, place = latent.unique(return_inverse=True)
    count = torch.bincount(place).double()
    sums = {
        key: torch.zeros_like(count).index_add(0, place, values.double())
        for key, values in rows.items()
    }
    table = [(*key, *map(float, ratio(values, count)), len(there)) for key, values in sums.items()]
    for prompt, quantity in dict.fromkeys((key[0], key[3]) for key in rows if key[1] == DIFFERENCE):
        layers = torch.stack(
            [sums[key] for key in sums if key == (prompt, DIFFERENCE, key[2], quantity)], 1
        )
        found = map(float, choose_and_score(layers, count)[:3])
        table.append((prompt, BEST, -1, quantity, *found, len(there)))
    return pd.DataFrame(table, columns=COLUMNS)


# ---------------------------------------------------------------------- many contexts, few heads


def mean_heads(z, latent) -> torch.Tensor:
    """Means over the queries of each latent, (latent, layer, head, head_dim), of z (layer, query, head, head_dim).

    `latent` (query,) numbers latents 0, 1, ..., each with a query at least.
    """
    sums = z.new_zeros(int(latent.max()) + 1, len(z), *z.shape[2:]).index_add(
        0, latent, z.transpose(0, 1)
    )
    return sums / torch.bincount(latent)[:, None, None, None]


@torch.no_grad()
def indirect_effects(model, means, shuffled: Prompts) -> torch.Tensor:
    """Average indirect effect of each head (layer, head), in nats of KL, on prompts whose context was shuffled.

    A head's output at the last position is replaced by its mean for the prompt's latent, `means` (latent, layer, head,
    head_dim); the effect is by how much the prediction then comes closer to that latent's (Todd et al. 2024, section 2.3,
    there by how much more probable the answer gets).
    """
    tokens, means = shuffled.tokens.to(model.device), means.to(model.device)
    z, logits = heads_and_logits(model, tokens)
    effects = torch.zeros(means.shape[1:3], dtype=torch.float64)
    for layer, head in product(*map(range, effects.shape)):
        replaced = z[layer, :, :, head].clone()
        replaced[:, -1] = means[shuffled.latent, layer, head]
        after = replaced_logits(model, tokens, {(layer, head): replaced})[:, -1].cpu()
        effects[layer, head] = (
            divergence(logits[:, -1].cpu(), shuffled) - divergence(after, shuffled)
        ).mean()
    return effects


def top_heads(effects, count: int) -> list[tuple[int, int]]:
    """The `count` heads (layer, head) of the largest effects, at most half of each layer's, so that others are left."""
    chosen, room = [], max(1, effects.shape[1] // 2)
    for number in effects.flatten().argsort(descending=True).tolist():
        layer, head = divmod(number, effects.shape[1])
        if sum(layer == other for other, _ in chosen) < room:
            chosen.append((layer, head))
    return chosen[:count]


@torch.no_grad()
def function_vectors(model, means, heads) -> torch.Tensor:
    """The sum of what `heads` write when they give their mean outputs `means`: (latent, width)."""
    inside = Internals(model)
    return sum(
        inside.head_written(layer, means[:, layer].to(model.device))[:, head]
        for layer, head in heads
    ).cpu()


@torch.no_grad()
def improvement(model, prompts: Prompts, layer: int, vectors) -> torch.Tensor:
    """By how many nats the KL falls (prompt,) when the vector of each prompt's latent is added to the stream after `layer`."""
    tokens = prompts.tokens.to(model.device)
    after = added_logits(
        model, tokens, layer, vectors[prompts.latent].to(model.device), to="stream"
    ).cpu()
    return divergence(last_logits(model, tokens), prompts) - divergence(after, prompts)


def choose(model, means, effects, zero_shot: Prompts) -> pd.DataFrame:
    """Mean improvement, in nats, of every number of top heads injected at every layer: columns heads, layer, value."""
    tried = []
    for count in range(1, len(top_heads(effects, effects.numel())) + 1):
        vectors = function_vectors(model, means, top_heads(effects, count))
        tried += [
            (count, layer, float(improvement(model, zero_shot, layer, vectors).mean()))
            for layer in range(len(effects))
        ]
    return pd.DataFrame(tried, columns=["heads", "layer", "value"])


def controls(model, means, heads, seed: int = 0) -> dict[str, torch.Tensor]:
    """Vectors (latent, width): the `own` ones, and those that must not do as well.

    another: of the next latent; random: a random direction of the same norm; other heads: of as many heads of the same
    layers.
    """
    own = function_vectors(model, means, heads)
    others = function_vectors(model, means, control_heads(heads, means.shape[2], seed))
    return {
        "own": own,
        "another": own.roll(-1, 0),
        "random": random_like(own, seed),
        "other heads": others,
    }


# ---------------------------------------------------------------------- what a vector says


@torch.no_grad()
def decoded(model, vectors) -> torch.Tensor:
    """Logits (..., vocabulary) that vectors (..., width) write directly, by the final norm's gain and the unembedding.

    The norm's division, which scales all logits of a vector alike, is left out.
    """
    inside = Internals(model)
    return inside.unembedding(norm_gain(inside.final_norm, vectors.to(model.device))).cpu()


def along(vectors, base, end, end_again) -> torch.Tensor:
    """How far from `base` (0) to `end` (1) each of `vectors` (..., width) lies, along the line between them.

    <v - base, end - base> / <end_again - base, end - base>, with two independent estimates of the end, so that the noise
    of one does not make the others look short.
    """
    line = end - base
    return ((vectors - base) * line).sum(-1) / ((end_again - base) * line).sum(-1)
