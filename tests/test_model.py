from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from latentree.inside.names import NAMES
from latentree.series.checkpoints import load_whole
from latentree.train.model import build_model, log_probabilities, next_token_losses
from transformers import AutoModelForCausalLM

SIZES = {"vocabulary_size": 11, "layers": 2, "width": 16, "heads": 2, "context": 12}
TOKENS = torch.arange(24).view(2, 12) % 11


@pytest.mark.parametrize("architecture", NAMES)
def test_a_model_is_causal_without_dropout_and_loads_as_it_was_saved(architecture, tmp_path):
    model = build_model(architecture, **SIZES, end=3).train()
    changed = TOKENS.clone()
    changed[:, 6] = 5
    with torch.no_grad():
        before, after = model(TOKENS).logits, model(changed).logits
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(TOKENS).logits, before)  # by other products
        assert torch.equal(load_whole(tmp_path, "cpu")(TOKENS).logits, before)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before, after)
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], there) for name, there in model.state_dict().items())
    assert model.config.eos_token_id == 3
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight


@pytest.mark.parametrize("architecture", NAMES)
def test_the_width_of_the_mlp_is_the_one_that_is_asked_for(architecture):
    narrow, wide = (build_model(architecture, **SIZES, mlp_width=width) for width in (24, 40))
    per_unit = (wide.num_parameters() - narrow.num_parameters()) / (2 * 16)
    assert per_unit in (3 * 16, 2 * 16 + 1)  # three matrices, or two and a bias


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (build_model("llama", **SIZES, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_losses_are_those_of_transformers():
    model = build_model("gpt2", **SIZES).eval()
    losses = next_token_losses(model(TOKENS).logits, TOKENS)
    assert losses.mean().item() == pytest.approx(model(TOKENS, labels=TOKENS).loss.item(), rel=1e-5)
    said = log_probabilities(model, TOKENS, rows=1)[:, :-1]
    picked = said.gather(-1, TOKENS[:, 1:, None])[..., 0]
    assert torch.allclose(picked, -losses, atol=1e-5)


def test_sizes_that_transformers_would_round_are_refused():
    with pytest.raises(ValueError, match="width = 18: give a multiple of heads = 4"):
        build_model("olmo", **SIZES | {"width": 18, "heads": 4})


def test_models_built_in_threads_at_one_moment_are_those_built_alone():
    def weights(seed):
        return build_model("llama", **SIZES, seed=seed).state_dict()

    seeds = [0, 1] * 12
    alone = {seed: weights(seed) for seed in (0, 1)}
    with ThreadPoolExecutor(4) as pool:
        for seed, built in zip(seeds, pool.map(weights, seeds)):
            assert all(torch.equal(built[name], alone[seed][name]) for name in built)
