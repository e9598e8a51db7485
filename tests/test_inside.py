"""Names, trace and attention: identities that hold for every architecture."""

import pytest
import torch
from latentree.inside.attention import attention, patterns
from latentree.inside.names import NAMES, Internals, norm_gain, norm_scale
from latentree.inside.trace import run
from latentree.train.model import build_model
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
TOKENS = torch.randint(11, (3, 12), generator=torch.Generator().manual_seed(0))
# Grouped queries and windows are checked beside the plain architectures.
MODELS = [*((name, {}) for name in NAMES)]
MODELS += [(name, {"num_key_value_heads": 1}) for name in ("llama", "phi3", "qwen3")]
MODELS += [(name, {"sliding_window": 4}) for name in ("mistral", "olmo3")]


def random_model(architecture, **config):
    """A model whose biases, gains and weights are all random, so that none can be forgotten unseen."""
    model = build_model(architecture, 11, layers=2, width=16, heads=2, context=12, **config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture, config", MODELS)
def test_what_is_written_adds_up_to_the_stream_and_the_logits(architecture, config):
    model = random_model(architecture, **config)
    inside = Internals(model)
    points = ("stream", "z", "attention", "mlp", "normed", "logits")
    found = run(model, TOKENS, read=points)
    added = found["attention"] + found["mlp"]
    close(found["stream"][1:], found["stream"][:-1] + added)
    for layer in range(2):
        heads = inside.head_written(layer, found["z"][layer]).sum(-2)
        bias = getattr(inside.o_proj(layer), "bias", None)
        close(heads + (0 if bias is None else bias), found["attention"][layer])
    norm = inside.final_norm
    last = found["stream"][-1]
    bias = getattr(norm, "bias", None)
    close(
        norm_gain(norm, last) * norm_scale(norm, last) + (0 if bias is None else bias),
        found["normed"],
    )
    close(inside.unembedding(found["normed"]), found["logits"])
    close(found["logits"], model(input_ids=TOKENS).logits)


def test_scores_can_be_weighed_otherwise():
    """As a softmax of doubled scores does: that of a model whose queries are doubled."""
    model, other = random_model("llama"), random_model("llama")
    for block in other.model.layers:
        block.self_attn.q_proj.weight.data *= 2
    with attention(model, lambda *_: None, weigh=lambda scores: (2 * scores).softmax(-1)):
        close(model(input_ids=TOKENS).logits, other(input_ids=TOKENS).logits)


@pytest.mark.parametrize("architecture, config", MODELS)
def test_attention_is_that_of_transformers_and_can_be_replaced(architecture, config):
    model = random_model(architecture, **config)
    own = patterns(model, TOKENS)
    assert model.config._attn_implementation == "sdpa"  # as it was before
    model.set_attn_implementation("eager")
    whole = model(input_ids=TOKENS, output_attentions=True)
    close(own, torch.stack(whole.attentions))
    model.set_attn_implementation("sdpa")
    with attention(model, lambda layer, probabilities: own[layer]):
        close(model(input_ids=TOKENS).logits, whole.logits)  # replaced by itself
    nowhere = torch.zeros_like(own[0])
    with attention(model, lambda layer, probabilities: nowhere):
        assert run(model, TOKENS, read=("z",))["z"].abs().max() == 0


@pytest.mark.parametrize("point", ["stream", "z", "attention", "mlp"])
@pytest.mark.parametrize("architecture", ["llama", "olmo2", "gpt_neox"])
def test_a_change_is_what_is_read_and_what_follows(architecture, point):
    model = random_model(architecture)
    clean = run(model, TOKENS, read=(point, "stream", "logits"))
    same = run(model, TOKENS, read=("logits",), change={(point, 1): lambda written: written})
    assert torch.equal(same["logits"], clean["logits"])
    changed = run(model, TOKENS, read=(point, "stream"), change={(point, 1): torch.zeros_like})
    assert changed[point][1].abs().max() == 0
    assert torch.equal(changed[point][0], clean[point][0])
    assert not torch.allclose(changed["stream"][2], clean["stream"][2])


def test_adding_to_the_last_stream_moves_the_logits_by_norm_and_unembedding():
    model = random_model("llama")
    inside = Internals(model)
    vector = torch.linspace(-1, 1, 16)
    moved = run(
        model, TOKENS, read=("logits",), change={("stream", 2): lambda stream: stream + vector}
    )
    last = run(model, TOKENS, read=("stream",))["stream"][2]
    close(moved["logits"], inside.unembedding(inside.final_norm(last + vector)))


def test_a_run_goes_on_from_its_cache():
    model = random_model("llama")
    whole = run(model, TOKENS, read=("logits",))["logits"]
    cache = run(model, TOKENS[:, :-1], read=("cache",))["cache"]
    step = run(model, TOKENS[:, -1:], read=("logits",), past_key_values=cache, use_cache=True)
    close(step["logits"], whole[:, -1:])


def test_unknown_points_layers_and_architectures_are_refused():
    model = random_model("llama")
    with pytest.raises(ValueError, match="read = 'attn'"):
        run(model, TOKENS, read=("attn",))
    with pytest.raises(ValueError, match=r"change = \('mlp', 2\).*0 to 1"):
        run(model, TOKENS, change={("mlp", 2): torch.zeros_like})
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 11}
    config = AutoConfig.for_model("bloom", **sizes)
    with pytest.raises(ValueError, match="'bloom'.*add a line to NAMES"):
        Internals(AutoModelForCausalLM.from_config(config))
    model.model.layers[0].self_attn.o_proj = torch.nn.Linear(15, 16)
    with pytest.raises(ValueError, match="o_proj: reads 15 .* 2 heads of 8"):
        Internals(model)
