"""Attention probabilities, to be read or replaced, by transformers' interface for attention."""

from contextlib import contextmanager
from functools import partial

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

_OPEN = "latentree_open"  # the name under which transformers finds the attention function below


@contextmanager
def attention(model, see, weigh=partial(torch.softmax, dim=-1, dtype=torch.float32)):
    """Within, every layer calls `see(layer, probabilities)`.

    They are (batch, head, query, key). What it returns, unless None, is attended with in their
    place. `weigh` makes them from scores, which are very negative where a key is hidden. Afterwards
    the model has its own attention function back, which is faster and computes no probabilities.
    """

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        shared = query.shape[1] // key.shape[1]  # query heads to each key and value head
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        scores = (query * scaling) @ key.transpose(2, 3)
        if attention_mask is not None:
            scores = scores + attention_mask
        probabilities = weigh(scores).to(value.dtype)
        replaced = see(module.layer_idx, probabilities)
        if replaced is not None:
            probabilities = replaced
        return (probabilities @ value).transpose(1, 2).contiguous(), probabilities

    AttentionInterface.register(_OPEN, attend)
    AttentionMaskInterface.register(_OPEN, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_OPEN)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def patterns(model, tokens) -> torch.Tensor:
    """Every head's attention to tokens (batch, position): (layer, batch, head, query, key), CPU."""
    found = []
    with attention(model, lambda layer, probabilities: found.append(probabilities.cpu())):
        model(input_ids=tokens.to(model.device), use_cache=False, logits_to_keep=1)
    return torch.stack(found)
