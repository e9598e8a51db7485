"""Circuits: what one part of a model hands to one head, by cutting that path alone."""

from itertools import product

import pandas as pd
import torch

from latentree.inside.names import Internals
from latentree.inside.trace import run


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
    senders, heads = [("embedding",)], range(model.config.num_attention_heads)
    for layer in range(receiver[0]):
        senders += [*(("head", layer, head) for head in heads), ("mlp", layer)]
    clean, rows = scores(run(model, tokens, ["logits"])["logits"]), []
    for sender, point in product(senders, "qkv"):
        change = path_patch(model, tokens, sender, receiver, point)
        cut = scores(run(model, tokens, ["logits"], change)["logits"])
        part = " ".join(map(str, sender))
        rows += [[part, point, name, value - clean[name]] for name, value in cut.items()]
    return pd.DataFrame(rows, columns=["part", "into", "score", "rise"])
