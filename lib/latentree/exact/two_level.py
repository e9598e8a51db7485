"""The two-level process of the paper's theory, and what its exact predictor loses by forgetting.

A sequence draws a global latent z0. Each of its segments draws a local latent z1 given z0, then
evidence tokens given z1, and a query token that depends on both. (The paper's cue between them says
nothing, and is left out.) Sizes and tables are those of the paper's toy experiment (its version 2).
"""

import torch


class TwoLevel:
    """A two-level process; all its tables follow from `seed`.

    z0 ~ Dirichlet(1); z1 is one of z0's own with weight `own` to 1 (Dirichlet); evidence ~
    softmax(E1[z1]), query ~ softmax(mix E0[z0] + (1 - mix) E1[z1]), with E0 `contrast` on z0's
    block of tokens and -`contrast` elsewhere, and E1 = E0[parent of z1] + `noise` Normal(0, 1).

    Attributes, in nats: log_z0 (z0), log_z1 (z0, z1), log_evidence (z1, token) and log_query (z0,
    z1, token). Raises ValueError for sizes that do not divide.
    """

    def __init__(self, seed=0, contrast=4.0, z0=4, z1=16, tokens=64, own=30.0, mix=0.8, noise=0.1):
        if z1 % z0 or tokens % z0:
            raise ValueError(f"z1 = {z1}, tokens = {tokens}: give multiples of z0 = {z0}")
        draw = torch.Generator().manual_seed(seed)

        def gammas(shape):  # torch draws none from a generator: sums of exponentials
            return -torch.rand(shape, dtype=torch.float64, generator=draw).log()

        parent, first = torch.arange(z1) // (z1 // z0), gammas(z0)
        weight = 1 + (own - 1) * (parent == torch.arange(z0)[:, None])
        local = torch.stack([gammas(round(w)).sum() for w in weight.flatten().tolist()])
        local = local.view(z0, z1)
        block = torch.arange(tokens) // (tokens // z0) == torch.arange(z0)[:, None]
        above = torch.where(block, contrast, -contrast).double()
        normal = torch.randn(z1, tokens, dtype=torch.float64, generator=draw)
        below = above[parent] + noise * normal
        self.log_z0 = (first / first.sum()).log()
        self.log_z1 = (local / local.sum(1, keepdim=True)).log()
        self.log_evidence = below.log_softmax(-1)
        self.log_query = (mix * above[:, None] + (1 - mix) * below).log_softmax(-1)

    def draw(self, count, segments=16, evidence=6, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
        """Evidence (sequence, segment, place) and queries (sequence, segment) of sequences."""
        draw = torch.Generator().manual_seed(seed)

        def drawn(log_p, many):  # (row, many) from log probabilities (row, outcome)
            return torch.multinomial(log_p.exp(), many, replacement=True, generator=draw)

        z0 = drawn(self.log_z0[None], count)[0]
        z1 = drawn(self.log_z1[z0], segments)  # (sequence, segment)
        clues = drawn(self.log_evidence[z1.flatten()], evidence).view(count, segments, evidence)
        query = drawn(self.log_query[z0[:, None], z1].flatten(0, 1), 1).view(count, segments)
        return clues, query


def losses(process: TwoLevel, clues, query, windows) -> torch.Tensor:
    """Exact loss in nats (window, sequence) of the last query, from the last segments before it.

    `windows` are numbers of earlier segments; the last one's own evidence is always seen.
    """
    joint = process.log_z1 + process.log_evidence.T[clues].sum(2)[:, :, None]
    whole = joint + process.log_query.permute(2, 0, 1)[query]  # (sequence, segment, z0, z1)
    told = whole.logsumexp(3)[:, :-1]  # what earlier segments say of z0
    found = []
    for window in windows:
        before = process.log_z0 + told[:, max(0, told.shape[1] - window) :].sum(1)
        known = before[..., None] + joint[:, -1]
        asked = known + process.log_query.permute(2, 0, 1)[query[:, -1]]
        found.append(known.logsumexp((1, 2)) - asked.logsumexp((1, 2)))
    return torch.stack(found)
