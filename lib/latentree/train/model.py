"""Causal language models of transformers, built from a few numbers and a seed, with no pretrained weights."""

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# What each family calls the same six numbers, and what it needs beside them.
LLAMA_NAMES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "context": "max_position_embeddings",
}
GPT2_NAMES = {
    "layers": "n_layer",
    "width": "n_embd",
    "heads": "n_head",
    "mlp_width": "n_inner",
    "context": "n_positions",
}
ARCHITECTURES = {
    "llama": (LLAMA_NAMES, {}),
    "olmo": (LLAMA_NAMES, {}),
    "olmo2": (LLAMA_NAMES, {}),
    "gpt_neox": (LLAMA_NAMES, {}),
    "gpt2": (GPT2_NAMES, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}


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
    """A freshly initialised causal model, in float32 on the CPU.

    `context` is the longest sequence in tokens; `mlp_width` is 4 `width` unless given; `end` is the token id that
    closes a sentence, stored as the begin and end ids of the config (none otherwise). Embeddings are untied and there
    is no dropout. Anything in `config` goes to the family's config as it is (`initializer_range=0.02`, say).
    The weights depend on `seed` alone and the caller's random state is left as it was.

    The model takes tokens (batch, position) and returns logits (batch, position, vocabulary).
    Raises ValueError for an unknown architecture, or sizes or ids that do not fit together.
    """
    check_sizes(architecture, vocabulary_size, layers, width, heads, context, mlp_width, end)
    names, settings = ARCHITECTURES[architecture]
    sizes = {
        "layers": layers,
        "width": width,
        "heads": heads,
        "mlp_width": mlp_width or 4 * width,
        "context": context,
    }
    settings = settings | {names[name]: value for name, value in sizes.items()}
    settings |= {"vocab_size": vocabulary_size, "tie_word_embeddings": False, "use_cache": False}
    settings |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None} | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(architecture, **settings),
            attn_implementation="sdpa",
            dtype=torch.float32,
        )


def check_sizes(
    architecture: str,
    vocabulary_size: int,
    layers: int,
    width: int,
    heads: int,
    context: int,
    mlp_width: int | None = None,
    end: int | None = None,
) -> None:
    """Raises ValueError when `build_model` cannot build a model of these sizes."""
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture: {architecture!r} is not known; choose one of {', '.join(ARCHITECTURES)}"
        )
    sizes = {
        "vocabulary_size": vocabulary_size,
        "layers": layers,
        "width": width,
        "heads": heads,
        "context": context,
    }
    for name, value in (sizes | ({} if mlp_width is None else {"mlp_width": mlp_width})).items():
        if value < 1:
            raise ValueError(f"{name}: {value} is too small; give a whole number from 1 up")
    if width % heads:
        raise ValueError(
            f"width: {width} does not divide by heads={heads}; give a width that is a multiple of {heads}"
        )
    # Rotary positions turn pairs of coordinates; Pythia's family turns a quarter of them.
    pairs = {"gpt2": 1, "gpt_neox": 8}.get(architecture, 2)
    if (width // heads) % pairs:
        raise ValueError(
            f"width: {width} gives {architecture} heads of {width // heads} coordinates, which rotary positions cannot "
            f"turn; give a width that is a multiple of {pairs * heads}"
        )
    if end is not None and not 0 <= end < vocabulary_size:
        raise ValueError(
            f"end: {end} is outside the vocabulary; give a token id from 0 to {vocabulary_size - 1}"
        )


def parameter_count(model: torch.nn.Module, embeddings: bool = True) -> int:
    """Number of trainable parameters; without those of the embedding and the unembedding if `embeddings` is false."""
    tables = (
        []
        if embeddings
        else [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    )
    left_out = {id(table) for table in tables}
    return sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in left_out)


def next_token_losses(logits, tokens) -> torch.Tensor:
    """Losses in nats of predicting each next token: (batch, position - 1) from logits (batch, position, vocabulary)."""
    targets = tokens[:, 1:]
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none"
    ).view(targets.shape)


@torch.no_grad()
def log_probabilities(model, tokens, rows: int = 64) -> torch.Tensor:
    """Log probabilities (sequence, position, vocabulary), float32, of the token after each of tokens (sequence, position)."""
    parts = tokens.to(model.device).split(rows)
    return torch.cat(
        [
            model(input_ids=part, use_cache=False).logits.float().log_softmax(-1).cpu()
            for part in parts
        ]
    )
