import pytest
import torch
from latentree.inside.names import NAMES, Internals, norm_gain, read_attention, weight
from latentree.train.model import build_model
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
SIZES = {"layers": 2, "width": 16, "heads": 2, "context": 12}
# Grouped queries, and OLMo's bound on values, are checked beside the plain architectures.
MODELS = [(name, {}) for name in NAMES] + [
    ("llama", {"num_key_value_heads": 1}),
    ("olmo", {"clip_qkv": 0.02}),
]


def random_model(architecture, **config):
    """A model whose biases, gains and weights are all random, so that none can be forgotten unseen."""
    model = build_model(architecture, 11, **SIZES, **config).eval()
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def caught(model, tokens, **modules):
    """Inputs and outputs of modules, by name, in one run."""
    seen = {}
    hooks = []
    for name, module in modules.items():

        def keep(module, given, out, name=name):
            seen[name] = (given[0] if given else None, out)

        hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("architecture, config", MODELS)
def test_heads_add_up_to_the_attention(architecture, config):
    model = random_model(architecture, **config)
    inside = Internals(model)
    tokens = torch.randint(11, (3, 12), generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        modules = {
            "o_proj": inside.o_proj(layer),
            "attention": inside.attention(layer),
            "values": inside.value_proj(layer),
        }
        seen = caught(model, tokens, **modules)
        z = seen["o_proj"][0].unflatten(-1, (inside.heads, inside.head_dim))
        added, pattern = seen["attention"][1]
        bias = getattr(inside.o_proj(layer), "bias", None)
        total = torch.einsum("bqhd,hdw->bqw", z, inside.w_o(layer)) + (0 if bias is None else bias)
        torch.testing.assert_close(total, added, atol=1e-5, rtol=0)
        # A head mixes its own values, and the values are what its matrix makes of the attention's input.
        read, projected = seen["values"]
        value = inside.values(projected)
        torch.testing.assert_close(
            torch.einsum("bhqk,bkhd->bqhd", pattern, value), z, atol=1e-5, rtol=0
        )
        if not config.get("clip_qkv"):
            shift = getattr(inside.value_proj(layer), "bias", None)
            shift = 0 if shift is None else inside.values(shift)
            mixed = torch.einsum("bkw,hwd->bkhd", read, inside.projections(layer)[2]) + shift
            torch.testing.assert_close(mixed, value, atol=1e-5, rtol=0)


def test_queries_and_keys_give_the_attention_scores():
    # GPT-2 has no rotary positions, so its pattern follows from the matrices alone.
    model = random_model("gpt2")
    for name, parameter in model.named_parameters():
        if "c_attn.bias" in name:
            parameter.data.zero_()
    inside = Internals(model)
    seen = caught(
        model,
        torch.arange(12).remainder(11)[None],
        values=inside.value_proj(0),
        attention=inside.attention(0),
    )
    w_q, w_k, _ = inside.projections(0)
    read = seen["values"][0]
    scores = torch.einsum("bqw,hwd,hvd,bkv->bhqk", read, w_q, w_k, read) / inside.head_dim**0.5
    pattern = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), float("-inf")).softmax(-1)
    torch.testing.assert_close(pattern, seen["attention"][1][1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", NAMES)
def test_norms_and_tables(architecture):
    model = random_model(architecture)
    inside = Internals(model)
    tokens = torch.arange(11)[None]
    seen = caught(
        model,
        tokens,
        block=inside.blocks[0],
        attention=inside.attention(0),
        norm=inside.final_norm,
        mlp=inside.mlp(0),
        embedding=inside.embedding,
        unembedding=inside.unembedding,
    )
    assert torch.equal(seen["embedding"][1], inside.embedding.weight[tokens])
    stream, normed = seen["norm"]
    bias = getattr(inside.final_norm, "bias", None)
    ratio = (normed if bias is None else normed - bias) / norm_gain(inside.final_norm, stream)
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        normed @ weight(inside.unembedding).T, seen["unembedding"][1], atol=1e-5, rtol=0
    )
    assert (
        (inside.input_norm(0) is None)
        == (inside.output_norm(0) is not None)
        == (architecture == "olmo2")
    )
    assert inside.blocks[0] is not inside.blocks[1] and seen["mlp"][1].shape == (1, 11, 16)


def test_other_models_are_refused_by_name():
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 11}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mistral", intermediate_size=16, **sizes)
    )
    with pytest.raises(ValueError, match="'mistral'.* use one of llama"):
        Internals(model)
    model = random_model("llama")
    model.model.layers[1].self_attn.o_proj = torch.nn.Linear(15, 16)
    with pytest.raises(ValueError, match="o_proj of layer 1: reads 15 .* 2 heads of 8"):
        Internals(model)
    assert Internals(random_model("llama", num_key_value_heads=1)).kv_heads == 1


@pytest.mark.parametrize("architecture", ["llama", "olmo", "olmo2", "gpt_neox", "gpt2"])
def test_attention_is_read_layer_by_layer_and_is_that_of_transformers(architecture):
    model = build_model(architecture, 12, 3, 16, 2, 16).eval()
    tokens = torch.randint(12, (2, 9))
    found, logits = read_attention(model, tokens, lambda attention: attention.clone())
    assert model.config._attn_implementation == "sdpa"  # as it was before
    model.set_attn_implementation("eager")
    whole = model(input_ids=tokens, output_attentions=True)
    assert len(found) == 3 and all(torch.allclose(a, b) for a, b in zip(found, whole.attentions))
    assert torch.allclose(logits, whole.logits, atol=1e-6)
    assert torch.allclose(model(input_ids=tokens).logits, logits, atol=1e-6)  # the hooks are gone
