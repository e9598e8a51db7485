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


@torch.no_grad()
def measure(model, stimuli: dict, rows: int = 32) -> pd.DataFrame:
    """All scores of a model, one row each; `rows` sequences run at a time.

    Columns stimulus, score, order, variant, layer, head, value, low, high (95 % over sequences),
    chance, elsewhere, queries. variant `head`: one head's score. `best`: the best head's, by
    `choose_and_score`; the layer and head named are the best over all sequences. `as released`:
    the largest over heads of the release's score, order is its k. `model`: loss (nats a token),
    in-context gain, second-copy gain (nats; layer and head are -1).

    Two nulls: chance is uniform attention's score, and elsewhere what the same head pays to the
    targets of another sequence, which its positions alone can explain (not a number where all
    sequences have the same targets).
    """
    tables = []
    for name, stimulus in stimuli.items():
        sums, elsewhere, losses = _run(model, stimulus, rows)
        scores = _score_rows(sums, elsewhere, stimulus.targets)
        tables += [
            scores.assign(stimulus=name),
            _model_rows(losses, stimulus).assign(stimulus=name),
        ]
    table, heads = pd.concat(tables, ignore_index=True), model.config.num_attention_heads
    number = table["head"]
    table["layer"] = number // heads
    table["head"] = (number % heads).where(number >= 0, -1)
    first = ["stimulus", "score", "order", "variant", "layer", "head", "value", "low", "high"]
    return table[[*first, "chance", "elsewhere", "queries"]]


def attention_sums(probabilities, targets: Targets) -> torch.Tensor:
    """Attention (batch, head, query, key) on the targets, summed: (batch, score, head), float64.

    Divided by the targets' `queries` it is the score of each sequence.
    """
    batch, scores = len(probabilities), len(targets.names)
    sequence, query, key, score = targets.entries.to(probabilities.device)
    paid = probabilities[sequence, :, query, key].double()
    sums = paid.new_zeros(batch * scores, probabilities.shape[1])
    return sums.index_add(0, sequence * scores + score, paid).unflatten(0, (batch, scores))


def chance(targets: Targets) -> torch.Tensor:
    """Each score (score,) of a head that attends uniformly to all it can see."""
    _, query, _, score = targets.entries
    sums = torch.zeros(len(targets.names), dtype=torch.float64)
    return sums.index_add(0, score, 1 / (query + 1).double()) / targets.queries.sum(0)


def in_context_gain(losses, stimulus: Stimulus):
    """How much less a repeated pair costs than its first occurrence: sums and counts (sequence,).

    `losses` (sequence, position - 1), nats. The gain, log p(x_q+1) at each later occurrence of
    (x_q, x_q+1) in a document minus at the first, is averaged over later occurrences; what other
    context adds between the two is part of it.
    """
    same_pair = stimulus.orders[:, 1:, 1:] >= 2
    again, first = same_pair.any(2), same_pair.int().argmax(2)
    gain = losses.gather(1, first) - losses
    return (gain * again).sum(1), again.sum(1)


def choose_and_score(sums, counts):
    """The best head, chosen on one half of the sequences and scored on the other, both ways.

    `sums` (sequence, head), `counts` (sequence,). Returns (value, low, high) as `ratio` over all
    sequences, and the heads (2,) chosen by the odd and the even ones. The maximum over heads does
    not bias the value, for no sequence chooses the head that it scores; the interval takes the
    choice as given.
    """
    half = torch.arange(len(sums), device=sums.device) % 2
    odd, even = half == 1, half == 0
    chosen = torch.stack([_best(sums[odd], counts[odd]), _best(sums[even], counts[even])])
    return *ratio(sums.gather(1, chosen[half][:, None])[:, 0], counts), chosen


