"""What weights alone say, against the definitions."""

import pytest
import torch
from latentree.inside.names import Internals
from latentree.inside.trace import run
from latentree.measure import circuits
from latentree.measure.circuits import copying, k_composition, path_patch
from latentree.train.model import build_model

torch.set_num_threads(1)


def test_copying_agrees_with_the_definition():
    model = build_model(
        "llama", 13, layers=2, width=16, heads=2, context=8, num_key_value_heads=1, seed=3
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += torch.rand(parameter.shape, generator=generator)
    tokens = torch.randint(13, (4, 8), generator=generator)
    block = model.model.layers[1]  # its second head
    v, o = block.self_attn.v_proj.weight, block.self_attn.o_proj.weight[:, 8:]
    with torch.no_grad():
        read = block.input_layernorm(model.model.embed_tokens.weight)
        logits = model.lm_head(model.model.norm(read @ v.T @ o.T))
    found = copying(model, tokens)[:, 3]
    for row, score in zip(tokens.tolist(), found.tolist(), strict=True):
        pairs = [(a, b) for a in set(row) for b in set(row) if a != b]
        raised = [bool(logits[a, a] > logits[a, b]) for a, b in pairs]
        assert score == pytest.approx(2 * sum(raised) / len(pairs) - 1, abs=1e-6)


def test_copying_over_a_large_vocabulary_goes_sequence_by_sequence(monkeypatch):
    model = build_model("olmo2", 13, layers=2, width=16, heads=2, context=8)
    tokens = torch.randint(13, (4, 8), generator=torch.Generator().manual_seed(0))
    together = copying(model, tokens)
    monkeypatch.setattr(circuits, "_MOST_TOKENS", 2)
    assert torch.allclose(copying(model, tokens), together)


@pytest.mark.parametrize("architecture", ["llama", "olmo2", "gpt_neox"])
def test_k_composition_of_random_weights_is_at_its_baseline(architecture):
    model = build_model(architecture, 13, layers=2, width=128, heads=4, context=8)
    found = k_composition(model, (1, 2))
    assert len(found) == 4 and (found["value"] / found["baseline"] - 1).abs().max() < 0.1
    with pytest.raises(ValueError, match=r"later = \(0, 1\)"):
        k_composition(model, (0, 1))


@torch.no_grad()
def test_k_composition_is_the_ratio_of_norms():
    model = build_model("olmo2", 13, layers=2, width=16, heads=2, context=8)
    first, second = (layer.self_attn for layer in model.model.layers)
    gain = model.model.layers[0].post_attention_layernorm.weight
    gain.data = torch.rand(16, generator=torch.Generator().manual_seed(0))
    ov = first.v_proj.weight[8:].T @ (gain[:, None] * first.o_proj.weight[:, 8:]).T
    keys = second.k_proj.weight[:8].T * second.k_norm.weight[:8]
    kq = keys @ (second.q_proj.weight[:8].T * second.q_norm.weight[:8]).T
    found = k_composition(model, (1, 0)).set_index("head")["value"][1]
    assert found == pytest.approx(float((ov @ kq).norm() / ov.norm() / kq.norm()), rel=1e-5)


# ---------------------------------------------------------------------- paths

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
