"""Memory that measuring a model takes, told before it is loaded."""

import pytest
import torch
from latentree.series.footprint import footprint, rows_that_fit
from latentree.train.model import build_model, parameter_count
from transformers import OlmoConfig


def test_the_footprint_counts_weights_and_grows_with_rows_and_context():
    config = OlmoConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=50,
    )
    model = build_model("olmo", 50, 2, 32, 4, 64, mlp_width=64)
    assert footprint(config, 1, 64)["weights"] == pytest.approx(4 * parameter_count(model) / 1e9)
    half, whole = footprint(config, 2, 64, torch.bfloat16), footprint(config, 4, 64, torch.bfloat16)
    assert (
        whole["attention"] == 2 * half["attention"]
        and footprint(config, 2, 128, torch.bfloat16)["attention"] == 4 * half["attention"]
    )
    assert rows_that_fit(config, 1.0, 64, most=32) == 32
    rows = rows_that_fit(config, 0.02, 512)
    assert (
        sum(footprint(config, rows, 512).values())
        <= 0.02
        < sum(footprint(config, rows + 1, 512).values())
    )
    with pytest.raises(
        ValueError, match="memory_limit_gb = 0.0001: one sequence of 512 tokens takes"
    ):
        rows_that_fit(config, 0.0001, 512)


def test_a_billion_parameters_fit_twelve_gigabytes_with_2048_tokens():
    config = OlmoConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        intermediate_size=8192,
        vocab_size=50304,
        tie_word_embeddings=True,
    )
    assert 1.1e9 < footprint(config, 1, 2048)["weights"] / 4 * 1e9 < 1.3e9
    assert (
        rows_that_fit(config, 12.0, 2048) >= 1
        and rows_that_fit(config, 12.0, 2048, torch.bfloat16) >= 2
    )
