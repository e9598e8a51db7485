"""AdamW for every parameter, or Muon for the hidden matrices; the learning rate's schedule."""

import math
from collections import defaultdict

import torch


def build_optimizers(model, config) -> list[torch.optim.Optimizer]:
    """The optimizers of a `TrainingConfig`; each group keeps the rate it peaks at under "peak".

    Muon has a rate of its own for the matrices of queries and keys; where an architecture keeps
    them in one matrix with the values, that has Muon's common rate. Weight decay applies to
    matrices and embeddings, not to gains and biases.
    """
    outside = {id(model.get_output_embeddings().weight)}
    for part in model.modules():
        if isinstance(part, torch.nn.Embedding):  # of tokens or of positions
            outside.add(id(part.weight))
    matrices, vectors, hidden, attending = [], [], [], []
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad and parameter.numel()):  # an MLP of width 0 is empty
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif config.optimizer != "muon" or parameter.ndim > 2 or id(parameter) in outside:
            matrices.append(parameter)
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            attending.append(parameter)
        else:
            hidden.append(parameter)

    decay, betas = config.weight_decay, (config.beta1, config.beta2)
    groups = {"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}
    groups = [group for group in groups if group["params"]]
    # One fused kernel for all parameters: a third of the time of the loop over them on a CPU.
    optimizers = [torch.optim.AdamW(groups, config.learning_rate, betas, fused=True)]
    groups = {"params": hidden}, {"params": attending, "lr": config.query_key_rate}
    groups = [group for group in groups if group["params"]]
    if groups:
        rate, momentum = config.muon_learning_rate, config.muon_momentum
        optimizers.append(BatchedMuon(groups, rate, weight_decay=decay, momentum=momentum))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate_share(step: int, steps: int, warmup: float, decay: float) -> float:
    """Share of the peak learning rate at step `step` (from 0) of `steps`.

    It rises linearly over the first `warmup` (a fraction) of the steps, is 1 from the last of them
    on, and falls linearly over the last `decay` (a fraction) to the 0 that step `steps` would have.
    """
    rising = (step + 1) / max(1, round(warmup * steps))
    falling = (steps - step) / max(1, round(decay * steps))
    return min(1.0, rising, falling)


def _orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Each matrix (matrix, short side, long side) with its singular values brought near 1.

    By the quintic Newton-Schulz iteration of K. Jordan, "Muon" (2024), as in torch.optim.Muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
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
                    if "momentum_buffer" not in self.state[matrix]:
                        self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
            for matrices in batches.values():
                self._update(matrices, group)

    def _update(self, matrices, group):
        """Update `matrices`, of one shape up to transposition, with Nesterov's momentum."""
        gradients = [matrix.grad for matrix in matrices]
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
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
