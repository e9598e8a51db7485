import pytest
import torch
from latentree.train.model import ARCHITECTURES, build_model, parameter_count
from latentree.train.optimizers import hidden_matrices
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
SIZES = {"vocabulary_size": 11, "layers": 2, "width": 16, "heads": 2, "context": 12}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_builds_saves_loads_with_equal_logits(architecture, tmp_path):
    model = build_model(architecture, **SIZES, end=3).eval()
    tokens = torch.arange(24).view(2, 12) % 11
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert model.config.model_type == architecture and model.config._attn_implementation == "sdpa"
    assert model.config.eos_token_id == 3 and model.config.pad_token_id is None
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_is_causal_and_without_dropout(architecture):
    model = build_model(architecture, **SIZES).train()
    tokens = torch.zeros(1, 12, dtype=torch.long)
    changed = tokens.clone()
    changed[0, 6] = 5
    with torch.no_grad():
        before, after = model(tokens).logits, model(changed).logits
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6:], after[:, 6:])


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (build_model("llama", **SIZES, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_parameter_count():
    model = build_model("llama", **SIZES, mlp_width=32)
    hidden = 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16
    assert parameter_count(model) == hidden + 2 * 11 * 16
    assert parameter_count(model, embeddings=False) == hidden


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_matrices_are_those_of_the_layers(architecture):
    model = build_model(architecture, **SIZES)
    found = {id(p) for p in hidden_matrices(model)}
    names = {name for name, p in model.named_parameters() if id(p) in found}
    assert names == {
        n for n, p in model.named_parameters() if p.ndim == 2 and (".layers." in n or ".h." in n)
    }
    assert len(names) == 2 * {"gpt2": 4, "gpt_neox": 4}.get(architecture, 7)


@pytest.mark.parametrize(
    "change, thing",
    [
        ({"architecture": "lama"}, "architecture: 'lama'"),
        ({"width": 15}, "width: 15"),
        ({"width": 6}, "width: 6"),
        ({"architecture": "gpt_neox", "heads": 4}, "width: 16"),
        ({"layers": 0}, "layers: 0"),
        ({"mlp_width": 0}, "mlp_width: 0"),
        ({"end": 11}, "end: 11"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, thing):
    with pytest.raises(ValueError) as error:
        build_model(**{"architecture": "llama"} | SIZES | change)
    assert str(error.value).startswith(thing) and "\n" not in str(error.value)
    assert "give" in str(error.value) or "choose" in str(error.value)
