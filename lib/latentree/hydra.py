"""The Hydra effect (self-repair): what later components make up for when the contribution of an earlier one is replaced.

The direct effect of what a component adds to the stream, a, on token t is (U_t - mean of U) . N(a), with U the unembedding
and N the final norm without its bias, its scale frozen at the clean run's (McGrath et al. 2023). With the embedding's and
the norm's bias's, all direct effects sum to t's centred logit. Everything is in logits, on the true next token of one
scored position in each sequence (resampling.py).

The mean is over the vocabulary, or over the words of t's role. The choice matters: a model may raise all words of a role
together, by an amount that follows how long its final stream is. At the frozen scale of the clean run that looks like a
compensation, which the norm then takes back; among the words of the role it cancels.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from nnsight import NNsight

from latentree.errors import UserError
from latentree.internals import Internals, norm_gain, norm_scale, weight, written_in
from latentree.interventions import check_heads
from latentree.resampling import Stimulus
from latentree.statistics import bootstrap, ratio

WAYS = ("resample", "anywhere", "mean", "zero", "random")
PLACES = ("scored", "everywhere")
AMONG = ("vocabulary", "role")
SITES = {"layer": ("attention", "mlp"), "attention": ("attention",), "mlp": ("mlp",), "head": ("z",)}
LABELS = ["ablated", "layer", "head", "responding", "responding_layer", "responding_head", "quantity"]
COLUMNS = ["how", "where", "among", *LABELS, "value", "low", "high", "n"]


KINDS = ("layer", "attention", "head")


def measure(model, stimulus, how="resample", where="scored", among="vocabulary", kinds=KINDS) -> pd.DataFrame:
    """All components of these kinds, each replaced on its own (`Ablations`): one table in COLUMNS, for sweep().

    One clean run and one per component. Values are in logits, low and high bound 95 % over the n sequences (Student's t;
    slope and R2: bootstrap); numbers that do not apply are -1. By `ablated`, `layer`, `head`:
    - clean: direct effects of the clean run (`responding` says whose), and the logit;
    - change: of the direct effect of a later component, named by `responding`, `responding_layer`, `responding_head`;
    - removed, total, compensation, self-repair and its parts by attention, by mlp, by norm; fraction, fraction by ..: the
      same over the mean removed direct effect;
    - slope, R2: of compensation on the removed direct effect, over sequences. A slope above 0 is the Hydra effect.
    """
    runs = Ablations(model, stimulus, how, where, among)
    rows, fits = clean_rows(runs.clean), []
    for kind in kinds:
        for layer in range(runs.inside.layers):
            for head in range(runs.inside.heads) if kind == "head" else (-1,):
                found = runs.ablate(kind, layer, head)
                rows |= response_rows(found)
                pairs = torch.stack([found.removed, found.compensation], 1).numpy()
                if pairs[:, 1].any():  # something comes later
                    for name, statistic in (("slope", slope), ("R2", r_squared)):
                        fits.append((kind, layer, head, "all", -1, -1, name, *bootstrap(pairs, statistic, draws=500)))
    values = torch.stack(list(rows.values()), 1)
    intervals = torch.stack(ratio(values, torch.ones_like(values)), 1).tolist()
    table = [(*label, *interval) for label, interval in zip(rows, intervals, strict=True)] + fits
    table = pd.DataFrame(table, columns=[*LABELS, "value", "low", "high"])
    return table.assign(how=how, where=where, among=among, n=len(values))[COLUMNS]


def clean_rows(clean: Effects) -> dict:
    """{label (as LABELS): values (sequence,)} of a clean run."""
    rows = {("clean", -1, -1, "all", -1, -1, "logit"): clean.logit}
    rows |= {("clean", -1, -1, name, -1, -1, "direct effect"): getattr(clean, name) for name in ("embedding", "bias")}
    return rows | later_rows(("clean", -1, -1), "direct effect", clean, 0, 0)


def response_rows(found: Response) -> dict:
    """{label (as LABELS): values (sequence,)} of a replaced component."""
    label = (found.kind, found.layer, found.number)
    parts = {"": found.self_repair, " by attention": found.attention.sum(1), " by mlp": found.mlp.sum(1)}
    rows = {"removed": found.removed, "total": found.total, "compensation": found.compensation}
    for name, part in (parts | {" by norm": found.norm}).items():
        share = part.mean() / found.removed.mean()
        rows["self-repair" + name] = part
        # Its mean is the share, and its spread that of the linearised ratio (Cochran 1977, 6.4).
        rows["fraction" + name] = share + (part - share * found.removed) / found.removed.mean()
    rows = {(*label, "all", -1, -1, name): values for name, values in rows.items()}
    return rows | later_rows(label, "change", found, found.layer + 1, found.layer + ("mlp" in SITES[found.kind]))


def later_rows(label, quantity, found, first, first_mlp) -> dict:
    """{label: values (sequence,)} of MLPs from layer `first_mlp` on; from `first` on of attention, both, and heads."""
    layers = range(first_mlp, found.mlp.shape[1])
    rows = {(*label, "mlp", layer, -1, quantity): found.mlp[:, layer] for layer in layers}
    for layer in range(first, found.mlp.shape[1]):
        rows[*label, "attention", layer, -1, quantity] = found.attention[:, layer]
        rows[*label, "layer", layer, -1, quantity] = found.attention[:, layer] + found.mlp[:, layer]
        rows |= {(*label, "head", layer, h, quantity): found.head[:, layer, h] for h in range(found.head.shape[2])}
    return rows


def slope(pairs):
    """Least-squares slopes (draws,) of the second on the first of pairs (draws, sequence, 2); nan if that is constant."""
    x, y = np.moveaxis(pairs - pairs.mean(1, keepdims=True), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(1) / (x * x).sum(1)


def r_squared(pairs):
    """Shares of explained variance (draws,) of the same regressions."""
    return slope(pairs) * slope(pairs[..., ::-1])


def most_repaired(runs: Ablations) -> tuple[Response, torch.Tensor]:
    """The attention layer whose loss is best made up for, and which sequences (sequence,) may score it.

    It is chosen, on every other sequence, by the highest correlation of compensation with removed direct effect; the rest
    have no part in the choice. The last layer, after which too little comes, is left out.
    """
    chooses = torch.arange(len(runs.clean.logit)) % 2 == 0

    def correlation(found):
        pairs = torch.stack([found.removed, found.compensation])[:, chooses]
        return float(torch.corrcoef(pairs)[0, 1].nan_to_num(-1.0))

    found = [runs.ablate("attention", layer) for layer in range(runs.inside.layers - 1)]
    return max(found, key=correlation), ~chooses


@torch.no_grad()
def as_released(model, tokens, furthest: int = 2):
    """The release's measurement: clean (layer, batch) and ablated (m, layer, batch) logits, m = 1 .. `furthest`.

    The logit of the CURRENT token at the last position of `tokens` (batch, position), by unembedding the stream after each
    block without the final norm; ablated: when the whole stream after the block m layers before is set to 0. Not a number
    where there is no such block. In a model without biases a block maps 0 to 0, so nothing of this can show compensation.
    """
    traced = NNsight(model)
    inside = Internals(model, traced)
    row = weight(model.lm_head)[tokens[:, -1]]

    def logits(erased=-1):
        with traced.trace(input_ids=tokens, use_cache=False, logits_to_keep=1):
            streams = []
            for layer in range(inside.layers):
                if layer == erased:
                    inside.blocks[layer].output = torch.zeros_like(inside.blocks[layer].output)
                streams.append(inside.blocks[layer].output[:, -1])
            streams.save()
        return (torch.stack(streams) * row).sum(-1)

    clean = logits()
    ablated = torch.full((furthest, *clean.shape), torch.nan, device=clean.device)
    for erased in range(inside.layers - 1):
        found = logits(erased)
        for m in range(1, min(furthest, inside.layers - 1 - erased) + 1):
            ablated[m - 1, erased + m] = found[erased + m]
    return clean, ablated


def measure_as_released(model, tokens, furthest: int = 2) -> pd.DataFrame:
    """`as_released` as a table for sweep(): m, layer, and means over the batch of clean and ablated, with 95 % of clean."""
    clean, ablated = as_released(model, tokens.to(model.device), furthest)
    middle, low, high = ratio(clean.T.cpu().double(), torch.ones_like(clean.T.cpu()).double())
    rows = [(m + 1, layer, float(middle[layer]), float(low[layer]), float(high[layer]), float(ablated[m, layer].mean()))
            for m in range(furthest) for layer in range(m + 1, len(clean))]  # fmt: skip
    return pd.DataFrame(rows, columns=["m", "layer", "clean", "low", "high", "ablated"])


@contextmanager
def counted(model):
    """Counts what a model does inside the block: yields {"runs": forward passes, "tokens": positions computed in them}."""
    seen = {"runs": 0, "tokens": 0}

    def count(module, args, given):
        seen["runs"] += 1
        seen["tokens"] += (args[0] if args else given["input_ids"]).numel()

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def check_choice(name: str, value, known) -> None:
    """Raises UserError unless `value` is one of `known`."""
    if value not in known:
        raise UserError(f"{name} = {value!r}: is unknown; use one of {', '.join(known)}")


@dataclass
class Effects:
    """Direct effects in one run, float64, first axis the sequence.

    `embedding` and `bias` (sequence,), `attention` and `mlp` (sequence, layer), `head` (sequence, layer, head); `frozen`
    and `logit` (sequence,): the centred logit with the clean run's scale and with the run's own. Embedding, attention, MLPs
    and bias sum to `frozen`; heads sum to their attention, but for the bias of o_proj.
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
    """What follows when a component (`kind`, `layer`, `number` of the head or -1) is replaced, float64.

    First axis the sequence. `removed`: its direct effect, clean minus ablated; `total`: the change of the centred logit;
    `attention`, `mlp` (sequence, layer), `head` (sequence, layer, head): changes of later components' direct effects, 0
    for the others; `norm`: what the final norm's rescaling adds. The sums over layers give total = - removed + attention +
    mlp + norm. What replaces a head in OLMo 2 also changes the norm that its layer's heads share: all of it is removed.
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
    def compensation(self):
        """CE (sequence,): the sum of later components' changes."""
        return self.attention.sum(1) + self.mlp.sum(1)

    @property
    def self_repair(self):
        """What the logit falls less than the direct effect (sequence,): the change of the one minus that of the other."""
        return self.total + self.removed