def emergence_step(curve: pd.DataFrame, null, margin: float) -> int | None:
    """The first step from which on the lower end stays above null + margin; None if never.

    `curve` has one row a step, with columns step and low; `null` is a number or a column's name.
    Raises ValueError for several rows of one step.
    """
    if curve["step"].duplicated().any():
        raise ValueError(
            f"curve: has {len(curve)} rows for {curve['step'].nunique()} steps; choose one curve"
        )
    curve = curve.sort_values("step", ascending=False)
    level = curve[null] if isinstance(null, str) else null
    stays = (curve["low"] > level + margin).cummin()  # from the last step backwards
    return int(curve["step"][stays].min()) if stays.any() else None


def _best(sums, counts):
    """The head whose score has the highest lower end over these sequences: surely a good one."""
    _, low, _ = ratio(sums, counts[:, None])
    return low.nan_to_num(-torch.inf).argmax()


def _run(model, stimulus: Stimulus, rows: int):
    """Attention sums on the own targets and on another sequence's, and losses, of all sequences."""
    sums, elsewhere, losses = [], [], []
    own, other = stimulus.targets, stimulus.targets.of_another_sequence()
    for first in range(0, len(stimulus.tokens), rows):
        tokens = stimulus.tokens[first : first + rows].to(model.device)
        here, there = (t.of_sequences(first, len(tokens)) for t in (own, other))
        on_own, on_other = [], []

        def see(layer, probabilities):
            on_own.append(attention_sums(probabilities, here).cpu())
            on_other.append(attention_sums(probabilities, there).cpu())

        with attention(model, see):
            logits = model(input_ids=tokens, use_cache=False).logits
        sums.append(torch.cat(on_own, 2))
        elsewhere.append(torch.cat(on_other, 2))
        losses.append(next_token_losses(logits, tokens).double().cpu())
    return torch.cat(sums), torch.cat(elsewhere), torch.cat(losses)


def _score_rows(sums, elsewhere, targets: Targets) -> pd.DataFrame:
    """The rows of heads, best heads and the released score, heads numbered through all layers.

    `sums` (sequence, score, head) are of `attention_sums`.
    """
    names, levels, counts = targets.names, chance(targets).tolist(), targets.queries
    each = torch.stack(ratio(sums, counts[..., None]))  # value, low and high (3, score, head)
    null = elsewhere.sum(0) / counts.sum(0)[:, None]
    rows = []
    for number, (score, order) in enumerate(names):
        one, count = sums[:, number], counts[:, number]
        best = int(_best(one, count))
        if score in _SAME_FOR_ALL:
            null[number] = torch.nan
        if score == RELEASED:
            shown = [("as released", best, each[:, number, best])]
        else:
            shown = [("head", head, each[:, number, head]) for head in range(one.shape[1])]
            shown.append(("best", best, choose_and_score(one, count)[:3]))
        for variant, head, (value, low, high) in shown:
            interval = {"value": float(value), "low": float(low), "high": float(high)}
            nulls = {"chance": levels[number], "elsewhere": float(null[number, head])}
            row = {"score": score, "order": order, "variant": variant, "head": head}
            rows.append(row | interval | nulls | {"queries": int(count.sum())})
    return pd.DataFrame(rows)


def _model_rows(losses, stimulus: Stimulus) -> pd.DataFrame:
    """The rows of the whole model's behaviour, from losses (sequence, position - 1)."""
    parts = {"loss": (losses.sum(1), torch.full((len(losses),), losses.shape[1]))}
    parts["in-context gain"] = in_context_gain(losses, stimulus)
    if stimulus.period:
        period = stimulus.period
        gain = losses[:, : period - 1] - losses[:, period : 2 * period - 1]
        parts["second-copy gain"] = gain.sum(1), torch.full((len(gain),), period - 1)
    rows = []
    for score, (sums, counts) in parts.items():
        value, low, high = (float(x) for x in ratio(sums, counts))
        rows.append({"score": score, "value": value, "low": low, "high": high})
        rows[-1]["queries"] = int(counts.sum())
    return pd.DataFrame(rows).assign(
        order=0, variant="model", head=-1, chance=np.nan, elsewhere=np.nan
    )
