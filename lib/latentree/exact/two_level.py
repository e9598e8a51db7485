"""The exact Bayes predictor of the two-level process, and what its latents tell."""

import torch

from latentree.data.two_level import TwoLevel


def predictive(process: TwoLevel, tokens, seen=None) -> torch.Tensor:
    """Exact log probabilities (sequence, position, vocabulary) before each of tokens, float64.

    It filters: the joint posterior of (z0, z1) goes from token to token, and what earlier segments
    say from segment to segment. Tokens (sequence, position) that are not `seen` (bool, of the same
    shape) are summed over, as if unread. Positions and tables are known.
    """
    count, cue = len(tokens), process.cue
    seen = torch.ones_like(tokens, dtype=torch.bool) if seen is None else seen
    evidence, query = process.log_evidence, process.log_query
    found = torch.full((*tokens.shape, process.vocabulary_size), -torch.inf, dtype=torch.float64)
    released = process.kind == "released flat"
    history = _UsedLatents(process, count) if released else _GlobalLatent(process, count)
    for at in range(tokens.shape[1]):
        place, token = at % process.length, tokens[:, at].clamp(max=cue - 1)
        if place == 0:
            joint = history.prior()
        if place == process.evidence:
            found[:, at, cue] = 0.0
            continue
        if place < process.evidence:
            p = joint.logsumexp(1).softmax(-1)
            found[:, at, :cue] = p.matmul(evidence.exp()).log()
            told = evidence.T[token][:, None]
        else:
            p = joint.flatten(1).softmax(-1)
            found[:, at, :cue] = p.matmul(query.exp().flatten(0, 1)).log()
            told = query.permute(2, 0, 1)[token]
        joint = joint + torch.where(seen[:, at, None, None], told, 0.0)
        if place == process.length - 1:
            history.read(joint)
    return found


class _GlobalLatent:
    """What earlier segments say of z0: log weights (sequence, z0)."""

    def __init__(self, process, count):
        self.process, self.log_z0 = process, process.log_z0.expand(count, -1)

    def prior(self):
        """Log joint (sequence, z0, z1) before a segment."""
        return self.log_z0[:, :, None] + self.process.log_z1

    def read(self, joint):
        """Take in a segment's log joint (sequence, z0, z1), its tokens included."""
        if self.process.kind == "hierarchical":
            self.log_z0 = joint.logsumexp(2).log_softmax(-1)


class _UsedLatents:
    """Which z1 earlier segments of the released flat process used up: weights (sequence, set)."""

    def __init__(self, process, count):
        size = len(process.parent)
        sets = torch.arange(1 << size)
        self.without = [sets[(sets >> z & 1) == 0] for z in range(size)]  # the sets that lack z
        self.of_parent = torch.nn.functional.one_hot(process.parent).T.double().log()
        self.used = torch.zeros(count, len(sets), dtype=torch.float64)
        self.used[:, 0] = 1.0

    def prior(self):
        """Log joint (sequence, z0, z1) before a segment."""
        left = torch.stack([self.used[:, sets].sum(1) for sets in self.without], 1)
        self.before = left.clamp(min=1e-300).log()
        return self.before[:, None] + self.of_parent

    def read(self, joint):
        """Take in a segment's log joint (sequence, z0, z1), its tokens included."""
        told = joint.logsumexp(1) - self.before  # each z1's likelihood
        told = (told - told.max(1, keepdim=True).values).exp()
        after = torch.zeros_like(self.used)
        for z, sets in enumerate(self.without):
            after[:, sets | 1 << z] += self.used[:, sets] * told[:, z : z + 1]
        self.used = after / after.sum(1, keepdim=True)


def losses(process: TwoLevel, tokens, seen=None) -> torch.Tensor:
    """The exact predictor's loss on each of tokens (sequence, position), nats."""
    return -predictive(process, tokens, seen).gather(-1, tokens[..., None])[..., 0]


def forgetting(process: TwoLevel, tokens, windows) -> torch.Tensor:
    """What the exact predictor loses on the last token by seeing only the last tokens before it.

    (window, sequence), nats above its loss when it sees all; `windows` are numbers of tokens.
    """
    place, last = torch.arange(tokens.shape[1]), tokens.shape[1] - 1
    whole = losses(process, tokens)[:, -1]
    cut = []
    for window in windows:
        seen = (place >= last - window).expand(tokens.shape)
        cut.append(losses(process, tokens, seen)[:, -1] - whole)
    return torch.stack(cut)


def informations(process: TwoLevel) -> dict[str, float]:
    """Exact entropies H and mutual informations I in nats, of one segment of a process.

    `query` is the query token, `evidence` one evidence token; not for the released flat process.
    A query depends jointly on both latents (assumption A2) if what each tells beside the other is
    not 0.
    """
    joint = process.log_z0[:, None] + process.log_z1  # (z0, z1)
    query = joint[..., None] + process.log_query  # (z0, z1, token)
    evidence = joint[..., None] + process.log_evidence

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
