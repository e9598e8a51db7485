"""The two-level process of the paper's theory: a global latent above the local latents of segments.

A sequence draws a global latent z0. Each of its segments draws a local latent z1 given z0, then
evidence tokens given z1, a cue, and a query token that depends on both. Sizes and tables are those
of the paper's toy experiment (its version 2). exact/two_level.py has its exact predictor.
"""

import torch

from latentree.data import counter
from latentree.data.corpus import Corpus, Documents

KINDS = ("hierarchical", "matched flat", "released flat")


class TwoLevel(Corpus):
    """A two-level process; all its tables follow from `seed`.

    - hierarchical: z0 ~ Dirichlet(1) lasts for the sequence; z1 is one of z0's own with weight
      `own` to 1 (Dirichlet); evidence ~ softmax(E1[z1]), query ~ softmax(mix E0[z0] + (1 - mix)
      E1[z1]), with E0 `contrast` on z0's block of tokens and -`contrast` elsewhere, and
      E1 = E0[parent of z1] + `noise` Normal(0, 1).
    - matched flat: the same tables, z0 drawn afresh for each segment.
    - released flat: z1 is drawn without replacement, and z0 is its parent, as in the release.

    Attributes beside a corpus's: log_z0 (z0), log_z1 (z0, z1), log_evidence (z1, token) and
    log_query (z0, z1, token), nats; parent (z1); segments, length (of a segment), evidence (tokens
    in it), cue (a token). Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        kind="hierarchical",
        seed=0,
        segments=16,
        evidence=6,
        z0=4,
        z1=16,
        tokens=64,
        own=30.0,
        mix=0.8,
        contrast=4.0,
        noise=0.1,
    ):
        if kind not in KINDS:
            raise ValueError(f"kind = {kind!r}: is unknown; use one of {', '.join(KINDS)}")
        if z1 % z0 or tokens % z0 or kind == "released flat" and segments > z1:
            raise ValueError(
                f"z1 = {z1}, tokens = {tokens}, segments = {segments}: give multiples of z0 = {z0}"
                " for z1 and tokens, and for the released flat process at most z1 segments"
            )
        self.segments, self.evidence, self.length = segments, evidence, evidence + 2
        self.cue = tokens
        content = [kind, segments, evidence, z0, z1, tokens, own, mix, contrast, noise]
        super().__init__(
            name=f"toy-{kind.replace(' ', '-')}",
            kind=kind,
            vocabulary_size=tokens + 1,
            end=None,
            mean_document_length=segments * self.length,
            content=content,
            seed=seed,
            label=f"two-level, {kind}",
        )
        draw = torch.Generator().manual_seed(seed)

        def gammas(shape):  # torch draws none from a generator: sums of exponentials
            return -torch.rand(shape, dtype=torch.float64, generator=draw).log()

        self.parent = torch.arange(z1) // (z1 // z0)
        first = gammas(z0)
        weight = 1 + (own - 1) * (self.parent == torch.arange(z0)[:, None])
        local = torch.stack([gammas(round(w)).sum() for w in weight.flatten().tolist()]).view(
            z0, z1
        )
        block = torch.arange(tokens) // (tokens // z0) == torch.arange(z0)[:, None]
        above = torch.where(block, contrast, -contrast).double()
        drawn = torch.randn(z1, tokens, dtype=torch.float64, generator=draw)
        below = above[self.parent] + noise * drawn
        self.log_z0 = (first / first.sum()).log()
        self.log_z1 = (local / local.sum(1, keepdim=True)).log()
        self.log_evidence = below.log_softmax(-1)
        self.log_query = (mix * above[:, None] + (1 - mix) * below).log_softmax(-1)

    def documents(self, ids, device="cpu", detail=True) -> Documents:
        """Sequences by number: fields document, position, segment, place (in it), z0 and z1."""
        ids = torch.as_tensor(ids, dtype=torch.int64, device=device)
        segment = torch.arange(self.segments, device=device)
        place = torch.arange(self.length, device=device)
        key = counter.subkey(counter.mix(torch.tensor(self.seed, device=device)), ids)
        of_segment = counter.subkey(key[:, None], 1 + segment)
        of_token = counter.subkey(of_segment[..., None], 2 + place)  # (document, segment, place)
        if self.kind == "hierarchical":
            z0 = _drawn(self.log_z0[None], 0, counter.subkey(key, 0)[:, None])
            z0 = z0.expand_as(of_segment)
            z1 = _drawn(self.log_z1, z0, counter.subkey(of_segment, 1))
        elif self.kind == "matched flat":
            z0 = _drawn(self.log_z0[None], 0, counter.subkey(of_segment, 0))
            z1 = _drawn(self.log_z1, z0, counter.subkey(of_segment, 1))
        else:
            z1 = counter.shuffled(counter.subkey(key, 0), len(self.parent))[:, : self.segments]
            z0 = self.parent.to(device)[z1]
        both = z0 * len(self.parent) + z1
        tokens = torch.full_like(of_token, self.cue)
        clues = slice(self.evidence)
        tokens[..., clues] = _drawn(self.log_evidence, z1[..., None], of_token[..., clues])
        tokens[..., -1] = _drawn(self.log_query.flatten(0, 1), both, of_token[..., -1])
        fields = {
            "tokens": tokens,
            "document": torch.arange(len(ids), device=device)[:, None, None],
            "position": segment[:, None] * self.length + place,
            "segment": segment[:, None],
            "place": place,
            "z0": z0[..., None],
            "z1": z1[..., None],
        }
        fields = {name: value.expand_as(tokens).flatten() for name, value in fields.items()}
        return Documents(fields, len(ids))


def _drawn(log_rows, row, key):
    """An index for each key from the distribution log_rows[row] (nats); row broadcasts to key."""
    return counter.draw_rows(log_rows.exp(), row, key)


# ---------------------------------------------------------------------- made for a question


def clear_segments(process: TwoLevel, z0: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Segments (*z0's shape, length) that clearly say their global latent z0: z1 is z0's own."""
    draw = torch.Generator().manual_seed(seed)
    own = process.parent == torch.arange(len(process.log_z0))[:, None]

    def drawn(rows, count):  # (sequence, count) from probabilities (sequence, outcome)
        return torch.multinomial(rows, count, replacement=True, generator=draw)

    latent = z0.flatten()
    z1 = drawn((process.log_z1.exp() * own)[latent], 1)[:, 0]
    tokens = torch.full((len(latent), process.length), process.cue)
    tokens[:, : process.evidence] = drawn(process.log_evidence[z1].exp(), process.evidence)
    tokens[:, -1:] = drawn(process.log_query[latent, z1].exp(), 1)
    return tokens.view(*z0.shape, process.length)


