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

_TOLD = ("removed", "total", "compensation")
_WAYS = ("resample", "anywhere", "mean", "zero", "random")
_POINTS = ("stream", "z", "attention", "mlp", "normed")
_PARTS = {"layer": ("attention", "mlp"), "attention": ("attention",), "mlp": ("mlp",)}


def measure(model, stimulus, among="vocabulary", kinds=("layer", "attention")) -> pd.DataFrame:
    """All components of these kinds, each resampled on its own (`Ablations`): a table for sweep().

    `value` in logits, `low` and `high` bound 95 % over `n` sequences (Student's t; slope:
    bootstrap). Quantities, by `ablated` kind and `layer`: change of the direct effect of a later
    layer, `responding` (-1 in the other rows); removed, total, compensation; slope of compensation
    on what is removed, over sequences.
    """
    runs, rows = Ablations(model, stimulus, among=among), []
    for kind, layer in product(kinds, range(runs.inside.layers)):
        found = runs.ablate(kind, layer)
        quantities = {(-1, name): getattr(found, name) for name in _TOLD}
        for later in range(layer + 1, runs.inside.layers):
            quantities[later, "change"] = found.responses[:, later]
        values = torch.stack([*quantities.values()], 1)
        intervals = torch.stack(ratio(values, torch.ones_like(values)), 1).tolist()
        intervals = dict(zip(quantities, intervals))
        if found.compensation.any():  # something comes later
            intervals[-1, "slope"] = bootstrap(found.pairs, slope, draws=500)
        rows += [(kind, layer, *label, *interval) for label, interval in intervals.items()]
    columns = ["ablated", "layer", "responding", "quantity", "value", "low", "high"]
    return pd.DataFrame(rows, columns=columns).assign(among=among, n=len(stimulus.at))


