"""The two-level process of the paper's theory, with its exact Bayes predictor.

A sequence draws a global latent z0; each of its segments draws a local latent z1 given z0, then evidence tokens given z1, a
cue, and a query token that depends on both. Sizes and tables are those of the paper's toy experiment (its version 2).
Every sequence is a pure function of its number, as in the other corpora.
"""

from functools import cached_property

import torch

from latentree.data import counter
from latentree.data.corpus import Corpus, Documents, position_within

HIERARCHICAL, MATCHED_FLAT, RELEASED_FLAT = KINDS = (
    "hierarchical",
    "matched flat",
    "released flat",
)
MOST_SEQUENCES = 1 << 16  # that are enumerated


class TwoLevel(Corpus):
    """A Corpus with its exact tables: log_z0 (z0), log_z1 (z0, z1), log_evidence (z1, token) and
    log_query (z0, z1, token), in nats; all follow from `seed`.

    - hierarchical: z0 ~ Dirichlet(1) lasts for the sequence; z1 is one of z0's own with weight `own` to 1 (Dirichlet);
      evidence ~ softmax(E1[z1]), query ~ softmax(mix E0[z0] + (1 - mix) E1[z1]), with E0 `contrast` on z0's block of tokens
      and -`contrast` elsewhere, E1 = E0[parent of z1] + `noise` Normal(0, 1).
    - matched flat: the same tables, z0 drawn afresh for each segment: only what segments share is gone.
    - released flat: the release's control draws the z1 of a sequence without replacement, so that earlier segments tell
      of later ones (`leak`); its query's z0 is taken to be z1's parent. How its tables differ is not known to us.

    ValueError for an unknown kind, or sizes that do not divide.
    """

    def __init__(
        self,
        kind=HIERARCHICAL,
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
        if z1 % z0 or tokens % z0 or kind == RELEASED_FLAT and segments > z1:
            raise ValueError(
                f"z0 = {z0}, z1 = {z1}, tokens = {tokens}, segments = {segments}: give z1 and tokens that are multiples "
                f"of z0, and for the {RELEASED_FLAT} process at most z1 segments"
            )
        super().__init__(
            name=f"two-level, {kind}",
            kind=kind,
            vocabulary_size=tokens + 1,
            end=None,
            mean_document_length=segments * (evidence + 2),
            content=[kind, segments, evidence, z0, z1, tokens, own, mix, contrast, noise],
            seed=seed,
        )
        self.segments, self.evidence, self.length = segments, evidence, evidence + 2
        self.cue = tokens
        draw = torch.Generator().manual_seed(seed)
        self.parent = torch.arange(z1) // (z1 // z0)
        # A Dirichlet of whole concentrations, as Gammas that are sums of exponentials: torch has no generator for others.
        weight = 1 + (own - 1) * (self.parent == torch.arange(z0)[:, None])
        first = -torch.rand(z0, dtype=torch.float64, generator=draw).log()
        rows = [
            [-torch.rand(round(w), dtype=torch.float64, generator=draw).log().sum() for w in row]
            for row in weight.tolist()
        ]
        self.log_z0, self.log_z1 = (first / first.sum()).log(), torch.tensor(rows).double()
        self.log_z1 = (self.log_z1 / self.log_z1.sum(1, keepdim=True)).log()
        block = torch.arange(tokens) // (tokens // z0) == torch.arange(z0)[:, None]
        above = torch.where(block, contrast, -contrast).double()
        below = above[self.parent] + noise * torch.randn(
            z1, tokens, dtype=torch.float64, generator=draw
        )
        self.log_evidence = below.log_softmax(-1)
        self.log_query = (mix * above[:, None] + (1 - mix) * below).log_softmax(-1)

    def documents(self, ids, device="cpu", detail=True) -> Documents:
        """Sequences by number; fields document, position, segment, place (in the segment), z0 and z1 (of the segment)."""
        ids = torch.as_tensor(ids, dtype=torch.int64, device=device)
        key = counter.subkey(counter.mix(torch.tensor(self.seed, device=device)), ids)
        segment = torch.arange(self.segments, device=device)
        of_segment = counter.subkey(key[:, None], 1 + segment)
        first = torch.zeros_like(of_segment)
        z0 = _drawn(self.log_z0[None], first[:, :1], counter.subkey(key, 0)[:, None]).expand_as(
            of_segment
        )
        if self.kind == MATCHED_FLAT:
            z0 = _drawn(self.log_z0[None], first, counter.subkey(of_segment, 0))
        z1 = _drawn(self.log_z1, z0, counter.subkey(of_segment, 1))
        if self.kind == RELEASED_FLAT:
            z1 = counter.shuffled(counter.subkey(key, 0), len(self.parent))[:, : self.segments]
            z0 = self.parent.to(device)[z1]
        place = torch.arange(self.length, device=device)
        keys = counter.subkey(of_segment[..., None], 2 + place)
        tokens = torch.full_like(keys, self.cue)
        of_evidence = keys[..., : self.evidence]
        tokens[..., : self.evidence] = _drawn(
            self.log_evidence, z1[..., None].expand_as(of_evidence), of_evidence
        )
        tokens[..., -1] = _drawn(
            self.log_query.flatten(0, 1), z0 * len(self.parent) + z1, keys[..., -1]
        )
        document = torch.arange(len(ids), device=device).repeat_interleave(
            self.segments * self.length
        )
        fields = {
            "tokens": tokens,
            "segment": segment[:, None].expand_as(keys),
            "place": place.expand_as(keys),
            "z0": z0[..., None].expand_as(keys),
            "z1": z1[..., None].expand_as(keys),
        }
        fields = {name: value.flatten() for name, value in fields.items()}
        return Documents(
            fields | {"document": document, "position": position_within(document)}, len(ids)
        )

    @property
    def queries(self) -> torch.Tensor:
        """Positions of the query tokens (segment,)."""
        return torch.arange(1, self.segments + 1) * self.length - 1

    @cached_property
    def informations(self) -> dict[str, float]:
        """Exact entropies H and mutual informations I in nats, of one segment of the hierarchical or matched flat process.

        `query` is the query token, `evidence` one evidence token. A query depends jointly on both latents (assumption A2) if
        what each tells beside the other is not 0.
        """
        joint = self.log_z0[:, None] + self.log_z1  # (z0, z1)
        query = joint[..., None] + self.log_query  # (z0, z1, token)
        evidence = joint[..., None] + self.log_evidence

        def entropy(log_p, *gone):  # of what is left when axes are summed over
            log_p = log_p.logsumexp(gone) if gone else log_p
            return float(-torch.special.xlogy(log_p.exp(), log_p.exp()).sum())

        z0, z1, both = entropy(joint, 1), entropy(joint, 0), entropy(joint)
        return {
            "H(z0)": z0,
            "H(z1)": z1,
            "I(z0; z1)": z0 + z1 - both,
            "H(query)": entropy(query, 0, 1),
            "I(query; z0)": z0 + entropy(query, 0, 1) - entropy(query, 1),
            "I(query; z0 | z1)": both + entropy(query, 0) - z1 - entropy(query),
            "I(query; z1 | z0)": both + entropy(query, 1) - z0 - entropy(query),
            "I(evidence; z0)": z0 + entropy(evidence, 0, 1) - entropy(evidence, 1),
        }

    @cached_property
    def leak(self) -> torch.Tensor:
        """What the earlier local latents of a sequence tell of each one (segment,), nats, in the released flat process.

        z1 is uniform over all, and given the earlier ones over those that are left.
        """
        size = len(self.parent)
        return (size / (size - torch.arange(self.segments, dtype=torch.float64))).log()


def _drawn(log_rows, row, key):
    """An index for each key from the distribution log_rows[row] (nats), all on the key's device."""
    limits = counter.thresholds(log_rows.exp())
    offset = torch.arange(len(limits))[:, None] << counter.BITS
    flat = (limits + offset).flatten().to(key.device)
    found = torch.searchsorted(flat, counter.uniform(key) + (row << counter.BITS), right=True)
    return (found - row * limits.shape[1]).clamp(max=limits.shape[1] - 1)


# ---------------------------------------------------------------------- the exact predictor


def predictive(
    process: TwoLevel, tokens: torch.Tensor, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Exact log probabilities (sequence, position, vocabulary) before each of tokens (sequence, position), float64.

    It filters: the joint posterior of (z0, z1) is carried from token to token, in log space, and z0's from segment to
    segment (in the released flat process the posterior of which z1 are used up). Tokens that are not `seen` (sequence,
    position; bool) are summed over, as if unread. Position and tables are known.
    """
    count, cue = len(tokens), process.cue
    seen = torch.ones_like(tokens, dtype=torch.bool) if seen is None else seen
    evidence, query = process.log_evidence, process.log_query
    found = torch.full((*tokens.shape, process.vocabulary_size), -torch.inf, dtype=torch.float64)
    history = _History(process, count)
    for at, place in zip(range(tokens.shape[1]), list(range(process.length)) * process.segments):
        if place == 0:
            joint = history.prior()
        if place < process.evidence:
            found[:, at, :cue] = (
                torch.logsumexp(joint, 1).log_softmax(-1).exp().matmul(evidence.exp()).log()
            )
            told = evidence.T[tokens[:, at].clamp(max=cue - 1)][:, None]
        elif place == process.evidence:
            found[:, at, cue] = 0.0
            continue
        else:
            p = joint.flatten(1).softmax(-1)
            found[:, at, :cue] = p.matmul(query.exp().flatten(0, 1)).log()
            told = query.permute(2, 0, 1)[tokens[:, at].clamp(max=cue - 1)]
        joint = joint + torch.where(seen[:, at, None, None], told, 0.0)
        if place == process.length - 1:
            history.read(joint)
    return found


class _History:
    """What earlier segments say: log weights of z0 (sequence, z0), or of which z1 are used up (sequence, set)."""

    def __init__(self, process, count):
        self.process, self.first = process, process.log_z0.expand(count, -1)
        self.used = None
        if process.kind == RELEASED_FLAT:
            self.used = torch.zeros(count, 1 << len(process.parent), dtype=torch.float64)
            self.used[:, 0] = 1.0
            self.sets = torch.arange(1 << len(process.parent))

    def prior(self):
        """Log joint (sequence, z0, z1) before a segment."""
        if self.used is None:
            return self.first[:, :, None] + self.process.log_z1
        size = len(self.process.parent)
        left = torch.stack([self.used[:, (self.sets >> z & 1) == 0].sum(1) for z in range(size)], 1)
        of_parent = (
            torch.nn.functional.one_hot(self.process.parent).T.double().log()
        )  # (z0, z1): 0 or -inf
        self.before = left.clamp(min=1e-300).log()
        return self.before[:, None] + of_parent

    def read(self, joint):
        """Take in a segment's log joint (sequence, z0, z1), its tokens included."""
        if self.process.kind == HIERARCHICAL:
            self.first = torch.logsumexp(joint, 2).log_softmax(-1)
        elif self.used is not None:
            told = torch.logsumexp(joint, 1) - self.before  # each z1's likelihood
            told = (told - told.max(1, keepdim=True).values).exp()
            after = torch.zeros_like(self.used)
            for z in range(told.shape[1]):
                free = self.sets[(self.sets >> z & 1) == 0]
                after[:, free | 1 << z] += self.used[:, free] * told[:, z : z + 1]
            self.used = after / after.sum(1, keepdim=True)


def enumerated(process: TwoLevel) -> tuple[torch.Tensor, torch.Tensor]:
    """All sequences a process can give, tokens (sequence, position), and their exact log probabilities, by summing over
    all latents. ValueError for more than MOST_SEQUENCES of them or of the latents' values.
    """
    free, size = process.segments * (process.evidence + 1), len(process.parent)
    shared = process.kind == HIERARCHICAL
    latents = process.segments * (1 if shared else 2)
    values = len(process.log_z0) ** (latents - process.segments + shared) * size**process.segments
    if max(process.cue**free, values) > MOST_SEQUENCES:
        raise ValueError(
            f"{process.name}: has {process.cue}^{free} sequences, too many to enumerate; give a smaller process"
        )
    drawn = torch.cartesian_prod(*[torch.arange(process.cue)] * free).view(
        -1, process.segments, process.evidence + 1
    )
    tokens = torch.full((len(drawn), process.segments, process.length), process.cue)
    tokens[..., : process.evidence], tokens[..., -1] = drawn[..., :-1], drawn[..., -1]
    z1s = torch.cartesian_prod(*[torch.arange(size)] * process.segments).view(-1, process.segments)
    total = torch.full((len(drawn),), -torch.inf, dtype=torch.float64)
    for z1 in z1s:
        told = process.log_evidence[z1[:, None], drawn[..., :-1]].sum(-1)  # (sequence, segment)
        query = process.log_query[:, z1[None], drawn[..., -1]]  # (z0, sequence, segment)
        prior = process.log_z1[:, z1][:, None]  # (z0, 1, segment)
        if process.kind == RELEASED_FLAT:
            if len(z1.unique()) < len(z1):
                continue
            row = torch.arange(len(z1))
            ways = torch.arange(size, size - len(z1), -1).double().log().sum()
            here = (told + query[process.parent[z1], :, row].T).sum(-1) - ways
        elif shared:
            here = torch.logsumexp(process.log_z0[:, None] + (told + query + prior).sum(-1), 0)
        else:
            here = torch.logsumexp(process.log_z0[:, None, None] + told + query + prior, 0).sum(-1)
        total = torch.logaddexp(total, here)
    return tokens.flatten(1), total


def forgetting(process: TwoLevel, tokens: torch.Tensor, windows) -> torch.Tensor:
    """What the exact predictor loses on the last query token when it sees only the last tokens before it: (window, sequence).

    Nats above its loss when it sees all; `windows` are numbers of tokens. The position is known.
    """
    place, length = torch.arange(tokens.shape[1]), tokens.shape[1]
    told = [
        predictive(process, tokens, (place >= length - 1 - window).expand(tokens.shape))[:, -1]
        for window in (length, *windows)
    ]
    whole, *cut = (log_p.gather(1, tokens[:, -1:])[:, 0] for log_p in told)
    return torch.stack([whole - one for one in cut])


# ---------------------------------------------------------------------- sequences made for a question


def clear_segments(process: TwoLevel, z0: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Segments (*z0's shape, length) of the global latents z0, each with a local latent of its own: they say clearly which."""
    draw = torch.Generator().manual_seed(seed)
    z0 = torch.as_tensor(z0)
    own = process.log_z1.exp() * (process.parent == torch.arange(len(process.log_z0))[:, None])

    def drawn(rows, count):  # (sequence, count) from probabilities (sequence, outcome)
        return torch.multinomial(rows, count, replacement=True, generator=draw)

    latent = z0.flatten()
    z1 = drawn(own[latent], 1)[:, 0]
    tokens = torch.full((len(latent), process.length), process.cue)
    tokens[:, : process.evidence] = drawn(process.log_evidence[z1].exp(), process.evidence)
    tokens[:, -1:] = drawn(process.log_query[latent, z1].exp(), 1)
    return tokens.view(*z0.shape, process.length)


def contested(
    process: TwoLevel, count: int, distances, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences with one vote more for a side: tokens (distance, side, sequence, position) and latents (side, sequence).

    Two global latents, the sides, have equally many clear segments before the last one, and the others as many or one less
    (the third one more, if just one is left over); one more, of the side's latent, stands `distance` segments before the
    last, which is of the third latent. The sequences of all distances and of both sides share all other segments, in the
    same order. ValueError for less than 3 latents, or a distance that is not there.
    """
    latents, earlier = len(process.log_z0), process.segments - 1
    if latents < 3 or not all(1 <= distance <= earlier for distance in distances):
        raise ValueError(
            f"distances = {list(distances)}: give some from 1 to {earlier}, in a process of 3 global latents or more"
        )
    draw = torch.Generator().manual_seed(seed)
    named = torch.rand(count, latents, generator=draw).argsort(
        1
    )  # of each sequence: the two sides first, the last one's third
    order = torch.rand(count, earlier - 1, generator=draw).argsort(1)
    first = (
        2 if (earlier - 1) % latents == 1 else 0
    )  # a single one that is left over must not be a side's
    others = named.gather(1, (order + first) % latents)
    rest, last = (
        clear_segments(process, others, seed + 1),
        clear_segments(process, named[:, 2], seed + 2),
    )
    sides = [clear_segments(process, named[:, side], seed + 3) for side in (0, 1)]
    whole = [
        torch.cat([rest[:, : earlier - d], one[:, None], rest[:, earlier - d :], last[:, None]], 1)
        for d in distances
        for one in sides
    ]
    return torch.stack(whole).unflatten(0, (len(distances), 2)).flatten(-2), named[:, :2].T
