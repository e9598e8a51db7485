"""One standard name for each internal point of a causal language model.

Matrices follow the mathematics of a row vector: what a head adds to the attention's output is
z @ W_O (width), where z (head_dim) is the head's mix of values.
"""

from dataclasses import dataclass, field
from functools import reduce

import torch
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Names:
    """Where an architecture keeps its parts: dotted paths from the model, then from a block.

    The defaults are Llama's, so that an architecture of its layout is one line in NAMES.
    """

    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    o_proj: str = "self_attn.o_proj"
    projections: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    input_norm: str | None = "input_layernorm"  # None: the attention reads the stream as it is
    attention_norm: str | None = None  # of what the attention adds to the stream
    mlp: str = "mlp"  # what writes what the MLP adds to it: the MLP, or a norm after it
    mlp_size: str = "intermediate_size"  # what the config calls the MLP's width
    config: dict = field(default_factory=dict)  # what the config needs beside the sizes


_NORMED_AFTERWARDS = Names(
    input_norm=None,
    attention_norm="post_attention_layernorm",
    mlp="post_feedforward_layernorm",
)
NAMES = {
    "llama": Names(),
    # Built here with attention to the last 8 tokens only, which forces a model to relay.
    "mistral": Names(config={"sliding_window": 8}),
    "qwen3": Names(),
    "smollm3": Names(),
    "phi3": Names(projections=("self_attn.qkv_proj",)),
    "olmo": Names(),
    "olmo2": _NORMED_AFTERWARDS,
    "olmo3": _NORMED_AFTERWARDS,
    "gpt_neox": Names(
        blocks="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        o_proj="attention.dense",
        projections=("attention.query_key_value",),
    ),
    "gpt2": Names(
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        o_proj="attn.c_proj",
        projections=("attn.c_attn",),
        input_norm="ln_1",
        mlp_size="n_inner",
        config={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
}


def names_of(architecture: str) -> Names:
    """The names in an architecture. ValueError for one that is unknown here."""
    if architecture not in NAMES:
        known = f"use one of {', '.join(NAMES)}, or add a line to NAMES"
        raise ValueError(f"architecture = {architecture!r}: its parts have no names here; {known}")
    return NAMES[architecture]


class Internals:
    """A model's internal points by name.

    `blocks` (the layers' modules), `final_norm`, `unembedding`; numbers `layers`, `heads`,
    `head_dim` and `width`. `root` may be nnsight's view of `model`: the points are then what a
    trace reads and sets. The methods that return weights need the model itself.
    Raises ValueError if the architecture is unknown, or its attention has no such heads.
    """

    def __init__(self, model, root=None):
        self.config, root = model.config, model if root is None else root
        self.names = names_of(self.config.model_type)
        self.blocks, self.unembedding = _part(root, self.names.blocks), root.lm_head
        self.final_norm = _part(root, self.names.final_norm)
        self.layers, self.heads = self.config.num_hidden_layers, self.config.num_attention_heads
        self.width = self.config.hidden_size
        self.head_dim = getattr(self.config, "head_dim", None) or self.width // self.heads
        first = _part(_part(model, self.names.blocks)[0], self.names.o_proj)
        read = weight(first).shape[1]
        if read != self.heads * self.head_dim:
            raise ValueError(
                f"o_proj: reads {read} coordinates, which are not {self.heads} heads of "
                f"{self.head_dim}; give a model that concatenates its heads"
            )

    def o_proj(self, layer: int):
        """The projection that reads the heads' mixes of values, (..., heads * head_dim)."""
        return _part(self.blocks[layer], self.names.o_proj)

    def input_norm(self, layer: int):
        """The norm before the attention; None where it reads the stream as it is."""
        return _part(self.blocks[layer], self.names.input_norm)

    def output_norm(self, layer: int):
        """The norm of what the attention adds to the stream; None where there is none."""
        return _part(self.blocks[layer], self.names.attention_norm)

    def attention_written(self, layer: int):
        """The module whose output is what the attention of a layer adds to the stream."""
        return _part(self.blocks[layer], self.names.attention_norm or self.names.o_proj)

    def mlp_written(self, layer: int):
        """The module whose output is what the MLP of a layer adds to the stream."""
        return _part(self.blocks[layer], self.names.mlp)

    def projectors(self, layer: int) -> dict:
        """The modules that project queries, keys and values, {q, k, v: module}; {} if one does."""
        parts = [_part(self.blocks[layer], path) for path in self.names.projections]
        return dict(zip("qkv", parts)) if len(parts) == 3 else {}

    def w_o(self, layer: int) -> torch.Tensor:
        """W_O of each head of a layer: (head, head_dim, width)."""
        return weight(self.o_proj(layer)).T.unflatten(0, (self.heads, self.head_dim))

    def head_written(self, layer: int, z: torch.Tensor) -> torch.Tensor:
        """What each head of a layer adds to the stream (..., head, width).

        `z` (..., head, head_dim) are the mixes of all its heads. With the bias of o_proj, if it has
        one, this sums to the attention's part. Where a norm reads their sum, each head's part is
        scaled as the sum is.
        """
        added = torch.einsum("...hd,hdw->...hw", z, self.w_o(layer).to(z))
        total = added.sum(-2, keepdim=True)
        if getattr(self.o_proj(layer), "bias", None) is not None:
            total = total + self.o_proj(layer).bias
        norm = self.output_norm(layer)
        return norm_gain(norm, added) * norm_scale(norm, total)


def _part(root, path: str | None):
    """What a dotted path leads to, in a module or in nnsight's view of it; None for no path."""
    return None if path is None else reduce(getattr, path.split("."), root)


def weight(module) -> torch.Tensor:
    """The matrix (out, in) of a linear layer; GPT-2's Conv1D keeps it transposed."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def norm_gain(norm, vectors: torch.Tensor) -> torch.Tensor:
    """The linear part of a norm on vectors (..., width): all but its scale and its bias.

    They are centred if it is a LayerNorm, and times its gain if it has one; no norm changes none.
    """
    if norm is None:
        return vectors
    if "LayerNorm" in type(norm).__name__:
        vectors = vectors - vectors.mean(-1, keepdim=True)
    gain = getattr(norm, "weight", None)  # OLMo's LayerNorm has none
    return vectors if gain is None else vectors * gain


def norm_scale(norm, vectors: torch.Tensor) -> torch.Tensor:
    """What a norm multiplies vectors (..., width) by, beside its gain: (..., 1); no norm: 1.

    norm(vectors) = norm_gain(norm, vectors) * norm_scale(norm, vectors) + its bias, if it has one.
    """
    if norm is None:
        return torch.ones_like(vectors[..., :1])
    if "LayerNorm" in type(norm).__name__:
        vectors = vectors - vectors.mean(-1, keepdim=True)
    epsilon = getattr(norm, "eps", getattr(norm, "variance_epsilon", 1e-5))  # the last is OLMo's
    return (vectors.square().mean(-1, keepdim=True) + epsilon).rsqrt()
