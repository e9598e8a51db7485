"""Heads that find what followed the current context before, and what the model makes of it.

A score of a head is the attention that it pays to certain targets (stimuli.py), averaged over the
queries that have some. Induction attends to what followed a match (Olsson et al. 2022; by order:
Akyurek et al. 2024), a duplicate-token head to the match itself.
"""

import numpy as np
import pandas as pd
import torch

from latentree.evidence.intervals import ratio
from latentree.inside.attention import attention
from latentree.measure.stimuli import RELEASED, Stimulus, Targets
from latentree.train.model import next_token_losses

_SAME_FOR_ALL = ("previous-token", RELEASED)  # targets at the same positions in every sequence
_INTERVAL = ["value", "low", "high"]


@torch.no_grad()
def measure(model, stimuli: dict, rows: int = 32) -> pd.DataFrame:
    """All scores of a model, one row each; `rows` sequences run at a time.

    Columns stimulus, score, order, variant, layer, head, value, low, high (95 % over sequences),
    chance, elsewhere, queries. variant `head`: one head's score. `best`: the best head's, by
    `choose_and_score`; the layer and head named are the best over all sequences. `as released`:
    the largest over heads of the release's score, order is its k. `model`: loss (nats a token),
    in-context gain, second-copy gain (nats; layer and head are -1).

    Two nulls: chance is uniform attention's score, and elsewhere what the same head pays to another
    sequence's targets, which positions alone explain (NaN where all sequences have the same ones).
    """
    tables = []
    for name, stimulus in stimuli.items():
        targets = stimulus.targets, stimulus.targets.of_another_sequence()

        def paid(part, probabilities, targets=targets):
            here = [each.of_sequences(int(part[0]), len(part)) for each in targets]
            return torch.stack([attention_sums(probabilities, each) for each in here], 1)

        sums, losses = attended(model, stimulus.tokens, paid, rows)
        found = _score_rows(sums, targets[0], model.config.num_attention_heads)
        tables += [one.assign(stimulus=name) for one in (found, _model_rows(losses, stimulus))]
    first = ["stimulus", "score", "order", "variant", "layer", "head", *_INTERVAL]
    return pd.concat(tables, ignore_index=True)[[*first, "chance", "elsewhere", "queries"]]


def attended(model, tokens, paid, rows: int):
    """What `paid(part, probabilities)` finds in all layers (sequence, ..., head), and the losses.

    `part` are the numbers of the sequences that run, `rows` at a time; probabilities (sequence,
    head, query, key). Losses are those of next tokens, nats (sequence, position - 1), float64.
    """
    found, losses = [], []
    for part in torch.arange(len(tokens)).split(rows):
        layers, shown = [], tokens[part].to(model.device)

        def see(layer, probabilities, part=part, layers=layers):
            layers.append(paid(part, probabilities).cpu())

        with attention(model, see):
            logits = model(input_ids=shown, use_cache=False).logits
        found.append(torch.cat(layers, -1))
        losses.append(next_token_losses(logits, shown).double().cpu())
    return torch.cat(found), torch.cat(losses)


def head_rows(intervals, heads: int, **columns) -> pd.DataFrame:
    """Rows (layer, head, value, low, high, ...) of intervals (3, head), heads of all layers."""
    layer, head = np.divmod(np.arange(intervals.shape[1]), heads)
    place = {"variant": "head", "layer": layer, "head": head}
    return pd.DataFrame(dict(zip(_INTERVAL, intervals.numpy())) | place | columns)


def best_row(table: pd.DataFrame, head: int, sums, counts) -> pd.DataFrame:
    """The row of a head of `head_rows` with the value of the best head, by `choose_and_score`."""
    interval = map(float, choose_and_score(sums, counts))
    return table.iloc[[head]].assign(variant="best", **dict(zip(_INTERVAL, interval)))


def attention_sums(probabilities, targets: Targets) -> torch.Tensor:
    """Attention (batch, head, query, key) on the targets, summed: (batch, score, head), float64.

    Divided by the targets' `queries` it is the score of each sequence.
    """
    batch, scores = len(probabilities), len(targets.names)
    sequence, query, key, score = targets.entries.to(probabilities.device)
    paid = probabilities[sequence, :, query, key].double()
    sums = paid.new_zeros(batch * scores, probabilities.shape[1])
    return sums.index_add(0, sequence * scores + score, paid).unflatten(0, (batch, scores))


