"""Circuits: what heads do by their weights alone, and what one part hands to one head.

In copying by the OV circuit and in K-composition norms enter as linear maps: they centre if they
are LayerNorms and multiply by their gain; the division by the scale, the biases and the rotary
positions are left out. MLPs and position embeddings are not part of a path from head to head
(Elhage et al. 2021).
"""

import pandas as pd
import torch

from latentree.inside.names import Internals, norm_gain, weight
from latentree.inside.trace import run

_MOST_TOKENS = 4096  # different tokens that sequences are taken together for


@torch.no_grad()
def copying(model, tokens) -> torch.Tensor:
    """How far each head's OV circuit raises what it attends to, over other tokens in context.

    C[a, b] is the logit of token b when the head attends to token a: embedding, the attention's
    input norm, W_V, W_O, the norm of its output if there is one, the final norm, unembedding.
    For the different tokens a, b of a sequence of `tokens` (sequence, position): the share of
    pairs with C[a, a] > C[a, b] minus the share with less, in [-1, 1]. Norms' scales do not
    matter, for they change all of C[a] alike. Returns (sequence, head), float64, heads numbered
    through all layers.
    """
    inside = Internals(model)
    seen, place = tokens.to(model.device).unique(return_inverse=True)
    if len(seen) > _MOST_TOKENS and len(tokens) > 1:
        return torch.cat([copying(model, row[None]) for row in tokens])
    present = torch.zeros(len(tokens), len(seen), device=model.device).scatter(1, place, 1.0)
    pairs = (present.sum(1) * (present.sum(1) - 1)).clamp(min=1)
    embedded, unembedding = inside.embedding.weight[seen], weight(inside.unembedding)[seen]
    scores = []
    for layer in range(inside.layers):
        read = norm_gain(inside.input_norm(layer), embedded)
        written = norm_gain(inside.output_norm(layer), inside.w_o(layer))
        read_out = norm_gain(inside.final_norm, written) @ unembedding.T
        for w_v, w_ou in zip(inside.projections(layer)[2], read_out):
            logits = read @ w_v @ w_ou
            raised = torch.sign(logits.diagonal()[:, None] - logits).to(present.dtype)
            scores.append((present @ raised * present).sum(1) / pairs)
    return torch.stack(scores, 1).double().cpu()


@torch.no_grad()
def k_composition(model, later: tuple[int, int], draws: int = 20, seed: int = 0) -> pd.DataFrame:
    """How much of what each head of earlier layers writes enters the keys of the head `later`.

    The score is ||W_OV W_KQ|| / (||W_OV|| ||W_KQ||), Frobenius norms, W_OV = W_V W_O of the earlier
    head and W_KQ = W_K W_Q^T of the later one (layer, head), each with the norms that it reads or
    writes through. Columns layer, head, value, and baseline, baseline_high: mean and 95 % quantile
    over `draws` earlier heads with Gaussian weights. Raises ValueError for a head of layer 0.
    """
    inside, (layer, head) = Internals(model), later
    if layer == 0:
        raise ValueError(f"later = {later}: has no heads before it; give a head of a later layer")
    stream = torch.eye(inside.width, device=model.device)
    one = torch.eye(inside.head_dim, device=model.device)
    into = norm_gain(inside.input_norm(layer), stream)
    w_q, w_k = (into @ matrix[head].float() for matrix in inside.projections(layer)[:2])

    def composed(w_v, w_o):
        together = _product_norm(w_v, w_o @ w_k, w_q)
        return float(together / _product_norm(w_v, one, w_o.T) / _product_norm(w_k, one, w_q))

    rows = []
    for before in range(layer):
        into, w_vs = norm_gain(inside.input_norm(before), stream), inside.projections(before)[2]
        w_os = norm_gain(inside.output_norm(before), inside.w_o(before).float())
        for number, (w_v, w_o) in enumerate(zip(w_vs, w_os)):
            value = composed(into @ w_v.float(), w_o)
            rows.append({"layer": before, "head": number, "value": value})
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(draws, 2, inside.width, inside.head_dim, generator=generator)
    null = pd.Series([composed(w_v, w_o.T) for w_v, w_o in random.to(model.device)])
    return pd.DataFrame(rows).assign(baseline=null.mean(), baseline_high=null.quantile(0.95))


@torch.no_grad()
def path_patch(model, tokens, sender: tuple, receiver: tuple[int, int], point: str) -> dict:
    """The change of a run that cuts one path: from `sender` to what one head reads at `point`.

    What the sender, ("head", layer, head), ("mlp", layer) or ("embedding",), adds to the stream is
    replaced by its mean over tokens (batch, position), but only where the head `receiver` (layer,
    head) reads it, as its queries q, keys k or values v; all else stays as it was (Goldowsky-Dill
    et al. 2023). Give the result to `trace.run` as `change`. A shared key or value head changes for
    all that share it. Raises ValueError for a sender that does not come before the receiver.
    """
    inside, (layer, head) = Internals(model), receiver
    kind, *where = sender
    if where and where[0] >= layer:
        raise ValueError(f"sender = {sender}: does not come before the receiver {receiver}")
    clean = run(model, tokens, ["stream", "z", "mlp"])
    if kind == "embedding":
        written = clean["stream"][0]
    elif kind == "mlp":
        written = clean["mlp"][where[0]]
    else:
        written = inside.head_written(where[0], clean["z"][where[0]])[..., where[1], :]
    read = clean["stream"][layer] - written + written.mean((0, 1))
    norm, projector = inside.input_norm(layer), inside.projectors(layer)[point]
    projected = projector(read if norm is None else norm(read)).unflatten(-1, (-1, inside.head_dim))
    own = head * projected.shape[-2] // inside.heads

    def replace(vectors):
        vectors[..., own, :] = projected[..., own, :]
        return vectors

    return {(point, layer): replace}


def paths_into(model, tokens, receiver: tuple[int, int], scores) -> pd.DataFrame:
    """What cutting each path into a head changes: `path_patch` of every earlier part and point.

    `scores(logits)` is a dict of numbers. Columns part ("head 0 2", "mlp 0", "embedding"), into (q,
    k, v), score (its name) and rise, the score with the path cut minus that of the clean run.
    """
    senders = [("embedding",)]
    for layer in range(receiver[0]):
        heads = range(model.config.num_attention_heads)
        senders += [*(("head", layer, head) for head in heads), ("mlp", layer)]
    clean, rows = scores(run(model, tokens, ["logits"])["logits"]), []
    for sender in senders:
        for point in "qkv":
            change = path_patch(model, tokens, sender, receiver, point)
            cut = scores(run(model, tokens, ["logits"], change)["logits"])
            for name, value in cut.items():
                rows.append([" ".join(map(str, sender)), point, name, value - clean[name]])
    return pd.DataFrame(rows, columns=["part", "into", "score", "rise"])


def _product_norm(left, middle, right) -> torch.Tensor:
    """||left middle right^T|| (Frobenius), without an m by n matrix.

    left (m, d), middle (d, e), right (n, e).
    """
    return torch.trace(middle.T @ (left.T @ left) @ middle @ (right.T @ right)).clamp(min=0).sqrt()
