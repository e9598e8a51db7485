import pytest
import torch
from latentree.inside.names import Internals
from latentree.inside.trace import (
    ablated_losses,
    another,
    attention_patterns,
    head_outputs,
    replaced_logits,
)
from latentree.train.model import next_token_losses
from test_internals import MODELS, random_model

TOKENS = torch.randint(11, (5, 12), generator=torch.Generator().manual_seed(0))


def hooked_losses(model, tokens, replacements, patterns=None):
    """What `ablated_losses` should give, by plain torch hooks; `patterns` are forced on all layers."""
    inside, hooks, values = Internals(model), [], {}
    for layer in range(inside.layers):

        def keep(module, given, out, layer=layer):
            values[layer] = inside.values(out)

        def replace(module, given, layer=layer):
            z = given[0].clone().view(*given[0].shape[:2], inside.heads, inside.head_dim)
            if patterns is not None:
                z = (patterns[layer] @ values[layer].transpose(1, 2)).transpose(1, 2).clone()
            for (where, head), replacement in replacements.items():
                if where == layer:
                    z[:, :, head, :] = replacement
            return (z.reshape(given[0].shape),)

        hooks.append(inside.value_proj(layer).register_forward_hook(keep))
        hooks.append(inside.o_proj(layer).register_forward_pre_hook(replace))
    with torch.no_grad():
        losses = next_token_losses(model(input_ids=tokens).logits, tokens)
    for hook in hooks:
        hook.remove()
    return losses


@pytest.mark.parametrize("architecture, config", MODELS)
def test_ablations_agree_with_plain_hooks(architecture, config):
    model = random_model(architecture, **config)
    heads = [(0, 1), (1, 0)]
    z, patterns = head_outputs(model, TOKENS), attention_patterns(model, TOKENS)
    assert z.shape == (2, 5, 12, 2, 8) and patterns.shape == (2, 5, 2, 12, 12)
    means = {(layer, head): z[layer, :, :, head].mean((0, 1)) for layer, head in heads}
    donor = another(5, 3)
    others = {(layer, head): z[layer, donor, :, head] for layer, head in heads}
    expected = {
        "mean": hooked_losses(model, TOKENS, means),
        "resample": hooked_losses(model, TOKENS, others),
        "pattern": hooked_losses(model, TOKENS, means, patterns),
    }
    for how, losses in expected.items():
        found = ablated_losses(model, TOKENS, heads, how, seed=3, rows=2)
        torch.testing.assert_close(found, losses, atol=1e-5, rtol=0)
    if not config.get("clip_qkv"):  # which leaves the heads too small a voice
        assert (expected["mean"] - expected["pattern"]).abs().max() > 1e-4
        assert (expected["mean"] - expected["resample"]).abs().max() > 1e-4


def test_what_changes_nothing():
    model = random_model("llama")
    with torch.no_grad():
        clean, logits = (
            next_token_losses(model(input_ids=TOKENS).logits, TOKENS),
            model(input_ids=TOKENS).logits,
        )
    for how in ("mean", "resample", "pattern"):
        torch.testing.assert_close(ablated_losses(model, TOKENS, [], how), clean, atol=1e-6, rtol=0)
    z, patterns = head_outputs(model, TOKENS), attention_patterns(model, TOKENS)
    own = {(layer, head): z[layer, :, :, head] for layer in range(2) for head in range(2)}
    torch.testing.assert_close(replaced_logits(model, TOKENS, own), logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        replaced_logits(model, TOKENS, {(0, 0): own[0, 0]}, patterns), logits, atol=1e-5, rtol=0
    )


def test_means_are_over_the_reference():
    model = random_model("gpt2")
    reference = TOKENS[:2, :6].flip(1)
    mean = head_outputs(model, reference)[1, :, :, 1].mean((0, 1))
    found = ablated_losses(model, TOKENS, [(1, 1)], "mean", reference)
    torch.testing.assert_close(
        found, hooked_losses(model, TOKENS, {(1, 1): mean}), atol=1e-5, rtol=0
    )


def test_every_sequence_gets_another():
    for count in range(2, 9):
        donor = another(count, seed=count)
        assert (
            sorted(donor.tolist()) == list(range(count))
            and not (donor == torch.arange(count)).any()
        )
    assert torch.equal(another(50, 1), another(50, 1)) and not torch.equal(
        another(50, 1), another(50, 2)
    )


def test_bad_input_is_named():
    model = random_model("llama")
    with pytest.raises(ValueError, match="how = 'zero'.* mean, resample, pattern"):
        ablated_losses(model, TOKENS, [(0, 0)], "zero")
    with pytest.raises(ValueError, match=r"head \(2, 0\).* layers below 2"):
        ablated_losses(model, TOKENS, [(2, 0)], "mean")
    with pytest.raises(ValueError, match="1 sequence"):
        ablated_losses(model, TOKENS[:1], [(0, 0)], "resample")
