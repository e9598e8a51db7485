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

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from latentree.evidence.intervals import bootstrap, ratio
from latentree.inside.names import Internals, norm_gain, norm_scale, weight, written_in
from latentree.inside.trace import check_heads
from latentree.measure.donors import Stimulus

WAYS = ("resample", "anywhere", "mean", "zero", "random")
PLACES = ("scored", "everywhere")
AMONG = ("vocabulary", "role")
SITES = {
    "layer": ("attention", "mlp"),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "head": ("z",),
}
LABELS = ["ablated", "layer", "responding", "quantity"]
COLUMNS = ["how", "where", "among", *LABELS, "value", "low", "high", "n"]


def measure(
    model,
    stimulus,
    how="resample",
    where="scored",
    among="vocabulary",
    kinds=("layer", "attention"),
) -> pd.DataFrame:
    """All components of these kinds, each replaced on its own (`Ablations`): one table in COLUMNS, for sweep().

    One clean run and one per component. Values are in logits, low and high bound 95 % over the n sequences (Student's t;
    slope and R2: bootstrap). By `ablated` and `layer`:
    - change: of the direct effect of a later layer, `responding`, attention and MLP together; -1 in the other rows;
    - removed, total, compensation; the parts of self-repair by attention, by mlp, by norm, and as a fraction of the mean
      removed direct effect;
    - slope, R2: of compensation on the removed direct effect, over sequences. A slope above 0 is the Hydra effect.
    """
    runs, rows, fits = Ablations(model, stimulus, how, where, among), {}, []
    for kind in kinds:
        for layer in range(runs.inside.layers):
            found = runs.ablate(kind, layer)
            rows |= response_rows(found)
            pairs = torch.stack([found.removed, found.compensation], 1).numpy()
            if pairs[:, 1].any():  # something comes later
                for name, statistic in (("slope", slope), ("R2", r_squared)):
                    fits.append((kind, layer, -1, name, *bootstrap(pairs, statistic, draws=500)))
    values = torch.stack(list(rows.values()), 1)
    intervals = torch.stack(ratio(values, torch.ones_like(values)), 1).tolist()
    table = [(*label, *interval) for label, interval in zip(rows, intervals, strict=True)] + fits
    table = pd.DataFrame(table, columns=[*LABELS, "value", "low", "high"])
    return table.assign(how=how, where=where, among=among, n=len(values))[COLUMNS]


def response_rows(found: Response) -> dict:
    """{label (as LABELS): values (sequence,)} of a replaced component."""
    rows = {"removed": found.removed, "total": found.total, "compensation": found.compensation}
    for name, part in (
        ("attention", found.attention.sum(1)),
        ("mlp", found.mlp.sum(1)),
        ("norm", found.norm),
    ):
        share = part.mean() / found.removed.mean()
        rows[f"self-repair by {name}"] = part
        # Its mean is the share, and its spread that of the linearised ratio (Cochran 1977, 6.4).
        rows[f"fraction by {name}"] = share + (part - share * found.removed) / found.removed.mean()
    rows = {(found.kind, found.layer, -1, name): values for name, values in rows.items()}
    later = range(found.layer + 1, found.mlp.shape[1])
    return rows | {
        (found.kind, found.layer, layer, "change"): found.responses[:, layer] for layer in later
    }


