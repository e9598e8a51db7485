"""Paths into a head, against what its whole layer reads."""

from itertools import product

import pytest
import torch
from latentree.inside.names import Internals
from latentree.inside.trace import run
from latentree.measure.circuits import path_patch, paths_into
from latentree.train.model import build_model

torch.set_num_threads(1)


TOKENS = torch.randint(13, (4, 8), generator=torch.Generator().manual_seed(1))
SENDERS = [("embedding",), ("head", 0, 0), ("mlp", 0)]


@pytest.mark.parametrize("sender", SENDERS)
@pytest.mark.parametrize("architecture", ["llama", "olmo2"])
def test_all_paths_into_the_only_head_are_what_its_layer_reads(architecture, sender):
    model = build_model(architecture, 13, layers=2, width=16, heads=1, context=8).eval()
    clean = run(model, TOKENS, ["stream", "z", "mlp"])
    written = {"embedding": clean["stream"][0], "mlp": clean["mlp"][0]}
    written["head"] = Internals(model).head_written(0, clean["z"][0])[..., 0, :]
    mean = written[sender[0]].mean((0, 1))

    def without(stream):
        return stream - written[sender[0]] + mean

    whole = run(model, TOKENS, ["attention"], {("stream", 1): without})
    change = {}
    for point in "qkv":
        change |= path_patch(model, TOKENS, sender, (1, 0), point)
    paths = run(model, TOKENS, ["attention", "stream"], change)
    torch.testing.assert_close(paths["attention"][1], whole["attention"][1], atol=1e-5, rtol=0)
    assert torch.equal(paths["stream"][1], clean["stream"][1])  # the stream itself stays


def test_paths_are_those_of_every_earlier_part_into_each_of_queries_keys_and_values():
    """By plain hooks on a llama: one head's slice of a projection of a stream less one part."""
    config = {"layers": 3, "width": 16, "heads": 2, "context": 8, "initializer_range": 0.3}
    model = build_model("llama", 13, **config).eval()
    blocks, seen = model.model.layers, {}
    first = blocks[0].register_forward_pre_hook(lambda _, given: seen.update(embedding=given[0]))
    hooks = [first]
    for number, block in enumerate(blocks[:2]):

        def keep_heads(_, given, number=number):
            for head in range(2):
                own = slice(8 * head, 8 * head + 8)
                weight = blocks[number].self_attn.o_proj.weight[:, own]
                seen[f"head {number} {head}"] = given[0][..., own] @ weight.T

        def keep_mlp(_, given, out, number=number):
            seen[f"mlp {number}"] = out

        hooks.append(block.self_attn.o_proj.register_forward_pre_hook(keep_heads))
        hooks.append(block.mlp.register_forward_hook(keep_mlp))

    def scores(logits):
        return {
            "loss": float(-logits.log_softmax(-1)[..., 3].mean()),
            "one": float(logits[0, 5, 2]),
        }

    with torch.no_grad():
        clean = scores(model(input_ids=TOKENS).logits)
        for hook in hooks:
            hook.remove()
        whole, expected = sum(seen.values()), {}
        for (part, written), point in product(seen.items(), "qkv"):
            read = blocks[2].input_layernorm(whole - written + written.mean((0, 1)))
            projection = getattr(blocks[2].self_attn, f"{point}_proj")
            new = read @ projection.weight[8:].T  # of head 1

            def swap(_, given, out, new=new):
                return torch.cat([out[..., :8], new], -1)

            hook = projection.register_forward_hook(swap)
            for name, value in scores(model(input_ids=TOKENS).logits).items():
                expected[part, point, name] = value - clean[name]
            hook.remove()
    found = paths_into(model, TOKENS, (2, 1), scores).set_index(["part", "into", "score"]).rise
    assert len(found) == 7 * 3 * 2 and found.to_dict() == pytest.approx(expected, abs=1e-5)
    assert found.abs().groupby("part").max().min() > 1e-3  # no path of a part is silent throughout


def test_a_sender_that_writes_nothing_changes_nothing():
    model = build_model("llama", 13, layers=2, width=16, heads=2, context=8).eval()
    model.model.layers[0].self_attn.o_proj.weight.data[:, :8] = 0  # head 0
    clean = run(model, TOKENS, ["logits"])["logits"]
    for point in "qkv":
        silent = path_patch(model, TOKENS, ("head", 0, 0), (1, 1), point)
        torch.testing.assert_close(run(model, TOKENS, ["logits"], silent)["logits"], clean)
        heard = path_patch(model, TOKENS, ("head", 0, 1), (1, 1), point)
        assert not torch.allclose(run(model, TOKENS, ["logits"], heard)["logits"], clean)


def test_a_sender_comes_before_its_receiver_and_points_lie_apart():
    model = build_model("llama", 13, layers=2, width=16, heads=2, context=8)
    with pytest.raises(ValueError, match="does not come before"):
        path_patch(model, TOKENS, ("head", 1, 0), (1, 1), "k")
    fused = build_model("gpt2", 13, layers=2, width=16, heads=2, context=8)
    with pytest.raises(ValueError, match="'k'.* is no point of a run"):
        run(fused, TOKENS, ["k"])
