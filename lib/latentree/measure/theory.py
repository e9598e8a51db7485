"""Tests of the paper's theorem and assumptions on models of the two-level process.

A query token is predicted at the cue before it. All that is asked here is asked of the last query
of a sequence, before which most is known of the global latent z0. Tokens are (sequence, position),
z0 is (sequence,); intervals are 95 %, over sequences.
"""

import numpy as np
import pandas as pd
import torch
from nnsight import NNsight

from latentree.data.two_level import TwoLevel, clear_segments, contested
from latentree.evidence.intervals import t_interval
from latentree.exact.two_level import forgetting, losses, predictive
from latentree.inside.names import Internals
from latentree.inside.trace import run
from latentree.measure import induction
from latentree.measure.donors import Stimulus
from latentree.measure.function_vectors import BEST, SAME, layerwise
from latentree.measure.hydra import Ablations
from latentree.measure.prompts import Contexts, Prompts
from latentree.measure.released import measure_as_released
from latentree.measure.stimuli import RELEASED
from latentree.train.model import next_token_losses


def floors(model, process: TwoLevel, tokens) -> pd.DataFrame:
    """A model's loss (nats) at each position beside the exact predictor's on the same tokens.

    DataFrame (position, segment, place, value, exact); `position` is that of the token that is
    predicted, from the second one on. `exact` is the floor up to chance.
    """
    own = next_token_losses(run(model, tokens, ["logits"])["logits"].cpu(), tokens).double()
    table = pd.DataFrame({"position": range(1, tokens.shape[1])})
    table["segment"] = table["position"] // process.length
    table["place"] = table["position"] % process.length
    table["value"] = own.mean(0).numpy()
    table["exact"] = losses(process, tokens)[:, 1:].mean(0).numpy()
    return table


def block_masses(process: TwoLevel, log_p: torch.Tensor) -> torch.Tensor:
    """What log probabilities (..., vocabulary) give to each global latent's block (..., z0)."""
    size = process.cue // len(process.log_z0)
    return log_p[..., : process.cue].exp().unflatten(-1, (-1, size)).sum(-1)


def last_query(model, tokens, seen=None) -> torch.Tensor:
    """A model's log probabilities (sequence, vocabulary), float64, of the last of tokens.

    Tokens that are not `seen` (sequence, position; bool) are masked; positions stay as they are.
    """
    mask = {} if seen is None else {"attention_mask": seen[:, :-1].to(model.device)}
    logits = run(model, tokens[:, :-1], ["logits"], logits_to_keep=1, **mask)["logits"]
    return logits[:, -1].double().log_softmax(-1).cpu()


def window_excess(model, process: TwoLevel, tokens, windows) -> pd.DataFrame:
    """What the last token costs more when only the last tokens before it are seen, nats.

    DataFrame (window, value, low, high, exact) of the model, its attention masked, and of the
    exact predictor. `windows` are numbers of tokens.
    """
    rows, place, last = [], torch.arange(tokens.shape[1]), tokens[:, -1:]
    whole = last_query(model, tokens).gather(1, last)
    exact = forgetting(process, tokens, windows).mean(1).tolist()
    for window, excess in zip(windows, exact, strict=True):
        seen = (place >= tokens.shape[1] - 1 - window).expand(tokens.shape)
        lost = whole - last_query(model, tokens, seen).gather(1, last)
        rows.append((window, *t_interval(lost[:, 0]), excess))
    return pd.DataFrame(rows, columns=["window", "value", "low", "high", "exact"])


def distance_effects(model, process: TwoLevel, distances, count=64, seed=0) -> pd.DataFrame:
    """How far one deciding segment moves the last query's log odds between two global latents.

    DataFrame (distance, value, low, high, exact, share): half the difference between both sides'
    log odds (two_level.contested, `count` sequences), nats, for the model and the exact predictor,
    and the ratio of the means. The exact effect does not depend on the distance: segments are
    exchangeable. Theorem 1 says the same of a model's retrieval.
    """
    contests, sides = contested(process, count, distances, seed)
    row = torch.arange(count)

    def moved(predictions):
        masses = block_masses(process, torch.stack(predictions)).log()  # (side, sequence, z0)
        odds = masses[:, row, sides[1]] - masses[:, row, sides[0]]
        return (odds[1] - odds[0]) / 2

    rows = []
    for distance, pair in zip(distances, contests, strict=True):
        value, low, high = t_interval(moved([last_query(model, tokens) for tokens in pair]))
        exact = float(moved([predictive(process, tokens)[:, -1] for tokens in pair]).mean())
        rows.append((distance, value, low, high, exact, value / exact if exact else float("nan")))
    return pd.DataFrame(rows, columns=["distance", "value", "low", "high", "exact", "share"])


