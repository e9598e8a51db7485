"""Heads that find what followed the current context before: matches in the tokens, scores of heads, behaviour.

A score of a head is the attention that it pays to certain targets, averaged over the queries that have some. A match of
order n is an earlier position j whose last n tokens are the query's own; it is exclusive when the n+1 last ones are not.
Induction attends to j + 1 (Olsson et al. 2022; by order: Akyurek et al. 2024), a duplicate-token head to j itself.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch

from latentree.circuits import copying
from latentree.corpus import held_out
from latentree.errors import UserError
from latentree.interventions import token_losses
from latentree.selection import best_head, choose_and_score, ratio

LONGEST = 10  # orders of matches that are told apart
RELEASED = "duplicate-token, as released"
COLUMNS = ["stimulus", "score", "order", "variant", "layer", "head", "value", "low", "high", "chance", "queries"]


@dataclass
class Targets:
    """Where scores look: attention from `query` to `key` of `sequence` (entries,) counts for score number `score`.

    `names` [(score, order), ...]; `queries` (sequence, score): how many queries of a sequence have a target.
    """

    names: list
    sequence: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    score: torch.Tensor
    queries: torch.Tensor


@dataclass
class Stimulus:
    """Tokens (sequence, position) to run a model on.

    `document` (sequence, position) numbers the documents, if matches count within one only; `period` is the length in
    tokens of what is repeated, if something is.
    """

    tokens: torch.Tensor
    document: torch.Tensor | None = None
    period: int | None = None

    @cached_property
    def targets(self) -> Targets:
        """The targets of all scores in these tokens."""
        return find_targets(self)


def stimuli(process, sequences: int, context: int, seed: int = 0) -> dict[str, Stimulus]:
    """Three kinds of `sequences` sequences of `context` tokens.

    - natural: held-out documents, as many as fill the context.
    - legal repeat: the first half of a natural one, twice.
    - random repeat: a row of tokens drawn uniformly from the vocabulary with `seed`, twice; no token marks its beginning.

    UserError for an odd context, or less than 2 sequences of 4 tokens.
    """
    if context % 2 or context < 4 or sequences < 2:
        raise UserError(f"context = {context}, sequences = {sequences}: cannot be halved; give an even context from 4 up and 2 "
                        "sequences or more")  # fmt: skip
    half = context // 2
    natural = held_out(process, sequences, context)
    drawn = torch.randint(process.vocabulary_size, (sequences, half), generator=torch.Generator().manual_seed(seed))
    return {
        "natural": Stimulus(natural["tokens"], natural["document"]),
        "legal repeat": Stimulus(natural["tokens"][:, :half].repeat(1, 2), period=half),
        "random repeat": Stimulus(drawn.repeat(1, 2), period=half),
    }


def match_orders(tokens, document=None, longest: int = LONGEST):
    """All matches in tokens (sequence, position): sequence, query, key j < query, and exclusive order, (matches,) each.

    A match does not reach across the boundaries of `document`. Orders above `longest` are given as longest + 1.
    """
    document = torch.zeros_like(tokens) if document is None else document
    found = []
    for first, (x, d) in enumerate(zip(tokens.split(16), document.split(16), strict=True)):
        same = (x[:, :, None] == x[:, None]) & (d[:, :, None] == d[:, None])
        sequence, query, key = same.tril(-1).nonzero().T
        found.append(torch.stack([sequence + 16 * first, query, key]))
    sequence, query, key = torch.cat(found, 1)
    order, longer = torch.ones_like(key), torch.arange(len(key), device=key.device)
    for back in range(1, longest + 1):
        longer = longer[key[longer] >= back]  # the matches that may be longer than `back`
        s, q, j = sequence[longer], query[longer] - back, key[longer] - back
        same = (tokens[s, q] == tokens[s, j]) & (document[s, q] == document[s, j]) & (document[s, j] == document[s, j + back])
        longer = longer[same]
        order[longer] += 1
    return sequence, query, key, order


def find_targets(stimulus: Stimulus) -> Targets:
    """The targets of each score (a score without an order has order 0).

    - induction: what followed the matches of exclusive order 1 to LONGEST; of any order, however long, as order 0.
    - duplicate-token: the matches themselves, of any order.
    - previous-token: the token before the query.
    - in a repeat, what the release calls induction of order k: the same token one period earlier, for the queries of
      the repeat but the first k.
    """
    tokens = stimulus.tokens
    sequence, query, key, order = match_orders(tokens, stimulus.document)
    named = {("induction", n): (sequence[order == n], query[order == n], key[order == n] + 1) for n in range(1, LONGEST + 1)}
    named |= {("induction", 0): (sequence, query, key + 1), ("duplicate-token", 0): (sequence, query, key)}
    s, q = torch.ones_like(tokens[:, 1:]).nonzero().T
    named["previous-token", 0] = s, q + 1, q
    for k in range(1, min(LONGEST + 1, stimulus.period or 0)):
        s, q = torch.ones_like(tokens[:, stimulus.period + k :]).nonzero().T
        named[RELEASED, k] = s, q + stimulus.period + k, q + k
    queries = tokens.new_zeros(len(tokens), len(named))
    for i, (s, q, _) in enumerate(named.values()):
        queries[:, i] = torch.zeros_like(tokens).index_put((s, q), torch.ones_like(s)).sum(1)
    score = torch.arange(len(named)).repeat_interleave(torch.tensor([len(s) for s, _, _ in named.values()]))
    columns = (torch.cat(column) for column in zip(*named.values(), strict=True))
    return Targets(list(named), *columns, score.to(tokens.device), queries)


def attention_sums(attention, targets: Targets, first: int = 0) -> torch.Tensor:
    """Attention on the targets, summed within each sequence: (batch, score, head), float64.

    `attention` (batch, head, query, key) is of the sequences from number `first` on. Divided by the targets' `queries`
    it is the score of each sequence.
    """
    batch, scores = len(attention), len(targets.names)
    here = (targets.sequence >= first) & (targets.sequence < first + batch)
    s, q, k, score = (x[here].to(attention.device) for x in (targets.sequence - first, targets.query, targets.key, targets.score))
    paid = attention[s, :, q, k].double()
    return paid.new_zeros(batch * scores, attention.shape[1]).index_add(0, s * scores + score, paid).view(batch, scores, -1)


def chance(targets: Targets) -> torch.Tensor:
    """Each score (score,) of a head that attends uniformly to all it can see."""
    share = 1 / (targets.query + 1).double()
    return share.new_zeros(len(targets.names)).index_add(0, targets.score, share) / targets.queries.sum(0)


def in_context_gain(losses, stimulus: Stimulus):
    """How much less a repeated bigram costs than its first occurrence in its document: sums and counts (sequence,).

    `losses` (sequence, position - 1), nats. The gain, log p(x_q+1) at each later occurrence of (x_q, x_q+1) minus at the
    first, is averaged over later occurrences; what other context adds between the two is part of it.
    """
    tokens = stimulus.tokens
    document = torch.zeros_like(tokens) if stimulus.document is None else stimulus.document
    row = torch.arange(len(tokens), device=tokens.device)[:, None]
    size, inside = int(tokens.max()) + 1, (document[:, 1:] == document[:, :-1]).flatten()
    bigram = ((row * (int(document.max()) + 1) + document[:, :-1]) * size + tokens[:, :-1]) * size + tokens[:, 1:]
    kinds, kind = bigram.flatten().unique(return_inverse=True)
    place = torch.arange(len(kind), device=tokens.device)
    earliest = torch.full_like(kinds, len(kind)).scatter_reduce(0, kind, place, "amin")[kind]
    again = ((earliest < place) & inside).view_as(losses)
    gain = losses.flatten()[earliest].view_as(losses) - losses
    return (gain * again).sum(1), again.sum(1)


def second_copy_gain(losses, period: int):
    """Loss on the first copy minus on the second, nats a token, over the tokens 2 to `period` of each: sums and counts."""
    gain = losses[:, : period - 1] - losses[:, period : 2 * period - 1]
    return gain.sum(1), torch.full_like(gain[:, 0], period - 1)


@torch.no_grad()
def measure(model, stimuli: dict, rows: int = 32) -> pd.DataFrame:
    """All scores of a model (with eager attention), one row each, in COLUMNS; `rows` sequences run at a time.

    variant `head`: one head's score. `best`: the best head's, cross-fitted by `choose_and_score`; the layer and head
    named are the best over all sequences. `as released`: the largest over heads of the release's score, order is its k.
    `model`: loss (nats a token), in-context gain, second-copy gain (nats; layer and head are -1). Copying is the OV
    circuit's (circuits.py). low and high bound 95 % over sequences, chance is uniform attention's score.
    """
    tables = []
    for name, stimulus in stimuli.items():
        sums, losses = [], []
        for first in range(0, len(stimulus.tokens), rows):
            chunk = stimulus.tokens[first : first + rows].to(model.device)
            out = model(input_ids=chunk, use_cache=False, output_attentions=True)
            sums.append(torch.cat([attention_sums(layer, stimulus.targets, first) for layer in out.attentions], 2).cpu())
            losses.append(token_losses(out.logits, chunk).double().cpu())
        scores = torch.cat([torch.cat(sums), copying(model, stimulus.tokens)[:, None]], 1)
        both = [head_rows(scores, stimulus.targets), model_rows(torch.cat(losses), stimulus)]
        tables.append(pd.concat(both, ignore_index=True).assign(stimulus=name))
    table, heads = pd.concat(tables, ignore_index=True), model.config.num_attention_heads
    return table.assign(layer=table["head"] // heads, head=table["head"].where(table["head"] < 0, table["head"] % heads))[COLUMNS]


def head_rows(sums, targets: Targets) -> pd.DataFrame:
    """The rows of single heads, best heads and the released score, heads numbered through all layers.

    `sums` (sequence, score, head): of `attention_sums`, then copying, which every sequence has.
    """
    counts = torch.cat([targets.queries, torch.ones_like(targets.queries[:, :1])], 1)
    names, levels = [*targets.names, ("copying", 0)], [*chance(targets).tolist(), 0.0]
    tables = []
    for i, (score, order) in enumerate(names):
        one, count = sums[:, i], counts[:, i]
        each, best = ratio(one, count[:, None]), int(best_head(one, count))
        variants = {"head": (range(one.shape[1]), each), "best": ([best], choose_and_score(one, count)[:3])}
        if score == RELEASED:
            variants = {"as released": ([best], [x[[best]] for x in each])}
        for variant, (head, (value, low, high)) in variants.items():
            columns = {"variant": variant, "head": head}
            columns |= {"value": np.atleast_1d(value), "low": np.atleast_1d(low), "high": np.atleast_1d(high)}
            shared = {"score": score, "order": order, "chance": levels[i], "queries": int(count.sum())}
            tables.append(pd.DataFrame(columns).assign(**shared))
    return pd.concat(tables, ignore_index=True)


def model_rows(losses, stimulus: Stimulus) -> pd.DataFrame:
    """The rows of the whole model's behaviour, from losses (sequence, position - 1)."""
    found = {"loss": (losses.sum(1), torch.full_like(losses[:, 0], losses.shape[1]))}
    found["in-context gain"] = in_context_gain(losses, stimulus)
    if stimulus.period:
        found["second-copy gain"] = second_copy_gain(losses, stimulus.period)
    rows = [(score, *(float(x) for x in ratio(*part)), int(part[1].sum())) for score, part in found.items()]
    table = pd.DataFrame(rows, columns=["score", "value", "low", "high", "queries"])
    return table.assign(order=0, variant="model", head=-1, chance=float("nan"))
