"""How much memory measuring a model takes, told before anything is loaded."""

import torch
from transformers import AutoModelForCausalLM

from latentree.train.model import parameter_count

GB = 1e9


def footprint(config, rows: int, context: int, dtype=torch.float32) -> dict[str, float]:
    """Gigabytes that measuring a model of this transformers config takes, by part, for `rows` sequences at a time.

    weights; attention, of one layer at a time: scores, and probabilities in float32; logits, in float32 with their log
    probabilities, and the unembedding in float64; contributions, what all layers' attention and MLP write (the Hydra
    measurements hold these twice).
    """
    with torch.device("meta"):
        weights = parameter_count(AutoModelForCausalLM.from_config(config))
    size, tokens = dtype.itemsize, rows * context
    return {
        "weights": weights * size / GB,
        "attention": tokens * context * config.num_attention_heads * (2 * size + 8) / GB,
        "logits": (2 * tokens * 4 + 8 * config.hidden_size) * config.vocab_size / GB,
        "contributions": 6 * tokens * config.num_hidden_layers * config.hidden_size * size / GB,
    }


def rows_that_fit(
    config, limit_gb: float, context: int, dtype=torch.float32, most: int = 64
) -> int:
    """How many sequences of `context` tokens can be measured at a time within `limit_gb`, `most` at most.

    ValueError if not even one can.
    """

    def needed(rows):
        return sum(footprint(config, rows, context, dtype).values())

    if needed(1) > limit_gb:
        raise ValueError(
            f"memory_limit_gb = {limit_gb:g}: one sequence of {context} tokens takes {needed(1):.1f} GB with this model; "
            "give a shorter context, bfloat16, or a higher limit"
        )
    fixed = needed(0)
    return max(1, min(most, int((limit_gb - fixed) / (needed(1) - fixed))))