def slope(pairs) -> np.ndarray:
    """Least-squares slopes (draws,) of the second on the first of pairs (draws, sequence, 2)."""
    x, y = np.moveaxis(pairs - pairs.mean(1, keepdims=True), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(1) / (x * x).sum(1)


def repair_terms(model, stimulus, among="vocabulary", draws=3, by="attention") -> np.ndarray:
    """What replacing each layer's attention removes, and what later attentions give back.

    (layer, sequence, 4) in logits: removed, compensation, the compensation where as long a random
    direction is taken away (the mean of `draws` of them), and by how much less than what is removed
    the logit itself falls, after all later parts and the norm. With `by` "mlp" it is what MLPs give
    back: one that always takes half of what attention wrote would look like repair there (erasure,
    McGrath et al. 2023), so that repair is asked of attentions. An attention that erases passes,
    too: look whether its own direct effect rises above 0.
    """
    runs = Ablations(model, stimulus, among=among)
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
    """`repair_terms` (sequence, 4), each half of the sequences at the layer the other half names.

    So no layer is judged where it was chosen, and no sequence is lost. `choose` names the layer by
    its `share`, among those where more than `least` logits are removed (lower end of the mean's
    95 %) and something comes later. None if neither half names one, or if nothing is surely removed
    where they are judged: a share of nothing says nothing.
    """
    judged = [terms[0, :0]]
    for first in (0, 1):
        half = terms[:, first::2]
        enough = np.array([t_interval(one[:, 0])[1] > least and one[:, 1].any() for one in half])
        if enough.any():
            layer = choose(np.where(enough, share(half), np.nan))
            judged.append(terms[layer, 1 - first :: 2])
    judged = np.concatenate(judged)
    return judged if len(judged) and t_interval(judged[:, 0])[1] > 0 else None


def repairs(model, stimulus, among="vocabulary", draws=3) -> pd.DataFrame:
    """`repair_terms` of every attention layer as a table for sweep().

    Columns layer, quantity, value, low, high (95 % over sequences), n. Quantities removed,
    compensation, random (logits), given back (a share, `given_back`), and two slopes of
    compensation on what was removed: slope, by least squares, and Theil-Sen's, which outliers do
    not move.
    """
    rows = []
    for layer, terms in enumerate(repair_terms(model, stimulus, among, draws)):
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

    `embedding`, `bias` (sequence,), `attention`, `mlp` (sequence, layer), `head` (sequence, layer,
    head); `frozen`, `logit` (sequence,): the centred logit with the clean run's scale and its own.
    Embedding, attention, MLPs and bias sum to `frozen`; heads, with o_proj's bias, to attention.
    """

    embedding: torch.Tensor
    attention: torch.Tensor
    mlp: torch.Tensor
    head: torch.Tensor
    bias: torch.Tensor
    frozen: torch.Tensor
    logit: torch.Tensor


@dataclass
class Response:
    """What follows when a component (`kind`, `layer`, `number` of the head or -1) is replaced.

    float64, first axis the sequence. `removed`: its direct effect, clean minus ablated (of a head,
    all that its attention loses); `total`: the change of the centred logit; `attention`, `mlp`
    (sequence, layer), `head` (sequence, layer, head): changes of later components' direct effects,
    0 for others; `norm`: by the final norm's rescaling. total = - removed + compensation + norm.
    """

    kind: str
    layer: int
    number: int
    removed: torch.Tensor
    total: torch.Tensor
    attention: torch.Tensor
    mlp: torch.Tensor
    head: torch.Tensor
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

    @property
    def pairs(self) -> np.ndarray:
        """What is removed and its compensation (sequence, 2), to regress the one on the other."""
        return torch.stack([self.removed, self.compensation], 1).numpy()


class Ablations:
    """A clean run of a model on a stimulus (`clean`), and runs in which one component is replaced.

    `how`:
    - resample: by what it writes in another document, at a position of the same syntactic state;
    - anywhere: in another document, at any position; mean: by its mean over positions; zero: by 0;
    - random: by itself minus a random direction as long as what resampling takes away (in the
      stream, and for a layer as long as what both its parts lose together).
    It is replaced at the scored position, which alone is run again on the clean run's keys and
    values, or `everywhere`. `among`: logits are centred over the vocabulary, or the words of the
    target's role. Memory: all that components write, for all sequences at once.
    ValueError for another way, roles that are not known, or a position without a donor.
    """

    @torch.no_grad()
    def __init__(self, model, stimulus, how="resample", everywhere=False, among="vocabulary"):
        if how not in _WAYS:
            raise ValueError(f"how = {how!r}: is unknown; use one of {', '.join(_WAYS)}")
        self.model, self.inside, self.how, self.seed = model, Internals(model), how, stimulus.seed
        tokens, at = (field.to(model.device) for field in (stimulus.tokens, stimulus.at))
        row, places = (torch.arange(size, device=model.device) for size in tokens.shape)
        donor = stimulus.any_state if how == "anywhere" else stimulus.same_state
        sequence, position = (index.to(model.device) for index in donor)
        alone = int((sequence[row, at] == row).sum())
        if alone and how not in ("mean", "zero"):
            raise ValueError(
                f"how = {how!r}: {alone} scored positions have no donor of their state in another "
                "document; give more sequences, score other positions, or use 'anywhere'"
            )
        self.written = run(model, tokens, _POINTS if everywhere else (*_POINTS, "cache"))
        table = weight(self.inside.unembedding).double()
        rivals = {"vocabulary": torch.ones(1, len(table)), "role": stimulus.peers}[among]
        if rivals is None:
            raise ValueError("among = 'role': the stimulus has no roles; make it with a grammar")
        rivals = rivals.to(table)
        self.direction = table[stimulus.target] - rivals @ table / rivals.sum(1, keepdim=True)
        stream = self.written["stream"][-1, row, at].double()
        self.scale = norm_scale(self.inside.final_norm, stream)
        self.clean = self._effects(self.written, row, at)
        self.inputs = {}
        if everywhere:
            self.places, self.scored = (row[:, None], places[None]), (row, at)
        else:  # the scored position alone is run again, and sees what came before it
            self.places, self.scored = (row[:, None], at[:, None]), (row, torch.zeros_like(at))
            seen = torch.cat([places < at[:, None], torch.ones_like(at[:, None])], 1)
            self.inputs = {"position_ids": at[:, None], "attention_mask": seen}
            self.inputs["past_key_values"] = self.written["cache"]
        self.tokens = tokens[self.places]
        self.donor = sequence[self.places], position[self.places]

    def another(self, how: str, seed: int) -> Ablations:
        """Runs that replace in another way, mean, zero or random; the clean run is the same one."""
        runs = copy(self)
        runs.how, runs.seed = how, seed
        return runs

    def _effects(self, written: dict, row, column) -> Effects:
        """Direct effects of what a run wrote at (row, column), read with the clean run's scale."""
        norm = self.inside.final_norm

        def effect(vectors):  # (..., sequence, width) -> (sequence, ...)
            normed = norm_gain(norm, vectors.double()) * self.scale
            return (normed * self.direction).sum(-1).movedim(-1, 0).cpu()

        here = {point: written[point][..., row, column, :] for point in _POINTS if point != "z"}
        z = written["z"][:, row, column]
        heads = [self.inside.head_written(layer, one) for layer, one in enumerate(z)]
        bias = getattr(norm, "bias", None)
        bias = (self.direction * (0 if bias is None else bias)).sum(-1).cpu()
        return Effects(
            embedding=effect(here["stream"][0]),
            attention=effect(here["attention"]),
            mlp=effect(here["mlp"]),
            head=effect(torch.stack(heads).transpose(1, 2)),
            bias=bias,
            frozen=effect(here["stream"][-1]) + bias,
            logit=(here["normed"].double() * self.direction).sum(-1).cpu(),
        )

    @torch.no_grad()
    def ablate(self, kind: str, layer: int, head: int = -1, also=None) -> Response:
        """One run in which what a `layer`, its `attention`, `mlp` or `head` adds is replaced.

        `also` are further changes of this run, as `trace.run` takes them.
        """
        new = self.replacement(kind, layer, head)

        def put(point):
            return lambda written: new[point]

        change = {(point, layer): put(point) for point in new} | (also or {})
        written = run(self.model, self.tokens, _POINTS, change, **self.inputs)
        if "cache" in self.written:
            self.written["cache"].crop(-1)  # which this run has made one position longer
        after, clean = self._effects(written, *self.scored), self.clean
        changes = {"attention": after.attention - clean.attention, "mlp": after.mlp - clean.mlp}
        parts = ("attention",) if kind == "head" else _PARTS[kind]
        layers = torch.arange(self.inside.layers)
        later = layers > layer
        return Response(
            kind=kind,
            layer=layer,
            number=head,
            removed=-sum(changes[part][:, layer] for part in parts),
            total=after.logit - clean.logit,
            attention=changes["attention"] * later,
            mlp=changes["mlp"] * (later if "mlp" in parts else layers >= layer),
            head=(after.head - clean.head) * later[:, None],
            norm=after.logit - after.frozen,
        )

    @torch.no_grad()
    def replacement(self, kind: str, layer: int, head: int = -1) -> dict:
        """{point: what takes the place of all that is written there}, where it is run again."""
        points = ("z",) if kind == "head" else _PARTS[kind]
        if kind == "head" and not 0 <= head < self.inside.heads:
            raise ValueError(f"head = {head}: give a number from 0 to {self.inside.heads - 1}")
        own, new = {}, {}
        for point in points:
            written = self.written[point][layer]
            written = written[:, :, head] if kind == "head" else written
            own[point] = written[self.places]
            if self.how == "zero":
                new[point] = torch.zeros_like(own[point])
            elif self.how == "mean":
                new[point] = written.mean((0, 1)).expand_as(own[point])
            else:
                new[point] = written[self.donor]
        if self.how == "random":
            lost = sum(own[point] - new[point] for point in points)
            seed = self.seed + layer * self.inside.heads + head + 1
            drawn = torch.randn(lost.shape, generator=torch.Generator().manual_seed(seed)).to(lost)
            adds = self.inside.w_o(layer)[head] if kind == "head" else torch.eye(lost.shape[-1])
            length = (lost @ adds.to(lost)).norm(dim=-1, keepdim=True)
            drawn = drawn * length / (drawn @ adds.to(lost)).norm(dim=-1, keepdim=True)
            new = own | {points[0]: own[points[0]] - drawn}
        if kind == "head":
            z = self.written["z"][layer][self.places].clone()
            z[:, :, head] = new["z"]
            new["z"] = z
        return new
