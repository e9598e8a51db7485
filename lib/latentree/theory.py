"""Tests of the paper's theorem and assumptions on models of the two-level process (two_level.py).

A query token is predicted at the cue before it. All that is asked here is asked of the last query of a sequence, before
which most is known of the global latent z0.
"""

import pandas as pd
import torch
from nnsight import NNsight

from latentree.interventions import heads_and_logits
from latentree.internals import Internals
from latentree.model import log_probabilities, next_token_losses
from latentree.statistics import ratio
from latentree.two_level import TwoLevel, exchanged, predictive


def floors(model, process: TwoLevel, tokens: torch.Tensor) -> pd.DataFrame:
    """A model's loss by position beside the exact predictor's, nats: DataFrame (position, segment, place, value, low, high, exact).

    `position` is that of the token that is predicted, from the second one on; 95 % over sequences. `exact` is the exact
    predictor's loss on the same tokens, the floor up to chance.
    """
    targets = tokens[:, 1:, None]
    own, exact = (-log_p[:, at].gather(-1, targets)[..., 0].double() for log_p, at in
                  ((log_probabilities(model, tokens), slice(-1)), (predictive(process, tokens), slice(1, None))))  # fmt: skip
    value, low, high = (part.numpy() for part in ratio(own, torch.ones_like(own)))
    position = torch.arange(1, tokens.shape[1])
    return pd.DataFrame({"position": position, "segment": position // process.length, "place": position % process.length,
                         "value": value, "low": low, "high": high, "exact": exact.mean(0)})  # fmt: skip


def distance_effects(model, process: TwoLevel, tokens, z0, distances, seed: int = 0) -> pd.DataFrame:
    """By how many nats the last query token costs more when one earlier segment is another latent's (`exchanged`).

    DataFrame (distance, effect, exact, share, low, high): means of the model's and the exact predictor's change, and their
    ratio with 95 % over sequences. Theorem 1's retrieval does not depend on the distance: nor does the exact effect.
    """
    last, rows = tokens[:, -1], []

    def told(batch):
        row = torch.arange(len(batch))
        return log_probabilities(model, batch)[row, -2, last].double(), predictive(process, batch)[row, -1, last]

    before = told(tokens)
    for distance in distances:
        after = told(exchanged(process, tokens, z0, distance, seed))
        own, exact = (b - a for b, a in zip(before, after, strict=True))
        rows.append((distance, float(own.mean()), float(exact.mean()), *map(float, ratio(own, exact))))
    return pd.DataFrame(rows, columns=["distance", "effect", "exact", "share", "low", "high"])


def other_latent(z0: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """For each sequence the number of one with another z0 (sequence,), drawn with `seed`."""
    return torch.multinomial((z0[:, None] != z0).double(), 1, generator=torch.Generator().manual_seed(seed))[:, 0]


@torch.no_grad()
def reuse(model, process: TwoLevel, tokens, z0, seed: int = 0) -> pd.DataFrame:
    """Whether the last query follows a global latent patched into the stream: DataFrame (layer, value, low, high, mass).

    At the last tokens of all earlier segments the residual stream after a layer is replaced by that of a sequence with
    another z0; value is the share of sequences whose prediction then gives more to the donor's block of tokens than to the
    own (layer -1: without a patch), mass the mean of p(donor's) / (p(donor's) + p(own)). The segment itself is left as it
    is. 95 % over sequences.
    """
    donor, ends = other_latent(z0, seed), process.queries[:-1]
    block = torch.arange(process.cue) // (process.cue // len(process.log_z0))
    traced = NNsight(model)
    inside = Internals(model, traced)

    def follows(log_p):
        mass = torch.zeros(len(tokens), len(process.log_z0)).index_add(1, block, log_p.exp()[:, : process.cue].cpu())
        row = torch.arange(len(tokens))
        theirs, own = (mass[row, latent].double() for latent in (z0[donor], z0))
        return (theirs > own).double(), float((theirs / (theirs + own)).mean())

    given = tokens.to(model.device)
    with traced.trace(input_ids=given, use_cache=False):
        streams = [block_.output for block_ in inside.blocks].save()
        clean = traced.output.logits[:, -2].save()
    found = {-1: follows(clean.log_softmax(-1))}
    for layer, stream in enumerate(streams):
        with traced.trace(input_ids=given, use_cache=False):
            inside.blocks[layer].output[:, ends] = stream[donor][:, ends]
            logits = traced.output.logits[:, -2].save()
        found[layer] = follows(logits.log_softmax(-1))
    rows = [(layer, *map(float, ratio(values, torch.ones_like(values))), mass) for layer, (values, mass) in found.items()]
    return pd.DataFrame(rows, columns=["layer", "value", "low", "high", "mass"])


@torch.no_grad()
def specialisation(model, process: TwoLevel, tokens, z0, seed: int = 0) -> pd.DataFrame:
    """Which heads carry what earlier segments say, and which what the current one says: DataFrame (layer, head, earlier, current).

    At the last cue: the squared change of a head's contribution when the tokens of all earlier segments, or the evidence
    of the current one, come from a sequence with another z0, over twice the contribution's variance over sequences. 0
    says untouched, 1 changed as if for another sequence.
    """
    donor, current = other_latent(z0, seed), torch.arange(tokens.shape[1]) >= tokens.shape[1] - process.length
    inside = Internals(model)

    def written(batch):
        z = heads_and_logits(model, batch.to(model.device))[0][:, :, -2]
        return torch.stack([inside.head_written(layer, part) for layer, part in enumerate(z)]).double().cpu()

    clean = written(tokens)
    spread = 2 * clean.var(1).sum(-1)
    found = {"earlier": torch.where(current, tokens, tokens[donor]), "current": torch.where(current, tokens[donor], tokens)}
    found = {name: (written(batch) - clean).square().mean(1).sum(-1) / spread for name, batch in found.items()}
    rows = [(layer, head, *(float(found[name][layer, head]) for name in found)) for layer in range(inside.layers) for head in range(inside.heads)]
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
            jacobian = torch.stack([(run(layer, head, length * step) - clean) / length for step in steps], 1)
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
            next_token_losses(model(input_ids=given, use_cache=False).logits, given)[:, -1].sum().backward()
    finally:
        for one in hooks:
            one.remove()
        model.zero_grad()
    vectors = []
    for layer, z in enumerate(kept):
        by_head = z.grad[:, -2].unflatten(-1, (inside.heads, inside.head_dim))
        for head, w_o in enumerate(inside.w_o(layer).detach()):
            vectors.append(by_head[:, head] @ torch.linalg.pinv(w_o).T)  # g_z = W_O g, so pinv(W_O) g_z is g's projection
    unit = torch.nn.functional.normalize(torch.stack(vectors, 1).double(), dim=-1)
    return (unit @ unit.mT).mean(0).cpu()


@torch.no_grad()
def curvature(model, process: TwoLevel, tokens, z0, layer: int, head: int, seed: int = 0, random: bool = False) -> torch.Tensor:
    """A6: u'Hu of the true last query token's log-odds of its block along a redundant direction u of a head: (sequence,).

    u is how the head's contribution at the last cue differs from that in a sequence with another z0 (or, `random`, a
    direction as long); H is the Hessian of the logit of the true token minus the mean of all, in the stream after the
    layer's attention, by a second difference of steps u and -u. Negative is concave.
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

    return (target(1.0) - 2 * target(0.0) + target(-1.0)).cpu()
