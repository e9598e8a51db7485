"""Ablation against plain torch hooks, and the choice of heads to compare with."""

import pytest
import torch
from latentree.inside.attention import patterns
from latentree.inside.names import Internals
from latentree.inside.trace import run
from latentree.measure.ablation import _another, ablated_losses, control_heads, each_head
from latentree.train.model import next_token_losses
from test_inside import close, random_model

TOKENS = torch.randint(11, (5, 12), generator=torch.Generator().manual_seed(0))
# The module in whose output the values stand, and how to take them out.
VALUES = {
    "llama": ("self_attn.v_proj", lambda out: out.unflatten(-1, (2, 8))),
    "gpt2": ("attn.c_attn", lambda out: out[..., 32:].unflatten(-1, (2, 8))),
    "gpt_neox": ("attention.query_key_value", lambda out: out.unflatten(-1, (2, 24))[..., 16:]),
}


def hooked_losses(model, replacements, attended=None):
    """Losses with z of (layer, head) replaced, by hooks; `attended` is forced on all layers."""
    inside, hooks, values = Internals(model), [], {}
    name, taken = VALUES[model.config.model_type]
    for layer in range(inside.layers):

        def keep(module, given, out, layer=layer):
            values[layer] = taken(out)

        def replace(module, given, layer=layer):
            z = given[0].clone().unflatten(-1, (2, 8))
            if attended is not None:
                z = (attended[layer] @ values[layer].transpose(1, 2)).transpose(1, 2).clone()
            for (at, head), replacement in replacements.items():
                if at == layer:
                    z[:, :, head] = replacement
            return (z.flatten(-2),)

        module = inside.blocks[layer].get_submodule(name)
        hooks.append(module.register_forward_hook(keep))
        hooks.append(inside.o_proj(layer).register_forward_pre_hook(replace))
    with torch.no_grad():
        losses = next_token_losses(model(input_ids=TOKENS).logits, TOKENS)
    for hook in hooks:
        hook.remove()
    return losses


@pytest.mark.parametrize("architecture", VALUES)
def test_ablations_agree_with_plain_hooks(architecture):
    model, heads, means, others = random_model(architecture), [(0, 1), (1, 0)], {}, {}
    z = run(model, TOKENS, read=["z"])["z"]
    for layer, head in heads:
        means[layer, head] = z[layer, :, :, head].mean((0, 1))
        others[layer, head] = z[layer, _another(5, 3), :, head]
    expected = {
        "mean": hooked_losses(model, means),
        "resample": hooked_losses(model, others),
        "pattern": hooked_losses(model, means, patterns(model, TOKENS)),
    }
    for how, losses in expected.items():
        close(ablated_losses(model, TOKENS, heads, how, seed=3, rows=2), losses)
    assert (expected["mean"] - expected["pattern"]).abs().max() > 1e-4
    assert (expected["mean"] - expected["resample"]).abs().max() > 1e-4


def test_each_head_is_switched_off_alone_and_its_rise_is_counted_where_asked():
    """Against hooks, one head after the other; the mean is of the predictions that are marked."""
    model, clean = random_model("llama"), hooked_losses(random_model("llama"), {})
    z = run(model, TOKENS, read=["z"])["z"]
    odd = torch.arange(11) % 2 == 1
    where = {"odd": odd.expand(5, -1), "first rows": (torch.arange(5) < 2)[:, None].expand(-1, 11)}
    found = each_head(model, TOKENS, where).set_index(["layer", "head", "where"])
    assert len(found) == 2 * 2 * 2
    for layer, head in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        mean = z[layer, :, :, head].mean((0, 1))
        rise = hooked_losses(model, {(layer, head): mean}) - clean
        expected = {"odd": rise[:, 1::2].mean(), "first rows": rise[:2].mean()}
        for name, value in expected.items():
            row = found.loc[(layer, head, name)]
            assert row.value == pytest.approx(float(value), abs=1e-5)
            assert row.low < row.value < row.high
    assert found.value.std() > 1e-3  # heads differ


def test_nothing_changes_without_heads_or_between_equal_sequences():
    model = random_model("llama")
    clean = next_token_losses(model(input_ids=TOKENS).logits, TOKENS)
    for how in ("mean", "resample", "pattern"):
        close(ablated_losses(model, TOKENS, [], how), clean)
    same = TOKENS[:1].expand(4, -1)
    close(ablated_losses(model, same, [(0, 0), (1, 1)], "resample"), clean[:1].expand(4, -1))


def test_every_sequence_gets_another():
    for count in range(2, 9):
        donor = _another(count, seed=count)
        assert sorted(donor.tolist()) == list(range(count))
        assert not (donor == torch.arange(count)).any()
    assert torch.equal(_another(50, 1), _another(50, 1))
    assert not torch.equal(_another(50, 1), _another(50, 2))


def test_control_heads_are_others_of_the_same_layers():
    chosen = [(3, 2), (1, 0), (3, 0)]
    drawn = {tuple(control_heads(chosen, 4, seed)) for seed in range(20)}
    assert drawn == {((1, head), (3, 1), (3, 3)) for head in (1, 2, 3)}
    with pytest.raises(ValueError, match="3 of the 4 heads of layer 0; choose at most half"):
        control_heads([(0, 0), (0, 1), (0, 2)], 4)


def test_bad_input_is_named():
    model = random_model("llama")
    with pytest.raises(ValueError, match="how = 'zero'.* mean, resample, pattern"):
        ablated_losses(model, TOKENS, [(0, 0)], "zero")
    with pytest.raises(ValueError, match="1 sequence"):
        ablated_losses(model, TOKENS[:1], [(0, 0)], "resample")
