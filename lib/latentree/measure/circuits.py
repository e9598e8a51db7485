"""What heads do by their weights alone (Elhage et al. 2021): copying by the OV circuit, and K-composition.

Norms enter as linear maps: they centre if they are LayerNorms and multiply by their gain; the division by the scale, the
biases and the rotary positions are left out. MLPs and position embeddings are not part of a path from head to head.
"""

import pandas as pd
import torch

from latentree.inside.names import Internals, norm_gain, weight

MOST_TOKENS = 4096  # different tokens that sequences are taken together for


@torch.no_grad()
def copying(model, tokens) -> torch.Tensor:
    """How far each head's OV circuit raises what it attends to, over other tokens in context: (sequence, head), float64.

    C[a, b] is the logit of token b when the head attends to token a: embedding, the attention's input norm, W_V, W_O, the
    norm of its output if there is one, the final norm, unembedding. For the different tokens a, b of a sequence of
    `tokens` (sequence, position): the share of pairs with C[a, a] > C[a, b] minus the share with less, in [-1, 1]. Norms'
    scales do not matter, for they change all of C[a] alike. Heads are numbered through all layers.
    """
    inside = Internals(model)
    seen, place = tokens.to(model.device).unique(return_inverse=True)
    if len(seen) > MOST_TOKENS and len(tokens) > 1:
        return torch.cat([copying(model, row[None]) for row in tokens])
    present = torch.zeros(len(tokens), len(seen), device=model.device).scatter(1, place, 1.0)
    pairs = (present.sum(1) * (present.sum(1) - 1)).clamp(min=1)
    embedded, unembedding = inside.embedding.weight[seen], weight(inside.unembedding)[seen]
    scores = []
    for layer in range(inside.layers):
        read = norm_gain(inside.input_norm(layer), embedded)
        for w_v, w_o in zip(inside.projections(layer)[2], inside.w_o(layer), strict=True):
            written = norm_gain(
                inside.final_norm, norm_gain(inside.output_norm(layer), w_o)
            )  # norms' linear parts
            logits = (read @ w_v) @ (written @ unembedding.T)
            raised = torch.sign(logits.diagonal()[:, None] - logits).to(present.dtype)
            scores.append((present @ raised * present).sum(1) / pairs)
    return torch.stack(scores, 1).double().cpu()


@torch.no_grad()
def k_composition(model, later: tuple[int, int], draws: int = 20, seed: int = 0) -> pd.DataFrame:
    """How much of what each head of earlier layers writes enters the keys of the head `later` (layer, head).

    The score is ||W_OV W_KQ|| / (||W_OV|| ||W_KQ||), Frobenius norms, W_OV = W_V W_O of the earlier head and W_KQ = W_K
    W_Q^T of the later one, each with the norms that it reads or writes through. Columns layer, head, value, and
    baseline, baseline_high: mean and 95 % quantile over `draws` earlier heads with Gaussian weights.
    ValueError for a head that has none before it, or that the model does not have.
    """
    inside = Internals(model)
    layer, head = later
    if not (0 < layer < inside.layers and 0 <= head < inside.heads):
        raise ValueError(
            f"later = {later}: has no heads before it in this model; give a layer from 1 to "
            f"{inside.layers - 1} and a head below {inside.heads}"
        )
    stream = torch.eye(inside.width, device=model.device)

    def reading(at):
        return norm_gain(inside.input_norm(at), stream)

    w_q, w_k, _ = (
        reading(layer) @ projection[head].float() for projection in inside.projections(layer)
    )

    one = torch.eye(inside.head_dim, device=model.device)

    def composed(w_v, w_o):
        return float(
            product_norm(w_v, w_o @ w_k, w_q)
            / (product_norm(w_v, one, w_o.T) * product_norm(w_k, one, w_q))
        )

    rows = []
    for before in range(layer):
        for number, (w_v, w_o) in enumerate(
            zip(inside.projections(before)[2], inside.w_o(before), strict=True)
        ):
            rows.append(
                (
                    before,
                    number,
                    composed(
                        reading(before) @ w_v.float(),
                        norm_gain(inside.output_norm(before), w_o.float()),
                    ),
                )
            )
    generator = torch.Generator().manual_seed(seed)
    shape = (draws, 2, inside.width, inside.head_dim)
    random = torch.randn(shape, generator=generator).to(model.device)
    null = pd.Series([composed(w_v, w_o.T) for w_v, w_o in random])
    table = pd.DataFrame(rows, columns=["layer", "head", "value"])
    return table.assign(baseline=null.mean(), baseline_high=null.quantile(0.95))


def product_norm(left, middle, right) -> torch.Tensor:
    """||left middle right^T|| (Frobenius) of left (m, d), middle (d, e), right (n, e), without an m by n matrix."""
    return torch.trace(middle.T @ (left.T @ left) @ middle @ (right.T @ right)).clamp(min=0).sqrt()
