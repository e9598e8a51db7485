"""Is what a context says of its latent a vector? Taken out of one run, added to another, and read.

A vector is taken where a run in context has read a sentence up to some state, and added at the last
position of a zero-shot prompt in the same state (prompts.py). How much closer the prediction then
comes to the latent's own is the improvement. Layer by layer: Figure 3 of Rohweder et al. (2026).
From many contexts and few heads: Todd et al. (2024).
"""

import pandas as pd
import torch

from latentree.evidence.intervals import ratio
from latentree.inside.names import Internals, norm_gain
from latentree.inside.trace import run
from latentree.measure.induction import choose_and_score
from latentree.measure.prompts import Contexts, Prompts

SAME, FRESH = "same word", "fresh word"  # of a prompt, beside the context's
DIFFERENCE, BEST = "own - another", "best layer"


def divergence(logits, prompts: Prompts) -> torch.Tensor:
    """KL in nats (prompt,) from the truth to a prediction, logits (prompt, vocabulary)."""
    surprise = -(prompts.gold * logits.double().log_softmax(-1)).sum(-1)
    return surprise + torch.special.xlogy(prompts.gold, prompts.gold).sum(-1)


def surprise(logits, prompts: Prompts) -> torch.Tensor:
    """Minus the log-probability, in nats (prompt,), of the word that is most likely in truth."""
    likely = prompts.gold.argmax(1, keepdim=True)
    return -logits.double().log_softmax(-1).gather(1, likely)[:, 0]


# ------------------------------------------------------------------ vectors taken and added


def states(model, tokens, row, position, rows: int = 64):
    """Head outputs z (layer, query, head, head_dim) and logits (query, vocabulary) at queries.

    `tokens` (sequence, position) run `rows` sequences at a time; row and position (query,) say
    where the queries stand, in order of rows.
    """
    z, logits = [], []
    for first in range(0, len(tokens), rows):
        here = (row >= first) & (row < first + rows)
        at = (row[here] - first, position[here])
        found = run(model, tokens[first : first + rows], ("z", "logits"))
        z.append(found["z"][:, *at].cpu())
        logits.append(found["logits"][at].cpu())
    return torch.cat(z, 1), torch.cat(logits)


@torch.no_grad()
def attention_outputs(model, z) -> torch.Tensor:
    """What each layer's attention writes (layer, query, width), from z, without any bias."""
    inside = Internals(model)
    written = []
    for layer, mixes in enumerate(z.to(model.device)):
        written.append(inside.head_written(layer, mixes).sum(-2).cpu())
    return torch.stack(written)


def last_logits(model, tokens, change=None) -> torch.Tensor:
    """Logits (batch, vocabulary) after the last token of a run, with `change` (trace.run)."""
    return run(model, tokens, ["logits"], change, logits_to_keep=1)["logits"][:, -1].cpu()


def added_logits(model, tokens, layer: int, vectors, to: str = "attention") -> torch.Tensor:
    """`last_logits` when `vectors` (batch, width) are added at the last position.

    to: `attention`, to what the layer's attention adds to the stream, so that an MLP that comes
    after it reads the sum; `stream`, to the stream after the whole layer.
    """

    def add(written):
        written[:, -1] += vectors.to(written.device)
        return written

    point = ("stream", layer + 1) if to == "stream" else (to, layer)
    return last_logits(model, tokens, {point: add})


# ------------------------------------------------------------------ one context, layer by layer


def layerwise(model, contexts: Contexts, prompts: dict, seed=0, rows=64) -> pd.DataFrame:
    """Improvement of zero-shot prompts by a context's attention output, added layer by layer.

    `prompts` {name: one for each query of the contexts}; `rows` contexts run at a time. Returns the
    table of `over_latents`. quantity: by how many nats the `KL` from the truth falls, or the
    log-probability of the `gold word` rises. vector: the `own` document's, `another` one's, of the
    next latent, a `random` one of the same norm, and `own - another`. Without a layer (-1):
    `zero-shot` and, for SAME, `in context` are the distances themselves.
    """
    z, in_context = states(model, contexts.tokens, contexts.document, contexts.position, rows)
    own = attention_outputs(model, z)
    sets = {"own": own, "another": own[:, of_next_latent(contexts, seed)]}
    sets["random"] = random_like(own, seed)
    found = {}
    for name, prompt in prompts.items():
        logits = {("zero-shot", -1): last_logits(model, prompt.tokens)}
        if name == SAME:
            logits["in context", -1] = in_context
        for vector, layers in sets.items():
            for layer, added in enumerate(layers):
                logits[vector, layer] = added_logits(model, prompt.tokens, layer, added)
        for quantity, distance in (("KL", divergence), ("gold word", surprise)):
            off = {key: distance(predicted, prompt) for key, predicted in logits.items()}
            for (vector, layer), value in off.items():
                gain = value if layer == -1 else off["zero-shot", -1] - value
                found[name, vector, layer, quantity] = gain
            for layer in range(len(own)):
                difference = off["another", layer] - off["own", layer]
                found[name, DIFFERENCE, layer, quantity] = difference
    return over_latents(found, contexts.query_latent)


