"""Heads that find what followed the current context before: their scores, and what the whole model makes of it.

A score of a head is the attention that it pays to certain targets (stimuli.py), averaged over the queries that have some.
Induction attends to what followed a match (Olsson et al. 2022; by order: Akyurek et al. 2024), a duplicate-token head to
the match itself.
"""

import numpy as np
import pandas as pd
import torch

from latentree.evidence.intervals import ratio
from latentree.inside.names import read_attention
from latentree.measure.circuits import copying
from latentree.measure.selection import best_head, choose_and_score
from latentree.measure.stimuli import RELEASED, Stimulus, Targets
from latentree.train.model import next_token_losses

SAME_FOR_ALL = (
    "previous-token",
    RELEASED,
)  # scores whose targets are at the same positions in every sequence
COLUMNS = [
    "stimulus",
    "score",
    "order",
    "variant",
    "layer",
    "head",
    "value",
    "low",
    "high",
    "chance",
    "elsewhere",
    "queries",
]


def attention_sums(attention, targets: Targets) -> torch.Tensor:
    """Attention (batch, head, query, key) on the targets, summed within each sequence: (batch, score, head), float64.

    Divided by the targets' `queries` it is the score of each sequence.
    """
    batch, scores = len(attention), len(targets.names)
    entries = (targets.sequence, targets.query, targets.key, targets.score)
    s, q, k, score = (entry.to(attention.device) for entry in entries)
    paid = attention[s, :, q, k].double()
    return (
        paid.new_zeros(batch * scores, attention.shape[1])
        .index_add(0, s * scores + score, paid)
        .view(batch, scores, -1)
    )


def chance(targets: Targets) -> torch.Tensor:
    """Each score (score,) of a head that attends uniformly to all it can see."""
    share = 1 / (targets.query + 1).double()
    return share.new_zeros(len(targets.names)).index_add(
        0, targets.score, share
    ) / targets.queries.sum(0)


def in_context_gain(losses, stimulus: Stimulus):
    """How much less a repeated bigram costs than its first occurrence in its document: sums and counts (sequence,).

    `losses` (sequence, position - 1), nats. The gain, log p(x_q+1) at each later occurrence of (x_q, x_q+1) minus at the
    first, is averaged over later occurrences; what other context adds between the two is part of it.
    """
    tokens = stimulus.tokens
    document = torch.zeros_like(tokens) if stimulus.document is None else stimulus.document
    row = torch.arange(len(tokens), device=tokens.device)[:, None]
    size, inside = int(tokens.max()) + 1, (document[:, 1:] == document[:, :-1]).flatten()
    bigram = (
        (row * (int(document.max()) + 1) + document[:, :-1]) * size + tokens[:, :-1]
    ) * size + tokens[:, 1:]
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
    """All scores of a model, one row each, in COLUMNS; `rows` sequences run at a time.

    variant `head`: one head's score. `best`: the best head's, cross-fitted by `choose_and_score`; the layer and head
    named are the best over all sequences. `as released`: the largest over heads of the release's score, order is its k.
    `model`: loss (nats a token), in-context gain, second-copy gain (nats; layer and head are -1). Copying is the OV
    circuit's (circuits.py). low and high bound 95 % over sequences. Two nulls: chance is uniform attention's score, and
    elsewhere what the same head pays to the targets of another sequence, which its positions alone can explain (not a
    number where all sequences have the same targets).
    """
    tables = []
    for name, stimulus in stimuli.items():
        sums, elsewhere, losses = [], [], []
        both = stimulus.targets, stimulus.targets.of_another_sequence()
        for first in range(0, len(stimulus.tokens), rows):
            chunk = stimulus.tokens[first : first + rows].to(model.device)
            here = [targets.of_sequences(first, len(chunk)) for targets in both]
            paid, logits = read_attention(
                model, chunk, lambda a: [attention_sums(a, targets).cpu() for targets in here]
            )
            for found, layers in zip((sums, elsewhere), zip(*paid)):
                found.append(torch.cat(layers, 2))
            losses.append(next_token_losses(logits, chunk).double().cpu())
        scores = torch.cat([torch.cat(sums), copying(model, stimulus.tokens)[:, None]], 1)
        rows_of = [
            head_rows(scores, torch.cat(elsewhere), stimulus.targets),
            model_rows(torch.cat(losses), stimulus),
        ]
        tables.append(pd.concat(rows_of, ignore_index=True).assign(stimulus=name))
    table, heads = pd.concat(tables, ignore_index=True), model.config.num_attention_heads
    number = table["head"]
    return table.assign(layer=number // heads, head=(number % heads).where(number >= 0, -1))[
        COLUMNS
    ]


def head_rows(sums, elsewhere, targets: Targets) -> pd.DataFrame:
    """The rows of single heads, best heads and the released score, heads numbered through all layers.

    `sums` (sequence, score, head): of `attention_sums`, then copying, which every sequence has; `elsewhere` those of the
    targets of other sequences, without copying.
    """
    null = torch.cat(
        [
            elsewhere.sum(0) / targets.queries.sum(0)[:, None],
            torch.full_like(sums[0, -1:], torch.nan),
        ]
    )
    counts = torch.cat([targets.queries, torch.ones_like(targets.queries[:, :1])], 1)
    names, levels = [*targets.names, ("copying", 0)], [*chance(targets).tolist(), 0.0]
    rows = []
    for i, (score, order) in enumerate(names):
        one, count = sums[:, i], counts[:, i]
        each, best = ratio(one, count[:, None]), int(best_head(one, count))
        variants = {
            "head": (range(one.shape[1]), each),
            "best": ([best], choose_and_score(one, count)[:3]),
        }
        if score == RELEASED:
            variants = {"as released": ([best], [x[[best]] for x in each])}
        for variant, (heads, bounds) in variants.items():
            for head, value, low, high in zip(heads, *(np.atleast_1d(x).tolist() for x in bounds)):
                elsewhere = torch.nan if score in SAME_FOR_ALL else float(null[i, head])
                rows.append(
                    (
                        score,
                        order,
                        variant,
                        head,
                        value,
                        low,
                        high,
                        levels[i],
                        elsewhere,
                        int(count.sum()),
                    )
                )
    columns = [name for name in COLUMNS if name not in ("stimulus", "layer")]
    return pd.DataFrame(rows, columns=columns)


def model_rows(losses, stimulus: Stimulus) -> pd.DataFrame:
    """The rows of the whole model's behaviour, from losses (sequence, position - 1)."""
    found = {"loss": (losses.sum(1), torch.full_like(losses[:, 0], losses.shape[1]))}
    found["in-context gain"] = in_context_gain(losses, stimulus)
    if stimulus.period:
        found["second-copy gain"] = second_copy_gain(losses, stimulus.period)
    rows = [
        (score, *(float(x) for x in ratio(*part)), int(part[1].sum()))
        for score, part in found.items()
    ]
    table = pd.DataFrame(rows, columns=["score", "value", "low", "high", "queries"])
    return table.assign(
        order=0, variant="model", head=-1, chance=float("nan"), elsewhere=float("nan")
    )
