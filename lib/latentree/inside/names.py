"""One standard name for each internal point of a causal language model, whatever its architecture calls it.

Matrices follow the mathematics of a row vector: with x (width) the input of a head, its value is x @ W_V (head_dim), and
what it adds to the attention's output is z @ W_O (width), where z (head_dim) is the head's mix of values.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import torch
from nnsight import NNsight
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Names:
    """Where an architecture keeps its parts: dotted paths from the model, then from a block."""

    blocks: str
    embedding: str
    final_norm: str
    attention: str
    o_proj: str
    projections: tuple[str, ...]  # of queries, keys and values; one if they are fused
    input_norm: str | None  # of the attention; none where it reads the residual stream as it is


SPLIT = tuple(f"self_attn.{part}_proj" for part in "qkv")
STACK = ("model.layers", "model.embed_tokens", "model.norm", "self_attn", "self_attn.o_proj", SPLIT)
NAMES = {
    "llama": Names(*STACK, "input_layernorm"),
    "olmo": Names(*STACK, "input_layernorm"),
    "olmo2": Names(*STACK, None),
    "gpt_neox": Names(
        "gpt_neox.layers",
        "gpt_neox.embed_in",
        "gpt_neox.final_layer_norm",
        "attention",
        "attention.dense",
        ("attention.query_key_value",),
        "input_layernorm",
    ),
    "gpt2": Names(
        "transformer.h",
        "transformer.wte",
        "transformer.ln_f",
        "attn",
        "attn.c_proj",
        ("attn.c_attn",),
        "ln_1",
    ),
}


def part(root, path: str):
    """What a dotted path leads to, in a module or in nnsight's view of it."""
    return reduce(getattr, path.split("."), root)


def weight(module) -> torch.Tensor:
    """The matrix (out, in) of a linear layer; GPT-2's Conv1D keeps it transposed."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def norm_gain(norm, vectors: torch.Tensor) -> torch.Tensor:
    """The linear part of a norm on vectors (..., width): centred if it is a LayerNorm, times its gain if it has one.

    The division by the scale and the bias are left out. No norm (None) changes nothing.
    """
    if norm is None:
        return vectors
    if "LayerNorm" in type(norm).__name__:
        vectors = vectors - vectors.mean(-1, keepdim=True)
    gain = getattr(norm, "weight", None)  # OLMo's LayerNorm has none
    return vectors if gain is None else vectors * gain


def norm_scale(norm, vectors: torch.Tensor) -> torch.Tensor:
    """What a norm multiplies vectors (..., width) by, beside its gain: (..., 1). No norm (None) multiplies by 1.

    norm(vectors) = norm_gain(norm, vectors) * norm_scale(norm, vectors) + its bias, if it has one.
    """
    if norm is None:
        return torch.ones_like(vectors[..., :1])
    if "LayerNorm" in type(norm).__name__:
        vectors = vectors - vectors.mean(-1, keepdim=True)
    epsilon = next(
        (getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), 1e-5
    )  # OLMo's own
    return (vectors.square().mean(-1, keepdim=True) + epsilon).rsqrt()


@torch.no_grad()
def written_in(model, given: dict, layer: int = -1, replaced: dict | None = None) -> dict:
    """What is written in a run of nnsight on the inputs `given`; `replaced` {site: tensor} takes its place in `layer`.

    `attention`, `mlp` (layer, batch, position, width): what these add to the stream; `z` (layer, batch, position, head,
    head_dim); `embedding`, `stream` (after the last block), `normed` (batch, position, width); `cache`, keys and values.
    """
    traced, replaced = NNsight(model), replaced or {}
    inside = Internals(model, traced)
    with traced.trace(**given, logits_to_keep=1):
        embedding = inside.blocks[0].input.save()
        sites = {"z": [], "attention": [], "mlp": []}
        for number in range(inside.layers):
            new = replaced if number == layer else {}
            if "z" in new:
                inside.o_proj(number).input = new["z"].flatten(-2)
            sites["z"].append(
                inside.o_proj(number).input.unflatten(-1, (inside.heads, inside.head_dim))
            )
            if "attention" in new:
                inside.attention_written(number).output = new["attention"]
            sites["attention"].append(inside.attention_written(number).output)
            if "mlp" in new:
                inside.mlp_written(number).output = new["mlp"]
            sites["mlp"].append(inside.mlp_written(number).output)
        sites.save()
        stream, normed = inside.final_norm.input.save(), inside.final_norm.output.save()
        cache = traced.output.past_key_values.save()
    found = {name: torch.stack(values) for name, values in sites.items()}
    return found | {"embedding": embedding, "stream": stream, "normed": normed, "cache": cache}


@contextmanager
def readable_attention(model):
    """Within, the model's attention is eager: the other implementations are faster and compute no probabilities to read."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def read_attention(model, tokens, read) -> tuple[list, torch.Tensor]:
    """What `read` makes of each layer's attention (batch, head, query, key) on tokens (batch, position), and the logits.

    One layer's attention is held at a time.
    """
    inside, found = Internals(model), []

    def hook(module, inputs, output):
        found.append(read(output[1]))
        return (output[0], None, *output[2:])

    hooks = [inside.attention(layer).register_forward_hook(hook) for layer in range(inside.layers)]
    try:
        with readable_attention(model):
            return found, model(input_ids=tokens, use_cache=False).logits
    finally:
        for one in hooks:
            one.remove()


