"""Tests of the theorem and its assumptions, on models for which the answer is known."""

import numpy as np
import pytest
import torch
from latentree.internals import Internals
from latentree.interventions import heads_and_logits
from latentree.model import build_model
from latentree.sampler import HELD_OUT
from latentree.theory import curvature, distance_effects, floors, gradient_cosines, other_latent, reuse, specialisation, transparency
from latentree.two_level import TwoLevel, predictive

torch.set_num_threads(1)
PROCESS = TwoLevel(seed=0, segments=4)


@pytest.fixture(scope="module")
def shown():
    documents = PROCESS.documents(HELD_OUT + torch.arange(60))
    return documents.tokens.view(60, -1), documents.token["z0"].view(60, -1)[:, 0]


def model_with(layers=2, mlp=False, seed=0):
    """A model whose MLPs write nothing, unless they shall."""
    model = build_model("llama", PROCESS.vocabulary_size, layers, 16, 2, 32, seed=seed).eval()
    for block in model.model.layers:
        block.mlp.down_proj.weight.data *= float(mlp)
        block.self_attn.o_proj.weight.data *= 20
    return model


def test_floors_are_the_exact_losses_and_a_uniform_model_lies_above(shown):
    model, (tokens, _) = model_with(), shown
    model.lm_head.weight.data.zero_()
    table = floors(model, PROCESS, tokens)
    assert np.allclose(table["value"], np.log(65)) and len(table) == 31
    exact = -predictive(PROCESS, tokens).gather(-1, tokens[..., None])[..., 0].mean(0)
    assert np.allclose(table["exact"], exact[1:]) and (table["exact"] < table["value"]).all()
    assert (table[table["place"] == 6]["exact"] == 0).all()  # the cue is certain
    assert table["segment"].tolist() == [position // 8 for position in range(1, 32)]


def test_the_exact_effect_does_not_depend_on_distance_and_a_blind_model_has_none(shown):
    model, (tokens, z0) = model_with(), shown
    model.lm_head.weight.data.zero_()
    table = distance_effects(model, PROCESS, tokens, z0, [1, 2, 3])
    assert np.allclose(table[["effect", "share"]], 0) and (table["exact"] > 0).all()  # test_two_level: alike at any distance


def test_a_patch_after_the_last_layer_is_not_read(shown):
    tokens, z0 = shown
    assert (z0[other_latent(z0)] != z0).all()
    table = reuse(model_with(mlp=True), PROCESS, tokens, z0).set_index("layer")
    assert table["value"][1] == table["value"][-1] and list(table.index) == [-1, 0, 1]


def test_a_patch_of_what_a_head_copies_is_followed(shown):
    """One head sums what stands before, of which only the blocks of tokens are kept: the prediction follows the patch."""
    tokens, z0 = shown
    model = model_with(layers=2)
    blocks = torch.arange(64) // 16
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[torch.arange(64), blocks] = 1.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[torch.arange(64), 8 + blocks] = 1.0
        for number, block in enumerate(model.model.layers):
            attention = block.self_attn
            attention.k_proj.weight.zero_()  # attends evenly
            attention.v_proj.weight.zero_()
            attention.o_proj.weight.zero_()
            if number == 1:
                attention.v_proj.weight[torch.arange(4), torch.arange(4)] = 1.0
                attention.o_proj.weight[8 + torch.arange(4), torch.arange(4)] = 100.0
    table = reuse(model, PROCESS, tokens, z0).set_index("layer")
    assert table["mass"][0] > table["mass"][-1] + 0.01 and table["mass"][1] == table["mass"][-1]
    told = specialisation(model, PROCESS, tokens, z0).set_index(["layer", "head"])
    assert told["earlier"][1, 0] > told["current"][1, 0] > 0


def test_where_nothing_comes_after_all_of_a_contribution_reaches_the_end(shown):
    tokens = shown[0][:4]
    table = transparency(model_with(layers=1), tokens)
    assert np.allclose(table[["rank", "least"]], 1, atol=1e-3)
    deeper = transparency(model_with(mlp=True), tokens)
    assert len(deeper) == 4 and deeper["rank"].between(0, 1.001).all()


def test_gradients_within_equal_spaces_agree_and_within_orthogonal_ones_do_not(shown):
    tokens, model = shown[0][:8], model_with(layers=1)
    weight = model.model.layers[0].self_attn.o_proj.weight  # (width, heads * head_dim)
    with torch.no_grad():
        weight[:, 8:] = weight[:, :8]
    cosines = gradient_cosines(model, tokens)
    assert cosines.shape == (2, 2) and torch.allclose(cosines, torch.ones(2, 2).double(), atol=1e-4)
    with torch.no_grad():
        weight[:, :8], weight[:, 8:] = torch.eye(16)[:, :8], torch.eye(16)[:, 8:]
    cosines = gradient_cosines(model, tokens)
    assert abs(cosines[0, 1]) < 1e-5 and cosines[1, 1] == pytest.approx(1)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_curvature_is_that_of_the_final_norm_where_nothing_else_comes(shown):
    tokens, z0 = (x[:10] for x in shown)
    model = model_with(layers=1)
    found = curvature(model, PROCESS, tokens, z0, 0, 1)
    with torch.no_grad():
        inside, stream = Internals(model), []
        model.model.norm.register_forward_pre_hook(lambda module, inputs: stream.append(inputs[0][:, -2].clone()))
        model(input_ids=tokens)
        own = inside.head_written(0, heads_and_logits(model, tokens)[0][0][:, -2])[:, 1]
        u = own[other_latent(z0)] - own

        def target(step):
            logits = model.lm_head(model.model.norm(stream[0] + step * u))
            return (logits[torch.arange(10), tokens[:, -1]] - logits.mean(-1)).double()

        assert torch.allclose(found, target(1.0) - 2 * target(0.0) + target(-1.0), atol=1e-4)
    random = curvature(model, PROCESS, tokens, z0, 0, 1, random=True)
    assert random.shape == (10,) and not torch.allclose(random, found)