class Ablations:
    """A clean run of a model on a stimulus (`clean`, its Effects), and runs in which one component is replaced.

    `how`, a component's contribution is replaced:
    - resample: by its contribution in another document, at a position of the same syntactic state;
    - anywhere: in another document, at any position;  mean: by its mean over all positions;  zero: by nothing;
    - random: by itself minus a random direction as long as what resampling takes away (in the stream, and for a layer
      as long as what both its parts lose together).
    `where`: at the scored position only, or everywhere. Where the scored position alone changes, it alone is run again, on
    the clean run's keys and values. Memory: all that the components write at all positions, for all sequences at once.
    `among`: logits are centred over the whole vocabulary, or over the words of the target's role.
    UserError for another way, place or mean, roles that are not known, a single sequence, or a position without a donor.
    """

    def __init__(self, model, stimulus: Stimulus, how: str = "resample", where: str = "scored", among: str = "vocabulary"):
        for name, value, known in (("how", how, WAYS), ("where", where, PLACES), ("among", among, AMONG)):
            check_choice(name, value, known)
        if among == "role" and stimulus.peers is None:
            raise UserError("among = 'role': the stimulus does not know roles; make it with a grammar, or use 'vocabulary'")
        self.model, self.inside, self.stimulus, self.how = model, Internals(model), stimulus, how
        tokens, at, target = (x.to(model.device) for x in (stimulus.tokens, stimulus.at, stimulus.target))
        count, length = tokens.shape
        if count < 2:
            raise UserError(f"tokens: has {count} sequence, and replacements come from other ones; give 2 or more")
        rows = torch.arange(count, device=model.device)[:, None]
        scored = where == "scored"
        self.places = (rows, at[:, None] if scored else torch.arange(length, device=model.device)[None])
        donor = [x.to(model.device) for x in (stimulus.any_state if how == "anywhere" else stimulus.same_state)]
        alone = int((donor[0] == rows)[rows[:, 0], at].sum())
        if alone and how not in ("mean", "zero"):
            raise UserError(f"how = {how!r}: {alone} scored positions have no donor of their state in another document; "
                            "give more sequences, score other positions, or use 'anywhere'")  # fmt: skip
        self.donor = [x[self.places] for x in donor]
        self.given = {"input_ids": tokens, "use_cache": scored}
        self.written = written_in(model, self.given)
        table, row = weight(self.inside.unembedding).detach().double(), torch.arange(count, device=model.device)
        others = torch.ones(1, len(table)) if among == "vocabulary" else stimulus.peers
        others = others.to(table)
        self.direction = table[target] - others @ table / others.sum(1, keepdim=True)
        self.scale = norm_scale(self.inside.final_norm, self.written["stream"][row, at].double())
        self.clean = self.effects(self.written, at)
        self.cached, self.column = scored, torch.zeros_like(at) if scored else at
        if scored:
            seen = torch.arange(length + 1, device=model.device) < at[:, None]
            seen[:, -1] = True  # the position itself, whose key and value come last
            mask = torch.zeros(seen.shape, dtype=model.dtype, device=model.device)
            mask = mask.masked_fill(~seen, torch.finfo(model.dtype).min)[:, None, None]
            self.given = {"input_ids": tokens.gather(1, at[:, None]), "position_ids": at[:, None], "attention_mask": mask,
                          "past_key_values": self.written["cache"], "use_cache": True}  # fmt: skip

    @torch.no_grad()
    def effects(self, written: dict, column) -> Effects:
        """Direct effects of what a run wrote in `column` (sequence,), read with the clean run's scale."""
        inside, row = self.inside, torch.arange(len(column), device=column.device)

        def read(vectors):  # (..., sequence, width) -> (sequence, ...)
            effect = (norm_gain(inside.final_norm, vectors.double()) * self.scale * self.direction).sum(-1)
            return effect.movedim(-1, 0).cpu()

        found = {name: written[name][..., row, column, :] for name in ("embedding", "stream", "normed", "attention", "mlp")}
        heads = [inside.head_written(layer, z[row, column]).transpose(0, 1) for layer, z in enumerate(written["z"])]
        bias = getattr(inside.final_norm, "bias", None)
        bias = (self.direction * (0 if bias is None else bias)).sum(-1).cpu()
        logit = (found["normed"].double() * self.direction).sum(-1).cpu()
        parts = (read(found[name]) for name in ("embedding", "attention", "mlp"))
        return Effects(*parts, read(torch.stack(heads)), bias, read(found["stream"]) + bias, logit)

    def ablate(self, kind: str, layer: int, head: int = -1) -> Response:
        """Replaces what a `layer` adds to the stream, its `attention`, its `mlp` or one `head`. One run.

        UserError for another kind, or a layer or head that the model does not have.
        """
        check_choice("kind", kind, SITES)
        check_heads(self.inside, [(layer, head if kind == "head" else 0)])
        new = self.replacement(kind, layer, head)
        written = written_in(self.model, self.given, layer, new)
        if self.cached:
            written["cache"].crop(-1)
        after, layers = self.effects(written, self.column), torch.arange(self.inside.layers)
        change = {name: getattr(after, name) - getattr(self.clean, name) for name in ("attention", "mlp", "head", "logit")}
        sites = ("attention",) if kind == "head" else SITES[kind]  # of a head, what its layer's attention loses with it
        own = sum(change[site][:, layer] for site in sites)
        later, same = layers > layer, (layers == layer) & ("mlp" not in SITES[kind])
        parts = change["attention"] * later, change["mlp"] * (later | same), change["head"] * later[:, None]
        return Response(kind, layer, head, -own, change["logit"], *parts, after.logit - after.frozen)

    @torch.no_grad()
    def replacement(self, kind: str, layer: int, head: int = -1) -> dict:
        """{site: what takes the place of all that it writes in the layer}, at the positions that are run."""
        written = {site: self.written[site][layer] for site in SITES[kind]}
        values = {site: value[:, :, head] for site, value in written.items()} if kind == "head" else written
        own = {site: value[self.places] for site, value in values.items()}
        if self.how == "zero":
            new = {site: torch.zeros_like(value) for site, value in own.items()}
        elif self.how == "mean":
            new = {site: value.mean((0, 1)).expand_as(own[site]) for site, value in values.items()}
        else:
            new = {site: value[self.donor[0], self.donor[1]] for site, value in values.items()}
        if self.how == "random":
            site = SITES[kind][0]
            lost = sum(own[name] - new[name] for name in own)
            number = self.stimulus.seed + layer * self.inside.heads + head + 1
            drawn = torch.randn(lost.shape, generator=torch.Generator().manual_seed(number)).to(lost)
            through = self.inside.w_o(layer)[head] if kind == "head" else torch.eye(self.inside.width).to(lost)
            length = [(vectors @ through).norm(dim=-1, keepdim=True) for vectors in (lost, drawn)]
            new = own | {site: own[site] - drawn * length[0] / length[1]}
        if kind == "head":
            whole = written["z"][self.places].clone()
            whole[:, :, head] = new["z"]
            return {"z": whole}
        return new