def other_latent(z0: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """For each sequence the number of one with another z0 (sequence,), drawn with `seed`.

    Raises ValueError if all have the same.
    """
    if len(z0.unique()) < 2:
        raise ValueError(f"z0: is {int(z0[0])} in all {len(z0)} sequences; give more sequences")
    draw = torch.Generator().manual_seed(seed)
    return torch.multinomial((z0[:, None] != z0).double(), 1, generator=draw)[:, 0]


def reuse(model, process: TwoLevel, tokens, z0, seed: int = 0) -> pd.DataFrame:
    """Whether the last query follows a global latent that is patched into the stream.

    DataFrame (site, layer, value, low, high, mass, exact). The stream of a sequence with another
    z0 takes the place of the own one at a site of the earlier segments: their `queries`, where the
    theorem's inferences would lie, their `cues`, their `evidence`, `all` of their tokens; or at the
    evidence of the `current` segment, which may have read the others. `layer` counts the blocks
    before it: 0 is the embeddings, as if the tokens were another's. What is followed at 0 and no
    more from a later layer on has been read before. value: the share of sequences whose prediction
    gives more to the donor's block than to the own; mass: the mean of p(donor's) / (p(donor's) +
    p(own)); exact: the share for the exact predictor. Site `none` is the clean run.
    """
    donor, row = other_latent(z0, seed), torch.arange(len(tokens))
    earlier = torch.arange(tokens.shape[1] - process.length)
    kind = earlier % process.length
    sites = {
        "queries": earlier[kind == process.length - 1],
        "cues": earlier[kind == process.evidence],
        "evidence": earlier[kind < process.evidence],
        "all": earlier,
        "current": len(earlier) + torch.arange(process.evidence),
    }

    def followed(log_p):
        masses = block_masses(process, log_p)
        theirs, own = masses[row, z0[donor]], masses[row, z0]
        return t_interval((theirs > own).double()), float((theirs / (theirs + own)).mean())

    clean = run(model, tokens, ["stream", "logits"])
    found = {("none", 0): clean["logits"]}
    exact = {("none", 0): predictive(process, tokens)[:, -1]}
    for site, at in sites.items():
        exchanged = tokens.index_copy(1, at, tokens[donor][:, at])
        exact[site, 0] = predictive(process, exchanged)[:, -1]
        for layer, stream in enumerate(clean["stream"][:-1]):

            def patched(own):
                own[:, at] = stream[donor][:, at]
                return own

            patch = {("stream", layer): patched}
            found[site, layer] = run(model, tokens, ["logits"], patch)["logits"]
    rows = []
    for key, logits in found.items():
        interval, mass = followed(logits[:, -2].double().log_softmax(-1).cpu())
        ideal = followed(exact[key])[0][0] if key in exact else float("nan")
        rows.append((*key, *interval, mass, ideal))
    return pd.DataFrame(rows, columns=["site", "layer", "value", "low", "high", "mass", "exact"])


@torch.no_grad()
def specialisation(model, process: TwoLevel, tokens, z0, seed: int = 0) -> pd.DataFrame:
    """Which heads carry what earlier segments say, and which what the current one says.

    DataFrame (layer, head, earlier, current). At the last cue: the squared change of a head's
    contribution when the tokens of all earlier segments, or the evidence of the current one, come
    from a sequence with another z0, over twice its variance over sequences. 0 says untouched, 1
    changed as if for another sequence.
    """
    inside, donor = Internals(model), other_latent(z0, seed)
    current = torch.arange(tokens.shape[1]) >= tokens.shape[1] - process.length

    def written(batch):  # (layer, sequence, head, width)
        z = run(model, batch, ["z"])["z"][:, :, -2]
        heads = [inside.head_written(layer, part) for layer, part in enumerate(z)]
        return torch.stack(heads).double().cpu()

    clean, found = written(tokens), {}
    for name, kept in (("earlier", current), ("current", ~current)):
        change = written(torch.where(kept, tokens, tokens[donor])) - clean
        found[name] = change.square().mean(1).sum(-1) / (2 * clean.var(1).sum(-1))
    layer, head = np.indices(clean.shape[::2])
    columns = {"layer": layer, "head": head} | found
    return pd.DataFrame({name: values.flatten() for name, values in columns.items()})


# ---------------------------------------------------------------------- assumptions


@torch.no_grad()
def transparency(model, tokens, size: float = 0.05) -> pd.DataFrame:
    """A5-A: how much of what a head could write reaches the end: DataFrame (layer, head, least).

    A head's own contribution at the last cue is moved along an orthonormal basis of what its W_O
    can write, by `size` of the stream's length there; the answers of the final stream, per unit,
    make a Jacobian (direction, width). least is the mean, over sequences, of its smallest singular
    value: 1 where nothing comes after, 0 where a direction is lost.
    """
    inside, rows = Internals(model), []
    clean = run(model, tokens, ["stream"])["stream"][-1, :, -2]
    length = size * clean.norm(dim=-1, keepdim=True)
    for layer in range(inside.layers):
        for head, w_o in enumerate(inside.w_o(layer)):
            basis, strength, _ = torch.linalg.svd(w_o, full_matrices=False)
            answers = []
            for step in (basis / strength).T:  # moves the stream by one unit along a direction

                def moved(z):
                    z[:, -2, head] += length * step
                    return z

                end = run(model, tokens, ["stream"], {("z", layer): moved})["stream"][-1, :, -2]
                answers.append((end - clean) / length)
            least = torch.linalg.svdvals(torch.stack(answers, 1).double())[:, -1]
            rows.append((layer, head, float(least.mean())))
    return pd.DataFrame(rows, columns=["layer", "head", "least"])


def gradient_cosines(model, tokens) -> pd.DataFrame:
    """A5-B: mean cosines, over sequences, of the last query's loss gradients: (head, other, value).

    Heads are numbered through all layers. A head's gradient is the stream's at the last cue,
    projected into what its W_O can write.
    """
    traced = NNsight(model)
    inside, view = Internals(model), Internals(model, traced)
    given = tokens.to(model.device)
    with torch.enable_grad(), traced.trace(input_ids=given, use_cache=False):
        mixes = [view.o_proj(layer).input for layer in range(inside.layers)].save()
        logits = traced.output.logits.save()
    gradients = torch.autograd.grad(next_token_losses(logits, given)[:, -1].sum(), mixes)
    vectors = []
    for layer, gradient in enumerate(gradients):
        by_head = gradient[:, -2].unflatten(-1, (inside.heads, inside.head_dim))
        # g_z = W_O g, so that pinv(W_O) g_z is the projection of the stream's gradient g.
        projection = torch.linalg.pinv(inside.w_o(layer).detach())
        vectors.append(torch.einsum("bhd,hwd->bhw", by_head, projection))
    unit = torch.nn.functional.normalize(torch.cat(vectors, 1).double(), dim=-1)
    cosines = (unit @ unit.mT).mean(0).cpu().numpy()
    head, other = np.indices(cosines.shape)
    columns = {"head": head, "other": other, "value": cosines}
    return pd.DataFrame({name: values.flatten() for name, values in columns.items()})


@torch.no_grad()
def curvature(model, tokens, z0, layer, head, seed=0, random=False, size=0.1) -> torch.Tensor:
    """A6: u'Hu of the last query's true logit along a redundant direction u of a head (sequence,).

    u is how the head's contribution at the last cue differs from that in a sequence with another
    z0 (or, `random`, a direction as long); H is the Hessian of the true token's logit minus the
    mean of all, in the stream after the layer's attention, by a second difference of steps of
    `size` u. Negative is concave.
    """
    z = run(model, tokens, ["z"])["z"][layer, :, -2]
    own = Internals(model).head_written(layer, z)[:, head]
    u = own[other_latent(z0, seed)] - own
    if random:
        noise = torch.randn(u.shape, generator=torch.Generator().manual_seed(seed)).to(u)
        u = noise * u.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)

    def target(step):
        def stepped(attention):
            attention[:, -2] += step * u
            return attention

        change = {("attention", layer): stepped}
        logits = run(model, tokens, ["logits"], change)["logits"][:, -2].cpu()
        true = logits.gather(1, tokens[:, -1:])[:, 0]
        return (true - logits.mean(-1)).double()

    return (target(size) - 2 * target(0.0) + target(-size)) / size**2


