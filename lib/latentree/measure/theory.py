"""Tests of the paper's theorem and assumptions on models of the two-level process (two_level.py).

A query token is predicted at the cue before it. All that is asked here is asked of the last query of a sequence, before
which most is known of the global latent z0.
"""

from itertools import product

import pandas as pd
import torch
from nnsight import NNsight

from latentree.data.two_level import TwoLevel, clear_segments, contested, forgetting, predictive
from latentree.evidence.intervals import ratio
from latentree.inside.names import Internals
from latentree.inside.trace import heads_and_logits
from latentree.measure import induction
from latentree.measure.donors import Stimulus
from latentree.measure.function_vectors import BEST, SAME, layerwise
from latentree.measure.hydra import Ablations
from latentree.measure.prompts import Contexts, Prompts
from latentree.measure.released import measure_as_released
from latentree.measure.stimuli import RELEASED
from latentree.train.model import log_probabilities, next_token_losses


def floors(model, process: TwoLevel, tokens: torch.Tensor) -> pd.DataFrame:
    """A model's loss by position beside the exact predictor's, nats: DataFrame (position, segment, place, value, low, high, exact).

    `position` is that of the token that is predicted, from the second one on; 95 % over sequences. `exact` is the exact
    predictor's loss on the same tokens, the floor up to chance.
    """
    targets = tokens[:, 1:, None]
    own, exact = (
        -log_p[:, at].gather(-1, targets)[..., 0].double()
        for log_p, at in (
            (log_probabilities(model, tokens), slice(-1)),
            (predictive(process, tokens), slice(1, None)),
        )
    )
    value, low, high = (part.numpy() for part in ratio(own, torch.ones_like(own)))
    position = torch.arange(1, tokens.shape[1])
    return pd.DataFrame(
        {
            "position": position,
            "segment": position // process.length,
            "place": position % process.length,
            "value": value,
            "low": low,
            "high": high,
            "exact": exact.mean(0),
        }
    )


