"""Causal language models of transformers, built from a few numbers and a seed."""

import warnings
from threading import Lock

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from latentree.inside.names import names_of
from latentree.inside.products import use_onednn

_SEEDING = Lock()  # torch has one random state for all threads


def build_model(
    architecture: str,
    vocabulary_size: int,
    layers: int,
    width: int,
    heads: int,
    context: int,
    mlp_width: int | None = None,
    seed: int = 0,
    end: int | None = None,
    **config,
) -> PreTrainedModel:
    """A freshly initialised causal model, in float32 on the CPU, with untied embeddings.

    `context` is the longest sequence in tokens; `mlp_width` is 4 `width` unless given, and 0 for
    attention only; `end` is the token id that closes a sentence (none: None). Anything in `config`
    goes to the architecture's config as it is (`initializer_range=0.02`, say). The weights depend
    on `seed` alone, and the caller's random state is left as it was.

    The model takes tokens (batch, position) and returns logits (batch, position, vocabulary).
    """
    names = names_of(architecture)
    if width % heads:  # some architectures would round the width of a head down
        raise ValueError(f"width = {width}: give a multiple of heads = {heads}")
    settings = {
        "vocab_size": vocabulary_size,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        names.mlp_size: 4 * width if mlp_width is None else mlp_width,
        "tie_word_embeddings": False,
        "use_cache": False,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": None,
    }
    if hasattr(AutoConfig.for_model(architecture), "num_key_value_heads"):
        settings["num_key_value_heads"] = heads
    settings |= names.config | config
    with _SEEDING, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # of no MLP
        torch.manual_seed(seed)
        shape = AutoConfig.for_model(architecture, **settings)
        options = {"attn_implementation": "sdpa", "dtype": torch.float32}
        return use_onednn(AutoModelForCausalLM.from_config(shape, **options))


def next_token_losses(logits, tokens) -> torch.Tensor:
    """Losses in nats of predicting each next token, (batch, position - 1).

    `logits` are (batch, position, vocabulary), `tokens` (batch, position).
    """
    targets = tokens[:, 1:].to(logits.device)
    predicted = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(predicted, targets.flatten(), reduction="none").view(targets.shape)


@torch.no_grad()
def log_probabilities(model, tokens, rows: int = 64) -> torch.Tensor:
    """Log probabilities of the token after each of `tokens` (sequence, position), on the CPU.

    They are (sequence, position, vocabulary) in float32; `rows` sequences are run at a time.
    """
    parts = []
    for part in tokens.to(model.device).split(rows):
        logits = model(input_ids=part, use_cache=False).logits
        parts.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(parts)
