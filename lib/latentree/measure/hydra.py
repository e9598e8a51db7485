"""The Hydra effect (self-repair): what later components make up for when one is replaced.

The direct effect of what a component adds to the stream, a, on token t is (U_t - mean of U) . N(a),
with U the unembedding and N the final norm without its bias, its scale frozen at the clean run's
(McGrath et al. 2023). With the embedding's and the norm's bias's, all direct effects sum to t's
centred logit. All is in logits, on the true next token of a scored position (donors.py).

The mean is over the vocabulary, or over the words of t's role. The choice matters: a model may
raise all words of a role together, as its final stream grows longer. At the frozen scale that looks
like compensation, which the norm then takes back; among these words it cancels. The norm's own
rescaling can still give back a good part of a loss; it is told apart (`norm`) and no part's repair.

REPAIR is asked by a conjunction: something is removed, later parts give some of it back on average,
and more than where as long a random direction was taken away. The slope of what is given back on
what was removed does not decide it: a part that repairs in proportion repairs random losses, too.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
import torch
from scipy.stats import theilslopes

from latentree.evidence.intervals import bootstrap, ratio, t_interval
from latentree.inside.names import Internals, norm_gain, norm_scale, weight
from latentree.inside.trace import run

_WAYS = ("resample", "zero", "random")
_POINTS = ("stream", "attention", "mlp", "normed")
PARTS = 5  # of the sequences: each is judged where the others choose
_PARTS = {"layer": ("attention", "mlp"), "attention": ("attention",), "mlp": ("mlp",)}


def measure(model, stimulus, among="vocabulary", kinds=("layer", "attention")) -> pd.DataFrame:
    """All components of these kinds, each resampled on its own (`Ablations`).

    DataFrame (ablated, layer, responding, quantity, value, low, high, among, n): logits, 95 % over
    `n` sequences (Student's t), by `ablated` kind and `layer`. Quantities: removed, compensation,
    and change of the direct effect of a later layer, `responding` (-1 in the other rows).
    """
    runs, rows = Ablations(model, stimulus, among=among), []
    for kind, layer in product(kinds, range(runs.inside.layers)):
        found = runs.ablate(kind, layer)
        quantities = {(-1, "removed"): found.removed, (-1, "compensation"): found.compensation}
        for later in range(layer + 1, runs.inside.layers):
            quantities[later, "change"] = found.responses[:, later]
        values = torch.stack([*quantities.values()], 1)
        intervals = torch.stack(ratio(values, torch.ones_like(values)), 1).tolist()
        rows += [(kind, layer, *label, *interval) for label, interval in zip(quantities, intervals)]
    columns = ["ablated", "layer", "responding", "quantity", "value", "low", "high"]
    return pd.DataFrame(rows, columns=columns).assign(among=among, n=len(stimulus.at))


def slope(pairs) -> np.ndarray:
    """Least-squares slopes (draws,) of the second on the first of pairs (draws, sequence, 2)."""
    x, y = np.moveaxis(pairs - pairs.mean(1, keepdims=True), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(1) / (x * x).sum(1)


def repair_terms(model, stimulus, among=None, draws=3, by="attention") -> np.ndarray:
    """What replacing each layer's attention removes, and what later attentions give back.

    (layer, sequence, 4) in logits: removed, compensation, the compensation where as long a random
    direction is taken away (the mean of `draws` of them), and by how much less than what is removed
    the logit itself falls, after all later parts and the norm. With `by` "mlp" it is what MLPs give
    back: one that always takes half of what attention wrote would look like repair there (erasure,
    McGrath et al. 2023), so that repair is asked of attentions. An attention that erases passes,
    too: look whether its own direct effect rises above 0. Logits are centred over `among`: by
    default the words of the role, where the stimulus knows them (`peers`), else the vocabulary.
    """
    known = "vocabulary" if stimulus.peers is None else "role"
    runs = Ablations(model, stimulus, among=among or known)
    seeds = [stimulus.seed + 1000 * draw for draw in range(draws)]
    disturbed, terms = [runs.another("random", seed) for seed in seeds], []
    for layer in range(runs.inside.layers):
        found = runs.ablate("attention", layer)
        others = [getattr(one.ablate("attention", layer), by).sum(1) for one in disturbed]
        random = torch.stack(others).mean(0)
        given = getattr(found, by).sum(1)
        terms.append(torch.stack([found.removed, given, random, found.self_repair], 1))
    return torch.stack(terms).numpy()


def given_back(terms, of=np.minimum) -> np.ndarray:
    """Share of what was removed that later parts give back (draws,), of (draws, sequence, 4).

    The smaller of mean compensation and mean compensation beyond a random direction's, over what
    was removed: above 0 only if all three of a repair's conditions hold, where something is. For a
    loss that must be surely below 0, take the larger `of` the two: np.maximum.
    """
    removed, compensation, random, _ = np.moveaxis(terms.mean(1), -1, 0)
    return of(compensation, compensation - random) / removed


def reaching_the_logit(terms) -> np.ndarray:
    """`given_back`, but no more than the share of what was removed that the logit is spared.

    Where logits are centred over the vocabulary, later parts may raise many words together, which
    other parts and the norm take back; what does not reach the logit repairs nothing.
    """
    removed, *_, spared = np.moveaxis(terms.mean(1), -1, 0)
    return np.minimum(given_back(terms), spared / removed)


def cross_judged(terms, least: float, choose=np.nanargmax, share=given_back):
    """`repair_terms` (sequence, 4), each fifth of the sequences at the layer that the others name.

    So no layer is judged where it was chosen, and no sequence is lost. `choose` names the layer by
    its `share`, among those where more than `least` logits are removed (lower end of the mean's
    95 %) and something comes later. None if none is ever named, or if nothing is surely removed
    where they are judged: a share of nothing says nothing.
    """
    judged, part = [terms[0, :0]], np.arange(terms.shape[1]) % PARTS
    for own in range(PARTS):
        others = terms[:, part != own]
        enough = np.array([t_interval(one[:, 0])[1] > least and one[:, 1].any() for one in others])
        if enough.any():
            layer = choose(np.where(enough, share(others), np.nan))
            judged.append(terms[layer, part == own])
    judged = np.concatenate(judged)
    return judged if len(judged) and t_interval(judged[:, 0])[1] > 0 else None


def repairs(model, stimulus) -> pd.DataFrame:
    """`repair_terms` of every attention layer as a table for sweep().

    Columns layer, quantity, value, low, high (95 % over sequences), n. Quantities removed,
    compensation, random (logits), given back (a share, `given_back`), and two slopes of
    compensation on what was removed: by least squares, and Theil-Sen's, which outliers do not move.
    """
    rows = []
    for layer, terms in enumerate(repair_terms(model, stimulus)):
        found = dict(zip(("removed", "compensation", "random"), map(t_interval, terms.T)))
        if terms[:, 1].any():  # something comes later
            found["given back"] = bootstrap(terms, given_back, draws=500)
            found["slope"] = bootstrap(terms[:, :2], slope, draws=500)
            middle, _, low, high = theilslopes(terms[:, 1], terms[:, 0])
            found["Theil-Sen"] = (middle, low, high)
        rows += [(layer, quantity, *interval) for quantity, interval in found.items()]
    columns = ["layer", "quantity", "value", "low", "high"]
    return pd.DataFrame(rows, columns=columns).assign(n=len(stimulus.at))


@dataclass
class Effects:
    """Direct effects in one run, float64, first axis the sequence.

    `embedding`, `bias` (sequence,), `attention`, `mlp` (sequence, layer) sum to `frozen`; `frozen`,
    `logit` (sequence,): the centred logit with the clean run's scale and its own.
    """

    embedding: torch.Tensor
    attention: torch.Tensor
    mlp: torch.Tensor
    bias: torch.Tensor
    frozen: torch.Tensor
    logit: torch.Tensor


@dataclass
class Response:
    """What follows when a component is replaced, float64, first axis the sequence.

    `removed`: its direct effect, clean minus ablated; `total`: the change of the centred logit;
    `attention`, `mlp` (sequence, layer): changes of later components' direct effects, 0 for others;
    `norm`: by the final norm's rescaling. total = - removed + compensation + norm.
    """

    removed: torch.Tensor
    total: torch.Tensor
    attention: torch.Tensor
    mlp: torch.Tensor
    norm: torch.Tensor

    @property
    def responses(self):
        """Changes by layer (sequence, layer): its attention's and its MLP's."""
        return self.attention + self.mlp

    @property
    def compensation(self):
        """CE (sequence,): the sum of later components' changes."""
        return self.responses.sum(1)

    @property
    def self_repair(self):
        """How much less than the direct effect the logit falls (sequence,), the norm included."""
        return self.total + self.removed


class Ablations:
    """A clean run of a model on a stimulus (`clean`), and runs in which one component is replaced.

    `how`:
    - resample: by what it writes in another document, at a position of the same syntactic state;
    - zero: by 0;
    - random: by itself minus a random direction as long as what resampling takes away (for a layer
      as long as what both its parts lose together).
    It is replaced at the scored position, which alone is run again on the clean run's keys and
    values. `among`: logits are centred over the vocabulary, or the words of the target's role.
    Memory: all that components write, for all sequences at once.
    ValueError for another way, roles that are not known, or a position without a donor.
    """

    @torch.no_grad()
    def __init__(self, model, stimulus, how="resample", among="vocabulary"):
        if how not in _WAYS:
            raise ValueError(f"how = {how!r}: is unknown; use one of {', '.join(_WAYS)}")
        self.model, self.inside, self.how, self.seed = model, Internals(model), how, stimulus.seed
        tokens, at = (field.to(model.device) for field in (stimulus.tokens, stimulus.at))
        row, places = (torch.arange(size, device=model.device) for size in tokens.shape)
        self.places = row[:, None], at[:, None]
        self.tokens = tokens[self.places]
        self.donor = tuple(index.to(model.device)[self.places] for index in stimulus.same_state)
        alone = int((self.donor[0] == self.places[0]).sum())
        if alone:
            raise ValueError(
                f"stimulus: {alone} scored positions have no donor of their state in another "
                "document; give more sequences, or score other positions"
            )
        self.written = run(model, tokens, (*_POINTS, "cache"))
        table = weight(self.inside.unembedding).double()
        rivals = {"vocabulary": torch.ones(1, len(table)), "role": stimulus.peers}[among]
        if rivals is None:
            raise ValueError("among = 'role': the stimulus has no roles; make it with a grammar")
        rivals = rivals.to(table)
        self.direction = table[stimulus.target] - rivals @ table / rivals.sum(1, keepdim=True)
        scored = {point: self.written[point][..., row, at, :] for point in _POINTS}
        self.scale = norm_scale(self.inside.final_norm, scored["stream"][-1].double())
        self.clean = self._effects(scored)
        # The scored position alone is run again, and sees what came before it.
        seen = torch.cat([places < at[:, None], torch.ones_like(at[:, None])], 1)
        self.inputs = {"position_ids": at[:, None], "attention_mask": seen}
        self.inputs["past_key_values"] = self.written["cache"]

    def another(self, how: str, seed: int) -> Ablations:
        """Runs that replace in another way; the clean run is the same one."""
        runs = copy(self)
        runs.how, runs.seed = how, seed
        return runs

    def _effects(self, written: dict) -> Effects:
        """Direct effects of what a run wrote (..., sequence, width), by the clean run's scale."""
        norm = self.inside.final_norm

        def effect(vectors):  # (..., sequence, width) -> (sequence, ...)
            normed = norm_gain(norm, vectors.double()) * self.scale
            return (normed * self.direction).sum(-1).movedim(-1, 0).cpu()

        bias = getattr(norm, "bias", None)
        bias = (self.direction * (0 if bias is None else bias)).sum(-1).cpu()
        return Effects(
            embedding=effect(written["stream"][0]),
            attention=effect(written["attention"]),
            mlp=effect(written["mlp"]),
            bias=bias,
            frozen=effect(written["stream"][-1]) + bias,
            logit=(written["normed"].double() * self.direction).sum(-1).cpu(),
        )

    @torch.no_grad()
    def ablate(self, kind: str, layer: int, also=None) -> Response:
        """One run in which what a `layer`, its `attention` or its `mlp` adds is replaced.

        `also` are further changes of this run, as `trace.run` takes them.
        """
        change = {}
        for point, new in self.replacement(kind, layer).items():
            change[point, layer] = lambda written, new=new: new
        written = run(self.model, self.tokens, _POINTS, change | (also or {}), **self.inputs)
        self.written["cache"].crop(-1)  # which this run has made one position longer
        after = self._effects({point: written[point][..., 0, :] for point in _POINTS})
        clean, parts, layers = self.clean, _PARTS[kind], torch.arange(self.inside.layers)
        changes = {"attention": after.attention - clean.attention, "mlp": after.mlp - clean.mlp}
        return Response(
            removed=-sum(changes[part][:, layer] for part in parts),
            total=after.logit - clean.logit,
            attention=changes["attention"] * (layers > layer),
            mlp=changes["mlp"] * (layers > layer if "mlp" in parts else layers >= layer),
            norm=after.logit - after.frozen,
        )

    @torch.no_grad()
    def replacement(self, kind: str, layer: int) -> dict:
        """{point: what takes the place of what is written there (sequence, 1, width)}."""
        own, new = {}, {}
        for point in _PARTS[kind]:
            written = self.written[point][layer]
            own[point] = written[self.places]
            new[point] = torch.zeros_like(own[point]) if self.how == "zero" else written[self.donor]
        if self.how == "random":
            lost = sum(own[point] - new[point] for point in own)
            generator = torch.Generator().manual_seed(self.seed + layer * self.inside.heads)
            drawn = torch.randn(lost.shape, generator=generator).to(lost)
            drawn = drawn * lost.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
            first = _PARTS[kind][0]
            new = own | {first: own[first] - drawn}
        return new
