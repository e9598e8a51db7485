"""AdamW for every parameter, or Muon for the hidden matrices; the learning rate's schedule."""

import math
from collections import defaultdict

import torch

# Of the quintic Newton-Schulz iteration: K. Jordan, "Muon" (2024), as in torch.optim.Muon.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def build_optimizers(model, config) -> list[torch.optim.Optimizer]:
    """The optimizers of a `TrainingConfig`; each group keeps the rate it peaks at under "peak".

    Muon has a rate of its own for the matrices of queries and keys; where an architecture keeps
    them in one matrix with the values, that has Muon's common rate. Weight decay applies to
    matrices and embeddings, not to gains and biases.
    """
    muon = hidden_matrices(model) if config.optimizer == "muon" else []
    taken = {id(matrix) for matrix in muon}
    rest = [p for p in _trained(model) if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    # One fused kernel for all parameters: a third of the time of the loop over them on a CPU.
    optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)]
    if muon:
        attending = {
            id(matrix)
            for name, matrix in model.named_parameters()
            if name.endswith(("q_proj.weight", "k_proj.weight"))
        }
        groups = [
            {"params": [p for p in muon if id(p) not in attending]},
            {"params": [p for p in muon if id(p) in attending], "lr": config.query_key_rate},
        ]
        optimizers.append(
            BatchedMuon(
                [group for group in groups if group["params"]],
                lr=config.muon_learning_rate,
                momentum=config.muon_momentum,
                weight_decay=config.weight_decay,
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def hidden_matrices(model) -> list[torch.nn.Parameter]:
    """The matrices between the embeddings (of tokens and of positions) and the unembedding."""
    outside = {id(model.get_output_embeddings().weight)}
    for part in model.modules():
        if isinstance(part, torch.nn.Embedding):
            outside.add(id(part.weight))
    return [p for p in _trained(model) if p.ndim == 2 and id(p) not in outside]


def _trained(model) -> list[torch.nn.Parameter]:
    """The parameters that training changes; an MLP of width 0 has only empty ones."""
    return [p for p in model.parameters() if p.requires_grad and p.numel()]


def rate_share(step: int, steps: int, warmup: float, decay: float) -> float:
    """Share of the peak learning rate at step `step` (from 0) of `steps`.

    It rises linearly over the first `warmup` (a fraction) of the steps, is 1 from the last of them
    on, and falls linearly over the last `decay` (a fraction) to the 0 that step `steps` would have.
    """
    rising = (step + 1) / max(1, round(warmup * steps))
    falling = (steps - step) / max(1, round(decay * steps))
    return min(1.0, rising, falling)


def _orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Each matrix (matrix, short side, long side) with its singular values brought near 1."""
    a, b, c = _QUINTIC
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class BatchedMuon(torch.optim.Muon):
    """torch's Muon, but matrices of equal shape are orthogonalised together, in float32.

    torch takes them one by one in bfloat16: four times as slow for small matrices on a CPU.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every matrix that has a gradient; `closure` is not used."""
        for group in self.param_groups:
            batches = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    batches[tuple(sorted(matrix.shape))].append(matrix)
            for matrices in batches.values():
                self._update(matrices, group)

    def _update(self, matrices, group):
        """Update `matrices`, of one shape up to transposition."""
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        gradients = [matrix.grad for matrix in matrices]
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = momenta
        if group["nesterov"]:
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
        tall = [matrix.shape[0] > matrix.shape[1] for matrix in matrices]
        lying = [u.T if t else u for u, t in zip(updates, tall)]
        directions = _orthogonalised(torch.stack(lying))
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        for standing in set(tall):
            here = [n for n, t in enumerate(tall) if t == standing]
            changed = [matrices[n] for n in here]
            steps = [directions[n].T if standing else directions[n] for n in here]
            scale = math.sqrt(max(1, changed[0].shape[0] / changed[0].shape[1]))
            torch._foreach_add_(changed, steps, alpha=-group["lr"] * scale)