def _chance(targets: Targets) -> torch.Tensor:
    """Each score (score,) of a head that attends uniformly to all it can see."""
    _, query, _, score = targets.entries
    sums = torch.zeros(len(targets.names), dtype=torch.float64)
    return sums.index_add(0, score, 1 / (query + 1).double()) / targets.queries.sum(0)


def _in_context_gain(losses, stimulus: Stimulus):
    """How much less a repeated pair costs than its first occurrence: sums and counts (sequence,).

    The gain in nats is log p(x_q+1) at a later occurrence of (x_q, x_q+1) in a document minus at
    the first; what other context adds between the two is part of it.
    """
    same_pair = stimulus.orders[:, 1:, 1:] >= 2
    again, first = same_pair.any(2), same_pair.int().argmax(2)
    gain = losses.gather(1, first) - losses
    return (gain * again).sum(1), again.sum(1)


def choose_and_score(sums, counts):
    """The best head, chosen on one half of the sequences and scored on the other, both ways.

    (value, low, high) as `ratio` of sums (sequence, head) and counts (sequence,). No sequence
    chooses its head, so the maximum does not bias the value. The interval takes it as given.
    """
    half = torch.arange(len(sums), device=sums.device) % 2
    odd, even = half == 1, half == 0
    chosen = torch.stack([_best(sums[odd], counts[odd]), _best(sums[even], counts[even])])
    return ratio(sums.gather(1, chosen[half][:, None])[:, 0], counts)


def emergence_step(curve: pd.DataFrame, null: str, margin: float) -> int | None:
    """The first step from which on the lower end stays above null + margin; None if never.

    `curve` has columns step, low and the one that `null` names; ValueError for a step twice.
    """
    if curve["step"].duplicated().any():
        raise ValueError(
            f"curve: has {len(curve)} rows for {curve['step'].nunique()} steps; choose one curve"
        )
    curve = curve.sort_values("step", ascending=False)
    stays = (curve["low"] > curve[null] + margin).cummin()  # from the last step backwards
    return int(curve["step"][stays].min()) if stays.any() else None


def _best(sums, counts):
    """The head whose score has the highest lower end over these sequences: surely a good one."""
    _, low, _ = ratio(sums, counts[:, None])
    return low.nan_to_num(-torch.inf).argmax()


def _score_rows(sums, targets: Targets, heads: int) -> pd.DataFrame:
    """Rows of sums (sequence, own or another's, score, head): heads, the best, the release's."""
    own, counts = sums[:, 0], targets.queries
    null = sums[:, 1].sum(0) / counts.sum(0)[:, None]
    chance, tables = _chance(targets), []
    for number, (score, order) in enumerate(targets.names):
        one, count = own[:, number], counts[:, number]
        elsewhere = np.nan if score in _SAME_FOR_ALL else null[number].numpy()
        nulls = {"chance": float(chance[number]), "elsewhere": elsewhere}
        about = {"score": score, "order": order, "queries": int(count.sum()), **nulls}
        table = head_rows(torch.stack(ratio(one, count[:, None])), heads, **about)
        best = int(_best(one, count))
        if score == RELEASED:
            tables.append(table.iloc[[best]].assign(variant="as released"))
        else:
            tables += [table, best_row(table, best, one, count)]
    return pd.concat(tables)


def _model_rows(losses, stimulus: Stimulus) -> pd.DataFrame:
    """The rows of the whole model's behaviour, from losses (sequence, position - 1)."""
    every, period = torch.ones_like(losses, dtype=torch.int64), stimulus.period
    parts = {"loss": (losses.sum(1), every.sum(1))}
    parts["in-context gain"] = _in_context_gain(losses, stimulus)
    if period:
        gain = losses[:, : period - 1] - losses[:, period : 2 * period - 1]
        parts["second-copy gain"] = gain.sum(1), every[:, : period - 1].sum(1)
    rows = []
    for score, (sums, counts) in parts.items():
        rows.append([score, *map(float, ratio(sums, counts)), int(counts.sum())])
    table = pd.DataFrame(rows, columns=["score", *_INTERVAL, "queries"])
    none = {"order": 0, "layer": -1, "head": -1, "chance": np.nan, "elsewhere": np.nan}
    return table.assign(variant="model", **none)