def slope(pairs):
    """Least-squares slopes (draws,) of the second on the first of pairs (draws, sequence, 2); nan if that is constant."""
    x, y = np.moveaxis(pairs - pairs.mean(1, keepdims=True), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(1) / (x * x).sum(1)


def r_squared(pairs):
    """Shares of explained variance (draws,) of the same regressions."""
    return slope(pairs) * slope(pairs[..., ::-1])


def most_repaired(runs: Ablations, least: float = 0.05):
    """The attention layer whose loss is best made up for, and which sequences (sequence,) may score it; None for no layer.

    It is chosen on every other sequence, by the highest correlation of compensation with removed direct effect, among the
    layers where at least `least` logits are removed (the lower end of the mean's 95 %); the rest of the sequences have no
    part in the choice. The last layer, after which too little comes, is left out.
    """
    chooses = torch.arange(len(runs.clean.logit)) % 2 == 0
    found = [runs.ablate("attention", layer) for layer in range(runs.inside.layers - 1)]
    matter = [
        one
        for one in found
        if ratio(one.removed[chooses], torch.ones(int(chooses.sum())))[1] > least
    ]

    def correlation(one):
        return float(torch.corrcoef(torch.stack([one.removed, one.compensation])[:, chooses])[0, 1])

    return max(matter, key=correlation, default=None), ~chooses


def check_choice(name: str, value, known) -> None:
    """Raises ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{name} = {value!r}: is unknown; use one of {', '.join(known)}")


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
    def responses(self):
        """Changes by layer (sequence, layer): its attention's and its MLP's."""
        return self.attention + self.mlp

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
    ValueError for another way, place or mean, roles that are not known, a single sequence, or a position without a donor.
    """

    def __init__(
        self,
        model,
        stimulus: Stimulus,
        how: str = "resample",
        where: str = "scored",
        among: str = "vocabulary",
    ):
        for name, value, known in (
            ("how", how, WAYS),
            ("where", where, PLACES),
            ("among", among, AMONG),
        ):
            check_choice(name, value, known)
        if among == "role" and stimulus.peers is None:
            raise ValueError(
                "among = 'role': the stimulus does not know roles; make it with a grammar, or use 'vocabulary'"
            )
        self.model, self.inside, self.stimulus, self.how = model, Internals(model), stimulus, how
        tokens, at, target = (
            x.to(model.device) for x in (stimulus.tokens, stimulus.at, stimulus.target)
        )
        count, length = tokens.shape
        if count < 2:
            raise ValueError(
                f"tokens: has {count} sequence, and replacements come from other ones; give 2 or more"
            )
        rows = torch.arange(count, device=model.device)[:, None]
        scored = where == "scored"
        self.places = (
            rows,
            at[:, None] if scored else torch.arange(length, device=model.device)[None],
        )
        donor = [
            x.to(model.device)
            for x in (stimulus.any_state if how == "anywhere" else stimulus.same_state)
        ]
        alone = int((donor[0] == rows)[rows[:, 0], at].sum())
        if alone and how not in ("mean", "zero"):
            raise ValueError(
                f"how = {how!r}: {alone} scored positions have no donor of their state in another document; "
                "give more sequences, score other positions, or use 'anywhere'"
            )
        self.donor = [x[self.places] for x in donor]
        self.given = {"input_ids": tokens, "use_cache": scored}
        self.written = written_in(model, self.given)
        table, row = (
            weight(self.inside.unembedding).detach().double(),
            torch.arange(count, device=model.device),
        )
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
            self.given = {
                "input_ids": tokens.gather(1, at[:, None]),
                "position_ids": at[:, None],
                "attention_mask": mask,
                "past_key_values": self.written["cache"],
                "use_cache": True,
            }

    @torch.no_grad()
    def effects(self, written: dict, column) -> Effects:
        """Direct effects of what a run wrote in `column` (sequence,), read with the clean run's scale."""
        inside, row = self.inside, torch.arange(len(column), device=column.device)

        def read(vectors):  # (..., sequence, width) -> (sequence, ...)
            effect = (
                norm_gain(inside.final_norm, vectors.double()) * self.scale * self.direction
            ).sum(-1)
            return effect.movedim(-1, 0).cpu()

        found = {
            name: written[name][..., row, column, :]
            for name in ("embedding", "stream", "normed", "attention", "mlp")
        }
        heads = [
            inside.head_written(layer, z[row, column]).transpose(0, 1)
            for layer, z in enumerate(written["z"])
        ]
        bias = getattr(inside.final_norm, "bias", None)
        bias = (self.direction * (0 if bias is None else bias)).sum(-1).cpu()
        logit = (found["normed"].double() * self.direction).sum(-1).cpu()
        parts = (read(found[name]) for name in ("embedding", "attention", "mlp"))
        return Effects(*parts, read(torch.stack(heads)), bias, read(found["stream"]) + bias, logit)

    def ablate(self, kind: str, layer: int, head: int = -1) -> Response:
        """Replaces what a `layer` adds to the stream, its `attention`, its `mlp` or one `head`. One run.

        ValueError for another kind, or a layer or head that the model does not have.
        """
        check_choice("kind", kind, SITES)
        check_heads(self.inside, [(layer, head if kind == "head" else 0)])
        new = self.replacement(kind, layer, head)
        written = written_in(self.model, self.given, layer, new)
        if self.cached:
            written["cache"].crop(-1)
        after, layers = self.effects(written, self.column), torch.arange(self.inside.layers)
        change = {
            name: getattr(after, name) - getattr(self.clean, name)
            for name in ("attention", "mlp", "head", "logit")
        }
        sites = (
            ("attention",) if kind == "head" else SITES[kind]
        )  # of a head, what its layer's attention loses with it
        own = sum(change[site][:, layer] for site in sites)
        later, same = layers > layer, (layers == layer) & ("mlp" not in SITES[kind])
        parts = (
            change["attention"] * later,
            change["mlp"] * (later | same),
            change["head"] * later[:, None],
        )
        return Response(
            kind, layer, head, -own, change["logit"], *parts, after.logit - after.frozen
        )

    @torch.no_grad()
    def replacement(self, kind: str, layer: int, head: int = -1) -> dict:
        """{site: what takes the place of all that it writes in the layer}, at the positions that are run."""
        written = {site: self.written[site][layer] for site in SITES[kind]}
        values = (
            {site: value[:, :, head] for site, value in written.items()}
            if kind == "head"
            else written
        )
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
            drawn = torch.randn(lost.shape, generator=torch.Generator().manual_seed(number)).to(
                lost
            )
            through = (
                self.inside.w_o(layer)[head]
                if kind == "head"
                else torch.eye(self.inside.width).to(lost)
            )
            length = [(vectors @ through).norm(dim=-1, keepdim=True) for vectors in (lost, drawn)]
            new = own | {site: own[site] - drawn * length[0] / length[1]}
        if kind == "head":
            whole = written["z"][self.places].clone()
            whole[:, :, head] = new["z"]
            return {"z": whole}
        return new