# ---------------------------------------------------------------------- the paper's toy experiment


def scored(tokens, seed: int = 0) -> Stimulus:
    """The last query of each sequence as its scored token; donors stand at the same place."""
    at = torch.full((len(tokens),), tokens.shape[1] - 2)
    places = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return Stimulus(tokens, at, tokens[:, -1], places, seed)


def vector_prompts(process: TwoLevel, each: int, seed: int = 0) -> tuple[Contexts, Prompts]:
    """`each` contexts for each global latent, up to the last cue, and zero-shot prompts for them.

    The earlier segments clearly say the latent. The prompt, the last segment alone, says another
    one (neither the own nor the next one, whose vector is the control), so that it does not tell
    what to inject. Gold is the exact prediction in the context. Raises ValueError for fewer than 4
    global latents.
    """
    latents, earlier = len(process.log_z0), process.segments - 1
    if latents < 4:
        raise ValueError(f"z0 = {latents}: give 4 global latents or more, own, next and prompt's")
    z0 = torch.arange(latents).repeat_interleave(each)
    last = clear_segments(process, (z0 + latents // 2) % latents, seed)
    context = clear_segments(process, z0[:, None].expand(-1, earlier), seed + 1).flatten(1)
    whole = torch.cat([context, last], 1)
    row, at = torch.arange(len(whole)), torch.full((len(whole),), whole.shape[1] - 2)
    gold = predictive(process, whole)[:, -1].exp()
    contexts = Contexts(process, [], whole[:, :-1], z0, row, at, None)
    return contexts, Prompts(last[:, :-1], gold, z0)


def strongest_repair(runs: Ablations, kind: str) -> float:
    """Correlation of compensation with the removed direct effect over sequences.

    Of the `layer` or `head` that removes most, chosen on every other sequence and scored on the
    rest; the last layer, after which nothing comes, is left out. It has the sign of the Hydra
    effect's slope and stays within -1 and 1 where next to nothing is removed; 0 where nothing is.
    """
    heads = range(runs.inside.heads) if kind == "head" else (-1,)
    found = []
    for layer in range(runs.inside.layers - 1):
        found += [runs.ablate(kind, layer, head) for head in heads]
    chosen = max(found, key=lambda one: float(one.removed[::2].mean()))
    pairs = torch.stack([chosen.removed, chosen.compensation])[:, 1::2]
    return float(torch.corrcoef(pairs)[0, 1].nan_to_num(0.0))


def mechanisms(model, shown: dict, question: Stimulus, contexts, prompts) -> pd.DataFrame:
    """Hydra effect, induction and function vector: DataFrame (metric, definition, value).

    - corrected: `strongest_repair` by layers and by heads on `question`; the best head's attention
      to what followed a match, less what positions explain, in shown["natural"]; by how many nats
      of KL the own context's attention output helps `prompts` more than another latent's, in the
      best layer (function_vectors.layerwise).
    - context itself: by how many nats the prompt's prediction is better in its context.
    - as released: the largest rise of the un-normed logit lens's current token (released.py);
      attention to the same token a period before in shown["random repeat"].
    """
    runs = Ablations(model, question)
    scores = induction.measure(model, shown, 64).query("variant != 'head'")
    scores = scores.set_index(["stimulus", "score", "order"])
    best = scores.loc["natural", "induction", 0]
    duplicate = scores.loc["random repeat", RELEASED, 1]
    vectors = layerwise(model, contexts, {SAME: prompts}).query("quantity == 'KL' and layer == -1")
    vectors = vectors.set_index("vector")["value"]
    lens = measure_as_released(model, question.tokens[:64, : question.at[0] + 1], 1)
    rows = [
        ("layer-wise Hydra", "corrected", strongest_repair(runs, "layer")),
        ("head-wise Hydra", "corrected", strongest_repair(runs, "head")),
        ("induction", "corrected", best["value"] - best["elsewhere"]),
        ("function vector", "corrected", vectors[BEST]),
        ("function vector", "context itself", vectors["zero-shot"] - vectors["in context"]),
        ("layer-wise Hydra", "as released", (lens.ablated - lens.clean).max()),
        ("induction", "as released", duplicate["value"]),
    ]
    return pd.DataFrame(rows, columns=["metric", "definition", "value"])