def block_masses(process: TwoLevel, log_p: torch.Tensor) -> torch.Tensor:
    """What predictions, log probabilities (..., vocabulary), give to each global latent's block of tokens (..., z0)."""
    latents = len(process.log_z0)
    return log_p[..., : process.cue].exp().unflatten(-1, (latents, process.cue // latents)).sum(-1)


@torch.no_grad()
def last_query(model, tokens, seen=None) -> torch.Tensor:
    """A model's log probabilities (sequence, vocabulary), float64, for the last of tokens (sequence, position).

    Attention is kept from tokens that are not `seen` (sequence, position; bool); positions stay what they are.
    """
    mask = None if seen is None else seen[:, :-1].to(model.device)
    found = [
        model(
            input_ids=chunk,
            attention_mask=None if seen is None else mask[at : at + len(chunk)],
            use_cache=False,
            position_ids=torch.arange(chunk.shape[1], device=chunk.device)[None],
        )
        .logits[:, -1]
        .double()
        .log_softmax(-1)
        .cpu()
        for at, chunk in zip(range(0, len(tokens), 64), tokens[:, :-1].to(model.device).split(64))
    ]
    return torch.cat(found)


def window_excess(model, process: TwoLevel, tokens: torch.Tensor, windows) -> pd.DataFrame:
    """What the last query token costs more when only the last tokens before it are seen: DataFrame (window, value, low, high, exact).

    Nats, mean and 95 % over sequences, of the model (its attention masked) and of the exact predictor (two_level.forgetting);
    `windows` are numbers of tokens.
    """
    last, place, rows = tokens[:, -1:], torch.arange(tokens.shape[1]), []
    whole = last_query(model, tokens).gather(1, last)[:, 0]
    for window, exact in zip(windows, forgetting(process, tokens, windows), strict=True):
        seen = (place >= tokens.shape[1] - 1 - window).expand(tokens.shape)
        lost = whole - last_query(model, tokens, seen).gather(1, last)[:, 0]
        rows.append((window, *map(float, ratio(lost, torch.ones_like(lost))), float(exact.mean())))
    return pd.DataFrame(rows, columns=["window", "value", "low", "high", "exact"])


def distance_effects(
    model, process: TwoLevel, distances, count: int = 64, seed: int = 0
) -> pd.DataFrame:
    """How far one deciding segment moves the last query's log odds between two global latents (two_level.contested).

    DataFrame (distance, value, low, high, exact, share): half the difference between both sides' log odds, nats, mean and
    95 % over `count` sequences, for the model and the exact predictor, and the ratio of the means. Theorem 1's retrieval
    does not depend on the distance: nor does the exact effect, for segments are exchangeable.
    """
    rows = []
    for distance, tokens in zip(
        distances, (contests := contested(process, count, distances, seed))[0], strict=True
    ):
        effects = []
        for read in (
            lambda side: last_query(model, side),
            lambda side: predictive(process, side)[:, -1],
        ):
            masses = torch.stack([block_masses(process, read(side)) for side in tokens]).log()
            odds = masses.gather(2, contests[1].T[None].expand(2, -1, -1)).diff(dim=2)[
                ..., 0
            ]  # (side, sequence)
            effects.append((odds[1] - odds[0]) / 2)
        own, exact = effects
        value, low, high = map(float, ratio(own, torch.ones_like(own)))
        rows.append(
            (
                distance,
                value,
                low,
                high,
                float(exact.mean()),
                value / float(exact.mean()) if exact.any() else float("nan"),
            )
        )
    return pd.DataFrame(rows, columns=["distance", "value", "low", "high", "exact", "share"])


def other_latent(z0: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """For each sequence the number of one with another z0 (sequence,), drawn with `seed`. ValueError if all have the same."""
    if len(z0.unique()) < 2:
        raise ValueError(f"z0: is {int(z0[0])} in all {len(z0)} sequences; give more sequences")
    return torch.multinomial(
        (z0[:, None] != z0).double(), 1, generator=torch.Generator().manual_seed(seed)
    )[:, 0]


@torch.no_grad()
def reuse(model, process: TwoLevel, tokens, z0, seed: int = 0) -> pd.DataFrame:
    """Whether the last query follows a global latent patched into the stream.

    DataFrame (site, layer, value, low, high, mass, exact). The stream of a sequence with another z0 takes the place of the own
    one at a site of the earlier segments: their `queries`, where the theorem's inferences would lie, their `cues`, their
    `evidence`, or `all` of their tokens; or at the evidence of the `current` one, which may have read the others. `layer` counts
    the blocks before it: 0 is the embeddings, as if the tokens were another's. What is followed at 0 and no more from a later
    layer on has been read before. value: the share of sequences whose prediction then gives more to the donor's block than
    to the own, 95 % over sequences; mass: the mean of p(donor's) / (p(donor's) + p(own)). Site `none` is the clean run.
    """
    donor, row = other_latent(z0, seed), torch.arange(len(tokens))
    place = torch.arange(tokens.shape[1] - process.length)
    kind = place % process.length
    sites = {
        "queries": place[kind == process.length - 1],
        "cues": place[kind == process.evidence],
        "evidence": place[kind < process.evidence],
        "all": place,
        "current": len(place) + torch.arange(process.evidence),
    }
    traced = NNsight(model)
    inside = Internals(model, traced)
    given = tokens.to(model.device)

    def follows(log_p):
        masses = block_masses(process, log_p)
        theirs, own = (masses[row, latent] for latent in (z0[donor], z0))
        return (theirs > own).double(), float((theirs / (theirs + own)).mean())

    with traced.trace(input_ids=given, use_cache=False):
        streams = [block.input for block in inside.blocks].save()
        clean = traced.output.logits[:, -2].save()
    found = {("none", 0): clean}
    exact = {"none": predictive(process, tokens)[:, -1]}
    for site, at in sites.items():
        exact[site] = predictive(process, tokens.index_copy(1, at, tokens[donor][:, at]))[:, -1]
        for layer, stream in enumerate(streams):
            with traced.trace(input_ids=given, use_cache=False):
                inside.blocks[layer].input[:, at] = stream[donor][:, at]
                logits = traced.output.logits[:, -2].save()
            found[site, layer] = logits
    rows = []
    for (site, layer), logits in found.items():
        values, mass = follows(logits.double().log_softmax(-1).cpu())
        ideal = float(follows(exact[site])[0].mean()) if layer == 0 else float("nan")
        rows.append((site, layer, *map(float, ratio(values, torch.ones_like(values))), mass, ideal))
    return pd.DataFrame(rows, columns=["site", "layer", "value", "low", "high", "mass", "exact"])


@torch.no_grad()
def specialisation(model, process: TwoLevel, tokens, z0, seed: int = 0) -> pd.DataFrame:
    """Which heads carry what earlier segments say, and which what the current one says: DataFrame (layer, head, earlier, current).

    At the last cue: the squared change of a head's contribution when the tokens of all earlier segments, or the evidence
    of the current one, come from a sequence with another z0, over twice the contribution's variance over sequences. 0
    says untouched, 1 changed as if for another sequence.
    """
    donor, current = (
        other_latent(z0, seed),
        torch.arange(tokens.shape[1]) >= tokens.shape[1] - process.length,
    )
    inside = Internals(model)

    def written(batch):
        z = heads_and_logits(model, batch.to(model.device))[0][:, :, -2]
        return (
            torch.stack([inside.head_written(layer, part) for layer, part in enumerate(z)])
            .double()
            .cpu()
        )

    clean = written(tokens)
    spread = 2 * clean.var(1).sum(-1)
    found = {
        "earlier": torch.where(current, tokens, tokens[donor]),
        "current": torch.where(current, tokens[donor], tokens),
    }
    found = {
        name: (written(batch) - clean).square().mean(1).sum(-1) / spread
        for name, batch in found.items()
    }
    heads = product(range(inside.layers), range(inside.heads))
    rows = [(*number, *(float(changed[number]) for changed in found.values())) for number in heads]
    return pd.DataFrame(rows, columns=["layer", "head", *found])


# ---------------------------------------------------------------------- assumptions


@torch.no_grad()
def transparency(model, tokens, size: float = 0.05) -> pd.DataFrame:
    """A5-A, for each head: how much of what it could write reaches the end of the stream: DataFrame (layer, head, rank, least).

    The head's own contribution at the second last position is moved along an orthonormal basis of what its W_O can write,
    by `size` of the stream's length there; the answers of the final residual stream, per unit, make a Jacobian (direction,
    width) for each sequence. rank is the mean effective rank, (sum s)^2 / sum s^2 of its singular values s, over the number
    of directions; least the mean smallest singular value: where nothing comes after, both are 1.
    """
    inside, rows = Internals(model), []
    traced = NNsight(model)
    view = Internals(model, traced)
    given = tokens.to(model.device)

    def run(layer=None, head=0, added=None):
        with traced.trace(input_ids=given, use_cache=False):
            if layer is not None:
                z = view.o_proj(layer).input.unflatten(-1, (inside.heads, inside.head_dim)).clone()
                z[:, -2, head] += added
                view.o_proj(layer).input = z.flatten(-2)
            stream = view.final_norm.input[:, -2].save()
        return stream

    clean = run()
    length = size * clean.norm(dim=-1, keepdim=True)
    for layer in range(inside.layers):
        for head, w_o in enumerate(inside.w_o(layer)):
            basis, strength, directions = torch.linalg.svd(w_o, full_matrices=False)
            steps = (basis / strength).T  # each moves the stream by one unit along a direction
            jacobian = torch.stack(
                [(run(layer, head, length * step) - clean) / length for step in steps], 1
            )
            s = torch.linalg.svdvals(jacobian.double())
            rank = s.sum(-1).square() / s.square().sum(-1) / len(steps)
            rows.append((layer, head, float(rank.mean()), float(s.min(-1).values.mean())))
    return pd.DataFrame(rows, columns=["layer", "head", "rank", "least"])


def gradient_cosines(model, tokens) -> torch.Tensor:
    """A5-B: cosines (head, head), heads numbered through all layers, of the last query's loss gradients by contributions.

    A head's gradient is that by its contribution to the stream at the second last position, within what its W_O can write:
    the stream's gradient projected there. Means over sequences.
    """
    inside, kept = Internals(model), []

    def hook(module, inputs):
        z = inputs[0].detach().requires_grad_() if not inputs[0].requires_grad else inputs[0]
        z.retain_grad()
        kept.append(z)
        return (z, *inputs[1:])

    hooks = [inside.o_proj(layer).register_forward_pre_hook(hook) for layer in range(inside.layers)]
    try:
        with torch.enable_grad():
            given = tokens.to(model.device)
            next_token_losses(model(input_ids=given, use_cache=False).logits, given)[
                :, -1
            ].sum().backward()
    finally:
        for one in hooks:
            one.remove()
        model.zero_grad()
    vectors = []
    for layer, z in enumerate(kept):
        by_head = z.grad[:, -2].unflatten(-1, (inside.heads, inside.head_dim))
        for head, w_o in enumerate(inside.w_o(layer).detach()):
            vectors.append(
                by_head[:, head] @ torch.linalg.pinv(w_o).T
            )  # g_z = W_O g, so pinv(W_O) g_z is g's projection
    unit = torch.nn.functional.normalize(torch.stack(vectors, 1).double(), dim=-1)
    return (unit @ unit.mT).mean(0).cpu()


@torch.no_grad()
def curvature(
    model, tokens, z0, layer: int, head: int, seed: int = 0, random: bool = False, size: float = 0.1
) -> torch.Tensor:
    """A6: u'Hu of the last query's true logit along a redundant direction u of a head, logits: (sequence,).

    u is how the head's contribution at the last cue differs from that in a sequence with another z0 (or, `random`, a
    direction as long); H is the Hessian of the logit of the true token minus the mean of all, in the stream after the
    layer's attention, by a second difference of steps of `size` u. Negative is concave.
    """
    inside, given = Internals(model), tokens.to(model.device)
    traced = NNsight(model)
    view = Internals(model, traced)
    z = heads_and_logits(model, given)[0][layer][:, -2]
    own = inside.head_written(layer, z)[:, head]
    u = own[other_latent(z0, seed).to(own.device)] - own
    if random:
        noise = torch.randn(u.shape, generator=torch.Generator().manual_seed(seed)).to(u)
        u = noise * u.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)

    def target(step):
        with traced.trace(input_ids=given, use_cache=False):
            view.attention_written(layer).output[:, -2] += step * u
            logits = traced.output.logits[:, -2].save()
        return (logits[torch.arange(len(given)), given[:, -1]] - logits.mean(-1)).double()

    return (target(size) - 2 * target(0.0) + target(-size)).cpu() / size**2


# ---------------------------------------------------------------------- the mechanisms of the paper's toy experiment


def scored(tokens: torch.Tensor, seed: int = 0) -> Stimulus:
    """The last query of each of tokens (sequence, position) as the scored token; donors stand at the same place of another."""
    at = torch.full((len(tokens),), tokens.shape[1] - 2)
    places = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return Stimulus(tokens, at, tokens[:, -1], places, seed)


def vector_prompts(process: TwoLevel, each: int, seed: int = 0) -> tuple[Contexts, Prompts]:
    """`each` contexts for each global latent, up to the last cue, and their zero-shot prompts: the last segment alone.

    The earlier segments clearly say the latent, and the last one another (neither the own nor the next one, whose vector is the
    control), so that it does not tell what to inject. Gold is the exact prediction in the context. ValueError for less than 4
    global latents.
    """
    latents, earlier = len(process.log_z0), process.segments - 1
    if latents < 4:
        raise ValueError(
            f"z0 = {latents}: own, another and the prompt's latent must differ; give 4 global latents or more"
        )
    z0 = torch.arange(latents).repeat_interleave(each)
    last = clear_segments(process, (z0 + latents // 2) % latents, seed)
    whole = torch.cat(
        [clear_segments(process, z0[:, None].expand(-1, earlier), seed + 1).flatten(1), last], 1
    )
    row, at = torch.arange(len(whole)), torch.full((len(whole),), whole.shape[1] - 2)
    gold = predictive(process, whole)[:, -1].exp()
    return Contexts(process, [], whole[:, :-1], z0, row, at, None), Prompts(
        last[:, :-1], gold, z0
    )


def strongest_repair(runs: Ablations, kind: str) -> float:
    """Correlation of compensation with the removed direct effect over sequences, for the `layer` or `head` that removes most.

    It has the sign of the Hydra effect's slope, and stays within -1 and 1 where next to nothing is removed; 0 where nothing is.
    It is chosen on every other sequence and scored on the rest. What the last layer writes is left out. ValueError for a
    model of one layer.
    """
    if runs.inside.layers < 2:
        raise ValueError("layers = 1: nothing comes after the only layer; give a deeper model")
    heads = range(runs.inside.heads) if kind == "head" else (-1,)
    found = [
        runs.ablate(kind, layer, head) for layer in range(runs.inside.layers - 1) for head in heads
    ]
    chosen = max(found, key=lambda one: float(one.removed[::2].mean()))
    return float(
        torch.corrcoef(torch.stack([chosen.removed, chosen.compensation])[:, 1::2])[
            0, 1
        ].nan_to_num(0.0)
    )


def mechanisms(
    model, shown: dict, question: Stimulus, contexts: Contexts, prompts: Prompts
) -> pd.DataFrame:
    """Hydra effect by layers and by heads, induction and function vector: DataFrame (metric, definition, value).

    - corrected: `strongest_repair` of both kinds on `question`; the best head's attention to what followed a match, less what
      positions explain, in shown["natural"]; by how many nats of KL the own context's attention output helps `prompts` more
      than another latent's, in the best layer (function_vectors.layerwise).
    - context itself: by how many nats the prompt's prediction is better in its context than alone.
    - as released: the largest rise of the un-normed logit lens's current token (released.py); attention to the same token a
      period before in shown["random repeat"]. The released prompts for function vectors need roles, which there are none of.
    """
    runs = Ablations(model, question)
    scores = (
        induction.measure(model, shown, 64)
        .query("variant != 'head'")
        .set_index(["stimulus", "score", "order"])
    )
    best, duplicate = (
        scores.loc["natural", "induction", 0],
        scores.loc["random repeat", RELEASED, 1],
    )
    vectors = layerwise(model, contexts, {SAME: prompts}).set_index(["quantity", "vector", "layer"])
    lens = measure_as_released(model, question.tokens[:64, : question.at[0] + 1], 1)
    used = (
        vectors.loc["KL", "zero-shot", -1]["value"] - vectors.loc["KL", "in context", -1]["value"]
    )
    rows = [
        ("layer-wise Hydra", "corrected", strongest_repair(runs, "layer")),
        ("head-wise Hydra", "corrected", strongest_repair(runs, "head")),
        ("induction", "corrected", best["value"] - best["elsewhere"]),
        ("function vector", "corrected", vectors.loc["KL", BEST, -1]["value"]),
        ("function vector", "context itself", used),
        ("layer-wise Hydra", "as released", (lens.ablated - lens.clean).max()),
        ("induction", "as released", duplicate["value"]),
    ]
    return pd.DataFrame(rows, columns=["metric", "definition", "value"])