def contested(
    process: TwoLevel, count: int, distances, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences in which one segment decides between two global latents, the sides.

    Returns tokens (distance, side, sequence, position) and the sides' latents (side, sequence).
    Before the last segment, which is of a third latent, both sides have equally many clear
    segments, and the other latents as many or one less (the third one more, if just one is left
    over). One more of a side stands `distance` segments before the last. All else is the same, in
    the same order, for all distances and both sides. Raises ValueError for fewer than 3 latents,
    or a distance that is not there.
    """
    latents, earlier = len(process.log_z0), process.segments - 1
    if latents < 3 or min(distances) < 1 or max(distances) > earlier:
        raise ValueError(
            f"distances = {list(distances)}: give some from 1 to {earlier}, in a process of 3 "
            "global latents or more"
        )
    draw = torch.Generator().manual_seed(seed)
    named = torch.rand(count, latents, generator=draw).argsort(1)  # the two sides, the third, ...
    order = torch.rand(count, earlier - 1, generator=draw).argsort(1)
    alone = (earlier - 1) % latents == 1  # is one left over? It must not be a side's
    others = named.gather(1, (order + 2 * alone) % latents)
    rest = clear_segments(process, others, seed + 1)
    last = clear_segments(process, named[:, 2:3], seed + 2)
    sides = [clear_segments(process, named[:, side, None], seed + 3) for side in (0, 1)]
    whole = []
    for distance in distances:
        before, after = rest[:, : earlier - distance], rest[:, earlier - distance :]
        for deciding in sides:
            whole.append(torch.cat([before, deciding, after, last], 1).flatten(1))
    return torch.stack(whole).unflatten(0, (len(distances), 2)), named[:, :2].T