def over_latents(rows: dict, latent) -> pd.DataFrame:
    """Means over latents of rows {(prompt, vector, layer, quantity): values (query,)}.

    `latent` (query,). Columns prompt, vector, layer, quantity, value, low, high (95 % over
    latents), latents. Where rows are of `own - another`, a `best layer` (-1) comes last: it is
    chosen on one half of the latents and scored on the other, both ways.
    """
    there, place = latent.unique(return_inverse=True)
    count = torch.bincount(place).double()
    table, differences = [], {}
    for (prompt, vector, layer, quantity), values in rows.items():
        sums = torch.zeros_like(count).index_add(0, place, values.double())
        table.append((prompt, vector, layer, quantity, *map(float, ratio(sums, count))))
        if vector == DIFFERENCE:
            differences.setdefault((prompt, quantity), []).append(sums)
    for (prompt, quantity), layers in differences.items():
        best = choose_and_score(torch.stack(layers, 1), count)[:3]
        table.append((prompt, BEST, -1, quantity, *map(float, best)))
    columns = ["prompt", "vector", "layer", "quantity", "value", "low", "high"]
    return pd.DataFrame(table, columns=columns).assign(latents=len(there))


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


# ------------------------------------------------------------------ many contexts, few heads


def mean_heads(model, contexts: Contexts, queries=None) -> torch.Tensor:
    """Mean outputs of all heads over each latent's queries: (latent, layer, head, head_dim).

    `queries` (numbers) are all of the contexts' if not given; each latent has one at least.
    """
    queries = torch.arange(len(contexts.document)) if queries is None else queries
    document, latent = contexts.document[queries], contexts.query_latent[queries]
    z = states(model, contexts.tokens, document, contexts.position[queries])[0].transpose(0, 1)
    sums = z.new_zeros(int(latent.max()) + 1, *z.shape[1:]).index_add(0, latent, z)
    return sums / torch.bincount(latent)[:, None, None, None]


def indirect_effects(model, means, shuffled: Prompts) -> torch.Tensor:
    """Average indirect effect of each head (layer, head), nats, on prompts with shuffled contexts.

    A head's output at the last position is replaced by its mean for the prompt's latent, `means`
    (latent, layer, head, head_dim); the effect is by how much the KL from that latent's truth falls
    (Todd et al. 2024, section 2.3, there by how much more probable the answer gets).
    """
    before = divergence(last_logits(model, shuffled.tokens), shuffled)
    effects = torch.zeros(means.shape[1:3], dtype=torch.float64)
    for layer, head in torch.ones_like(effects).nonzero().tolist():
        mean = means[shuffled.latent, layer, head].to(model.device)

        def replace(z, head=head, mean=mean):
            z[:, -1, head] = mean
            return z

        after = last_logits(model, shuffled.tokens, {("z", layer): replace})
        effects[layer, head] = (before - divergence(after, shuffled)).mean()
    return effects


@torch.no_grad()
def function_vectors(model, means, heads) -> torch.Tensor:
    """The sum (latent, width) of what `heads` write when they give their mean outputs `means`."""
    inside = Internals(model)
    written = means.new_zeros(len(means), inside.width)
    for layer, head in heads:
        written += inside.head_written(layer, means[:, layer].to(model.device))[:, head].cpu()
    return written


def improvement(model, prompts: Prompts, layer: int, vectors) -> torch.Tensor:
    """By how many nats the KL falls (prompt,) when each prompt's latent's vector is added.

    `vectors` (latent, width) are added to the stream after `layer`.
    """
    after = added_logits(model, prompts.tokens, layer, vectors[prompts.latent], to="stream")
    return divergence(last_logits(model, prompts.tokens), prompts) - divergence(after, prompts)


def choose(model, means, effects, zero_shot: Prompts) -> tuple[list[tuple[int, int]], int]:
    """The heads [(layer, head), ...] and the layer, after which they are added, that improve most.

    Every number of heads, from the largest of `effects` (layer, head) on, is tried in every layer.
    """
    ranked, tried = _ranked_heads(effects), {}
    for count in range(1, len(ranked) + 1):
        vectors = function_vectors(model, means, ranked[:count])
        for layer in range(len(effects)):
            tried[count, layer] = float(improvement(model, zero_shot, layer, vectors).mean())
    count, layer = max(tried, key=tried.get)
    return ranked[:count], layer


def _ranked_heads(effects) -> list[tuple[int, int]]:
    """Heads (layer, head) by effect, at most half of each layer's, so that others are left."""
    chosen, room = [], [max(1, effects.shape[1] // 2)] * len(effects)
    for number in effects.flatten().argsort(descending=True).tolist():
        layer, head = divmod(number, effects.shape[1])
        if room[layer]:
            chosen.append((layer, head))
            room[layer] -= 1
    return chosen


# ------------------------------------------------------------------ what a vector says


@torch.no_grad()
def decoded(model, vectors) -> torch.Tensor:
    """Logits (..., vocabulary) that vectors (..., width) write directly: final gain, unembedding.

    The final norm's division, which scales all logits of a vector alike, is left out.
    """
    inside = Internals(model)
    return inside.unembedding(norm_gain(inside.final_norm, vectors.to(model.device))).cpu()


def along(vectors, base, end, end_again) -> torch.Tensor:
    """How far from `base` (0) to `end` (1) each of `vectors` (..., width) lies, along their line.

    <v - base, end - base> / <end_again - base, end - base>, with two independent estimates of the
    end, so that the noise of one does not make the others look short.
    """
    line = end - base
    return ((vectors - base) * line).sum(-1) / ((end_again - base) * line).sum(-1)