class Internals:
    """A model's internal points by name.

    `blocks` (a list of the layers' modules), `embedding`, `unembedding`, `final_norm`; numbers `layers`, `heads`,
    `kv_heads` (key and value heads, fewer than `heads` where queries share them), `head_dim` and `width`.

    `root` may be nnsight's view of `model`: the points are then its envoys, to read and set in a trace. The methods
    that return weights need the model itself. ValueError if the architecture is unknown, or has no such heads.
    """

    def __init__(self, model, root=None):
        self.model, self.config = model, model.config
        self.architecture = self.config.model_type
        if self.architecture not in NAMES:
            known = ", ".join(NAMES)
            raise ValueError(
                f"architecture = {self.architecture!r}: its parts have no names here; use one of {known}"
            )
        self.names, root = NAMES[self.architecture], root if root is not None else model
        self.blocks, self.embedding = (
            part(root, self.names.blocks),
            part(root, self.names.embedding),
        )
        self.final_norm, self.unembedding = part(root, self.names.final_norm), root.lm_head
        self.layers, self.heads = self.config.num_hidden_layers, self.config.num_attention_heads
        self.width = self.config.hidden_size
        self.kv_heads = getattr(self.config, "num_key_value_heads", None) or self.heads
        self.head_dim = getattr(self.config, "head_dim", None) or self.width // self.heads
        for layer, block in enumerate(part(model, self.names.blocks)):
            found = weight(part(block, self.names.o_proj)).shape[1]
            if found != self.heads * self.head_dim:
                raise ValueError(
                    f"o_proj of layer {layer}: reads {found} coordinates, which are not {self.heads} heads of "
                    f"{self.head_dim}; give a model whose attention concatenates its heads"
                )

    def attention(self, layer: int):
        """The attention of a layer: its output is (what it adds to the stream, probabilities)."""
        return part(self.blocks[layer], self.names.attention)

    def o_proj(self, layer: int):
        """The projection that reads the heads' mixes of values, end to end: (..., heads * head_dim)."""
        return part(self.blocks[layer], self.names.o_proj)

    def value_proj(self, layer: int):
        """The module whose output holds the values; `values` takes them out of it."""
        return part(self.blocks[layer], self.names.projections[-1])

    def mlp(self, layer: int):
        """The MLP of a layer."""
        return self.blocks[layer].mlp

    def input_norm(self, layer: int):
        """The norm before the attention; None where it reads the stream as it is (OLMo 2, which norms what it adds)."""
        return part(self.blocks[layer], self.names.input_norm) if self.names.input_norm else None

    def output_norm(self, layer: int):
        """The norm of what the attention adds to the stream; None but for OLMo 2."""
        return self.blocks[layer].post_attention_layernorm if self.architecture == "olmo2" else None

    def attention_written(self, layer: int):
        """The module whose output is what the attention of a layer adds to the stream: its output norm, if there is one."""
        norm = self.output_norm(layer)
        return self.o_proj(layer) if norm is None else norm

    def mlp_written(self, layer: int):
        """The module whose output is what the MLP of a layer adds to the stream."""
        return (
            self.blocks[layer].post_feedforward_layernorm
            if self.architecture == "olmo2"
            else self.mlp(layer)
        )

    def values(self, projected: torch.Tensor) -> torch.Tensor:
        """The values (..., head, head_dim) in the output (..., channels) of `value_proj`, a shared one for each head."""
        value = self._unfused(projected)[-1]
        clip = getattr(self.config, "clip_qkv", None)  # OLMo bounds queries, keys and values
        value = value if clip is None else value.clamp(-clip, clip)
        return value.repeat_interleave(self.heads // value.shape[-2], -2)

    def projections(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """W_Q, W_K, W_V of a layer, (head, width, head_dim) each: a shared key or value head is repeated.

        Biases and rotary positions are left out; OLMo 2's norms of queries and keys enter by their gains.
        """
        block, attention = self.blocks[layer], self.attention(layer)
        rows = [weight(part(block, path)).T for path in self.names.projections]
        for i, name in enumerate(("q_norm", "k_norm")):
            if hasattr(attention, name):
                rows[i] = rows[i] * getattr(attention, name).weight
        split = (
            self._unfused(rows[0]) if len(rows) == 1 else [self._unfused(row)[-1] for row in rows]
        )
        shared = [matrix.repeat_interleave(self.heads // matrix.shape[-2], -2) for matrix in split]
        return tuple(matrix.transpose(0, 1) for matrix in shared)

    def w_o(self, layer: int) -> torch.Tensor:
        """W_O of each head of a layer: (head, head_dim, width)."""
        return weight(self.o_proj(layer)).T.unflatten(0, (self.heads, self.head_dim))

    def head_written(self, layer: int, z: torch.Tensor) -> torch.Tensor:
        """What each head adds to the stream (..., head, width), from the mixes z (..., head, head_dim) of all of a layer.

        With the bias of o_proj, if it has one, this sums to the attention's part. Where a norm reads their sum (OLMo 2),
        each head's is scaled as the sum is.
        """
        norm, added = (
            self.output_norm(layer),
            torch.einsum("...hd,hdw->...hw", z, self.w_o(layer).to(z)),
        )
        bias = getattr(self.o_proj(layer), "bias", None)
        total = added.sum(-2, keepdim=True) + (0 if bias is None else bias)
        return norm_gain(norm, added) * norm_scale(norm, total)

    def _unfused(self, projected):
        """Queries, keys and values (..., heads, head_dim) of a fused projection (..., channels); else the one there is."""
        if len(self.names.projections) > 1:
            return [projected.unflatten(-1, (-1, self.head_dim))]
        if self.architecture == "gpt_neox":  # for each head its query, key and value
            return projected.unflatten(-1, (self.heads, 3, self.head_dim)).unbind(-2)
        return projected.unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)
