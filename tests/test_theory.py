"""Tests of the theorem and its assumptions, on models for which the answer is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from circuit_models import CONTEXT, VOCABULARY, duplicate_model, induction_model, repair_model
from latentree.data.corpus import HELD_OUT
from latentree.data.two_level import MATCHED_FLAT, TwoLevel, contested, predictive
from latentree.evidence.intervals import t_interval
from latentree.inside.names import Internals
from latentree.inside.trace import heads_and_logits
from latentree.measure.function_vectors import of_next_latent
from latentree.measure.hydra import Ablations, Response
from latentree.measure.prompts import Prompts
from latentree.measure.released import as_released
from latentree.measure.stimuli import Stimulus, stimuli
from latentree.measure.theory import (
    block_masses,
    curvature,
    distance_effects,
    floors,
    gradient_cosines,
    last_query,
    mechanisms,
    other_latent,
    reuse,
    scored,
    specialisation,
    strongest_repair,
    transparency,
    vector_prompts,
    window_excess,
)
from latentree.train.model import build_model
from test_hydra import repair_stimulus

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


def blind_model():
    """It gives all tokens the same probability, whatever it reads."""
    model = model_with()
    model.lm_head.weight.data.zero_()
    return model


def summing_model(layer):
    """One head of a layer sums evenly what stands before, of which only the blocks of tokens are kept, and predicts by it."""
    model, blocks = model_with(layers=2), torch.arange(64) // 16
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
            if number == layer:
                attention.v_proj.weight[torch.arange(4), torch.arange(4)] = 1.0
                attention.o_proj.weight[8 + torch.arange(4), torch.arange(4)] = 100.0
    return model


PLACES, SCALE = torch.arange(32), 8.0
EVEN, FADING = torch.zeros(32), 0.05 * PLACES
QUERIES, EVIDENCE = (torch.where(kept, 0.0, -200.0) for kept in (PLACES % 8 == 7, PLACES % 8 < 6))


def reader(favour=EVEN, layer=0):
    """A GPT-2 without norms whose logits are `read`'s: a head of a layer weighs what it sees by softmax of favour (position,)."""
    model, blocks = (
        build_model("gpt2", PROCESS.vocabulary_size, 2, 12, 1, 32, mlp_width=4).eval(),
        torch.arange(64) // 16,
    )
    for parameter in model.parameters():
        parameter.data.zero_()
    stack = model.transformer
    stack.wte.weight.data[torch.arange(64), blocks] = 1.0
    stack.wpe.weight.data[:, 4] = favour
    attention = stack.h[layer].attn
    attention.c_attn.bias.data[0] = 12**0.5
    attention.c_attn.weight.data[4, 12] = 1.0
    attention.c_attn.weight.data[torch.arange(4), 24 + torch.arange(4)] = 1.0
    attention.c_proj.weight.data[torch.arange(4), 8 + torch.arange(4)] = SCALE
    model.lm_head.weight.data[torch.arange(64), 8 + blocks] = 1.0
    for block in stack.h:
        block.ln_1 = torch.nn.Identity()
    stack.ln_f = torch.nn.Identity()
    return model


def read(tokens, favour=EVEN, seen=None):
    """What a reader predicts for the last of tokens, log probabilities (sequence, vocabulary): SCALE times each block's weight."""
    before = tokens[:, :-1]
    weights = favour.double()[: before.shape[1]].expand(before.shape)
    weights = (weights if seen is None else weights.masked_fill(~seen[:, :-1], -torch.inf)).softmax(
        1
    )
    share = torch.stack([(weights * (before // 16 == block)).sum(1) for block in range(4)], 1)
    return torch.nn.functional.pad(SCALE * share.repeat_interleave(16, 1), (0, 1)).log_softmax(-1)


def test_floors_are_the_exact_losses_and_a_uniform_model_lies_above(shown):
    tokens = shown[0]
    table = floors(blind_model(), PROCESS, tokens)
    assert np.allclose(table["value"], np.log(65)) and len(table) == 31
    exact = -predictive(PROCESS, tokens).gather(-1, tokens[..., None])[..., 0].mean(0)
    assert np.allclose(table["exact"], exact[1:]) and (table["exact"] < table["value"]).all()
    assert (table[table["place"] == 6]["exact"] == 0).all()  # the cue is certain
    assert table["segment"].tolist() == [position // 8 for position in range(1, 32)]


def test_block_masses_are_what_is_left_by_the_cue():
    log_p = torch.randn(
        3, 5, 65, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).log_softmax(-1)
    masses = block_masses(PROCESS, log_p)
    assert masses.shape == (3, 5, 4) and torch.allclose(masses.sum(-1), 1 - log_p[..., 64].exp())
    assert torch.allclose(masses[..., 2], log_p[..., 32:48].exp().sum(-1))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_last_query_is_the_models_own_prediction_from_what_is_seen(architecture):
    model = build_model(architecture, 65, 2, 16, 2, 32, initializer_range=0.3).eval()
    tokens = torch.randint(
        64, (70, 32), generator=torch.Generator().manual_seed(0)
    )  # more than run at a time
    with torch.no_grad():
        own = model(input_ids=tokens).logits[:, -2].double().log_softmax(-1)
    found = last_query(model, tokens)
    assert found.dtype == torch.float64 and torch.allclose(found, own, atol=1e-5)
    seen = torch.ones_like(tokens, dtype=torch.bool)
    assert torch.allclose(last_query(model, tokens, seen), own, atol=1e-5)
    seen[:40, :12], seen[:, 20] = False, False
    found = last_query(model, tokens, seen)
    exchanged = torch.where(seen, tokens, (tokens + 7) % 64)
    assert torch.equal(last_query(model, exchanged, seen), found) and not found.isnan().any()
    for at in (5, 15, 30):
        exchanged = torch.where(PLACES == at, (tokens + 7) % 64, tokens)
        changed = (last_query(model, exchanged, seen) - found).abs().max(1).values
        assert (changed[seen[:, at]] > 1e-5).all() and not changed[~seen[:, at]].any()
    exchanged = torch.where(PLACES == 31, 0, tokens)  # what is predicted is not read
    assert torch.equal(last_query(model, exchanged, seen), found)


@pytest.mark.parametrize("favour", [EVEN, FADING, QUERIES])
def test_what_is_not_seen_is_left_out_and_the_rest_keeps_its_position(shown, favour):
    tokens = shown[0]
    seen = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    seen[:, 23] = True  # a query
    for given in (None, seen):
        assert torch.allclose(
            last_query(reader(favour), tokens, given), read(tokens, favour, given), atol=1e-4
        )


def test_the_excess_of_a_window_is_what_the_rest_would_have_told(shown):
    tokens, windows = shown[0], [1, 7, 15, 31, 32]
    table = window_excess(reader(), PROCESS, tokens, windows)
    assert table["window"].tolist() == windows and list(table) == [
        "window",
        "value",
        "low",
        "high",
        "exact",
    ]
    last, row = tokens[:, -1], torch.arange(len(tokens))
    for one in table.itertuples():
        seen = (PLACES >= 31 - one.window).expand(tokens.shape)
        own = (read(tokens) - read(tokens, EVEN, seen))[row, last]
        assert (one.value, one.low, one.high) == pytest.approx(t_interval(own), abs=1e-4)
        whole, less = predictive(PROCESS, tokens), predictive(PROCESS, tokens, seen)
        assert one.exact == pytest.approx(float((whole - less)[row, -1, last].mean()), abs=1e-12)
    assert not table[["value", "exact"]][-2:].to_numpy().any() and (table["exact"][:3] > 0.1).all()
    assert table["exact"].is_monotonic_decreasing
    blind = window_excess(blind_model(), PROCESS, tokens, windows)
    assert not blind[["value", "low", "high"]].to_numpy().any() and np.allclose(
        blind["exact"], table["exact"]
    )


def test_the_exact_effect_does_not_depend_on_distance_and_a_blind_model_has_none():
    table = distance_effects(blind_model(), PROCESS, [1, 2, 3])
    assert table["distance"].tolist() == [1, 2, 3] and np.allclose(
        table[["value", "low", "high", "share"]], 0
    )
    assert (table["exact"] > 1).all() and np.ptp(table["exact"]) < 1e-9
    flat = distance_effects(
        blind_model(), TwoLevel(MATCHED_FLAT, segments=4), [1, 3]
    )  # where nothing is shared, no share
    assert not flat["exact"].any() and flat["share"].isna().all()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_model_that_sums_evenly_is_moved_alike_at_all_distances(layer):
    table = distance_effects(summing_model(layer), PROCESS, [1, 2, 3], 30, seed=2)
    assert (table["share"] > 0.1).all() and np.ptp(table["share"]) < 1e-3 * table["share"].min()
    assert np.allclose(table["share"], table["value"] / table["exact"])


def test_a_model_that_reads_what_is_near_is_moved_less_from_afar():
    """The effect is known: of the deciding segment's tokens, how many more are of the own side's block, by their weights."""
    table = distance_effects(reader(FADING), PROCESS, [1, 2, 3], 30, seed=2).set_index("distance")
    tokens, sides = contested(PROCESS, 30, [1, 2, 3], seed=2)
    weights = FADING[:31].double().softmax(0)
    for number, distance in enumerate((1, 2, 3)):
        towards = [
            ((tokens[number, :, :, :31] // 16 == side[:, None]) * weights).sum(-1) for side in sides
        ]
        effect = SCALE * (towards[1] - towards[0]).diff(dim=0)[0] / 2
        assert table.loc[distance, ["value", "low", "high"]].tolist() == pytest.approx(
            t_interval(effect), abs=1e-4
        )
    assert table["value"][1] / table["value"][2] == pytest.approx(np.exp(0.05 * 8), rel=1e-3)
    assert table["share"][3] < table["share"][2] < table["share"][1]


# ---------------------------------------------------------------------- reuse


def followed(z0, log_p, seed=0):
    """Whether predictions give more to the donor's block than to the own, and its share of the two (sequence,)."""
    masses = torch.stack(
        [log_p[:, 16 * block : 16 * block + 16].exp().sum(1) for block in range(4)], 1
    )
    row = torch.arange(len(z0))
    theirs, own = masses[row, z0[other_latent(z0, seed)]], masses[row, z0]
    return theirs > own, theirs / (theirs + own)


def test_at_the_embeddings_a_patch_is_another_text(shown):
    """What the stream is replaced by in layer 0 is what the donor's tokens would have written there."""
    (tokens, z0), model = (
        shown,
        build_model("llama", 65, 3, 16, 2, 32, initializer_range=0.5).eval(),
    )
    table = reuse(model, PROCESS, tokens, z0, seed=4).set_index(["site", "layer"])
    assert list(table.index) == [
        ("none", 0),
        *[
            (site, layer)
            for site in ("queries", "cues", "evidence", "all", "current")
            for layer in range(3)
        ],
    ]
    place, donor, earlier = PLACES % 8, other_latent(z0, 4), PLACES < 24
    sites = {
        "none": place < 0,
        "queries": earlier & (place == 7),
        "cues": earlier & (place == 6),
        "evidence": earlier & (place < 6),
        "all": earlier,
        "current": ~earlier & (place < 6),
    }
    for site, at in sites.items():
        given = torch.where(at, tokens[donor], tokens)
        ideal = followed(z0, predictive(PROCESS, given)[:, -1], 4)[0]
        assert table.loc[(site, 0), "exact"] == pytest.approx(float(ideal.double().mean()))
        with torch.no_grad():
            follows, mass = followed(
                z0, model(input_ids=given).logits[:, -2].double().log_softmax(-1), 4
            )
        assert table.loc[(site, 0), ["value", "low", "high"]].tolist() == pytest.approx(
            t_interval(follows.double()), abs=1e-9
        )
        assert table.loc[(site, 0), "mass"] == pytest.approx(float(mass.mean()), abs=1e-6)
    assert table["exact"].isna().tolist() == [layer > 0 for _, layer in table.index]
    assert table["mass"].nunique() == 15  # cues are alike before the first block: the clean run


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "favour, site", [(QUERIES, "queries"), (EVIDENCE, "evidence"), (EVEN, "all")]
)
def test_a_patch_is_followed_where_and_until_it_is_read(shown, favour, site, layer):
    """A head that reads one kind of places follows a patch there, up to its own layer and no further."""
    tokens, z0 = shown
    found = reuse(reader(favour, layer), PROCESS, tokens, z0).set_index(["site", "layer"])
    given = torch.cat([tokens[other_latent(z0), :24], tokens[:, 24:]], 1)
    (kept, clean), (follows, patched) = (
        followed(z0, read(tokens, favour)),
        followed(z0, read(given, favour)),
    )
    clean, patched = (
        (float(part.double().mean()), float(mass.mean()))
        for part, mass in ((kept, clean), (follows, patched))
    )
    assert clean[0] < 0.2 and patched[0] > 0.8
    told = {key: (one["value"], one["mass"]) for key, one in found.iterrows()}
    assert told["none", 0] == pytest.approx(clean, abs=1e-4)
    for where in {site, "all"}:
        for at in (0, 1):
            assert told[where, at] == pytest.approx(patched if at <= layer else clean, abs=1e-4)
    if site != "all":
        elsewhere = ({"queries", "evidence"} - {site}).pop()
        assert told[elsewhere, 0] == pytest.approx(clean, abs=1e-4) == told[elsewhere, 1]


def test_a_patch_of_what_a_head_copies_is_followed(shown):
    tokens, z0 = shown
    for layer in (0, 1):
        mass = reuse(summing_model(layer), PROCESS, tokens, z0).set_index(["site", "layer"])["mass"]
        assert mass["all", 0] > mass["evidence", 0] > mass["queries", 0] > mass["none", 0] + 0.01
        assert mass["all", 1] == pytest.approx(
            mass["all", 0] if layer else mass["none", 0], abs=1e-6
        )
    told = specialisation(summing_model(1), PROCESS, tokens, z0).set_index(["layer", "head"])
    assert told["earlier"][1, 0] > told["current"][1, 0] > 0


def test_donors_have_another_latent_and_there_must_be_one(shown):
    tokens, z0 = shown
    donor = other_latent(z0)
    assert (
        (z0[donor] != z0).all()
        and torch.equal(donor, other_latent(z0))
        and not torch.equal(donor, other_latent(z0, 1))
    )
    for ask in (
        lambda same: other_latent(same),
        lambda same: reuse(model_with(), PROCESS, tokens[:5], same),
    ):
        with pytest.raises(ValueError, match="z0: is 2 in all 5 sequences; give more sequences"):
            ask(torch.full((5,), 2))


# ---------------------------------------------------------------------- assumptions


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
    found = curvature(model, tokens, z0, 0, 1, size=0.5)
    with torch.no_grad():
        inside, stream = Internals(model), []
        model.model.norm.register_forward_pre_hook(
            lambda module, inputs: stream.append(inputs[0][:, -2].clone())
        )
        model(input_ids=tokens)
        own = inside.head_written(0, heads_and_logits(model, tokens)[0][0][:, -2])[:, 1]
        u = own[other_latent(z0)] - own

        def target(step):
            logits = model.lm_head(model.model.norm(stream[0] + step * u))
            return (logits[torch.arange(10), tokens[:, -1]] - logits.mean(-1)).double()

        assert torch.allclose(found, (target(0.5) - 2 * target(0.0) + target(-0.5)) * 4, atol=1e-3)
    random = curvature(model, tokens, z0, 0, 1, random=True, size=0.5)
    assert random.shape == (10,) and not torch.allclose(random, found)


# ---------------------------------------------------------------------- the mechanisms of the paper's toy experiment


def test_the_last_query_is_scored_and_donors_stand_at_its_place(shown):
    tokens, row = shown[0], torch.arange(60)
    question = scored(tokens, seed=1)
    assert (
        (question.at == 30).all()
        and (tokens[row, question.at] == PROCESS.cue).all()
        and torch.equal(question.target, tokens[:, 31])
    )
    sequence, position = question.same_state
    assert (position == PLACES).all() and (sequence != row[:, None]).all()
    assert not torch.equal(scored(tokens, seed=2).same_state[0], sequence)
    assert torch.isfinite(
        Ablations(model_with(mlp=True), question).ablate("layer", 0).removed
    ).all()


def test_vector_prompts_are_the_last_segments_of_contexts_of_another_latent():
    contexts, prompts = vector_prompts(PROCESS, 5, seed=1)
    assert (
        contexts.query_latent.tolist()
        == prompts.latent.tolist()
        == [latent for latent in range(4) for _ in range(5)]
    )
    assert torch.equal(
        contexts.tokens[contexts.document, contexts.position], torch.full((20,), PROCESS.cue)
    )
    assert contexts.tokens.shape == (20, 31) and (contexts.position == 30).all()
    assert torch.equal(prompts.tokens, contexts.tokens[:, -7:])
    said = contexts.tokens.masked_fill(contexts.tokens == PROCESS.cue, -1) // 16
    assert ((said[:, :24].unflatten(1, (3, 8)) == prompts.latent[:, None, None]).sum(2) >= 6).all()
    last = said[:, 24:30].mode(1).values
    assert (last != prompts.latent).all() and len(last.unique()) == 4
    exact = predictive(PROCESS, torch.nn.functional.pad(contexts.tokens, (0, 1)))[:, -1]
    assert torch.allclose(prompts.gold, exact.exp(), atol=1e-12) and torch.allclose(
        prompts.gold.sum(1), torch.ones(20).double()
    )
    assert (block_masses(PROCESS, prompts.gold.log())[torch.arange(20), prompts.latent] > 0.9).all()
    assert not torch.equal(vector_prompts(PROCESS, 5, seed=2)[1].tokens, prompts.tokens)


def invented(layer, head, even, odd, mended):
    """A response that removes `even` and `odd` in turn, more or less, and makes up for the shares `mended` of it."""
    removed = torch.tensor([even, odd]).double().repeat(10) + torch.arange(20).double() / 100
    attention = torch.zeros(20, 4, dtype=torch.float64)
    attention[:, 3] = removed * torch.tensor(mended).double().repeat(10)
    zero = torch.zeros_like(attention)
    return Response("head", layer, head, removed, -removed, attention, zero, zero, removed * 0)


def test_the_strongest_is_chosen_on_every_other_sequence_and_scored_on_the_rest():
    parts = [
        invented(0, 0, 1.0, 5.0, (0.9, 0.8)),
        invented(0, 1, 0.5, 0.5, (0.7, 0.6)),
        invented(1, 0, 2.0, 0.0, (0.5, -0.3)),
        invented(1, 1, -9.0, 0.0, (0.2, 0.1)),
        invented(2, 0, 99.0, 99.0, (1.0, 1.0)),
    ]
    found = {(part.layer, part.number): part for part in parts}
    runs = SimpleNamespace(
        inside=SimpleNamespace(layers=3, heads=2),
        ablate=lambda kind, layer, head: found[layer, head],
    )
    assert strongest_repair(runs, "head") == pytest.approx(
        -1
    )  # 1: chosen by the odd ones, scored by the even ones, or the last layer
    found |= {(layer, -1): found[layer, 0] for layer in range(3)}
    runs.inside.heads = 0
    assert strongest_repair(runs, "layer") == pytest.approx(-1)
    runs.inside.layers = 1
    with pytest.raises(ValueError, match="layers = 1"):
        strongest_repair(runs, "layer")


@pytest.mark.parametrize(
    "later, share", [("head", 1.0), ("head", 0.4), ("mlp", 0.4), ("head", -0.4)]
)
def test_where_a_share_is_made_up_for_repair_follows_what_is_removed(later, share):
    """Head (0, 0) alone removes something, and a known share of it comes back or is lost on top."""
    runs = Ablations(repair_model(later, share), repair_stimulus())
    for kind in ("layer", "head"):
        assert strongest_repair(runs, kind) == pytest.approx(np.sign(share), abs=1e-3)


TOY = TwoLevel(seed=0, segments=4, tokens=56)  # whose sequences fit the models of circuit_models.py


def found_in(model, process=TOY, natural=None, question=None):
    """`mechanisms` of a model on a process of 32 tokens, values by metric and definition."""
    shown = stimuli(process, 16, 32) | ({} if natural is None else {"natural": Stimulus(natural)})
    contexts, prompts = vector_prompts(process, 4)
    others = (
        model.config.vocab_size - process.vocabulary_size
    )  # words that the process does not have
    prompts = Prompts(
        prompts.tokens, torch.nn.functional.pad(prompts.gold, (0, others)), prompts.latent
    )
    table = mechanisms(model, shown, question or scored(toys(process)), contexts, prompts)
    assert list(table) == ["metric", "definition", "value"] and len(table) == 7
    return table.set_index(["metric", "definition"])["value"].to_dict()


def toys(process):
    return process.documents(HELD_OUT + torch.arange(16)).tokens.view(16, -1)


def test_an_untrained_model_has_none_of_the_mechanisms():
    found = found_in(build_model("llama", VOCABULARY, 3, 16, 2, CONTEXT).eval())
    assert list(found) == [
        ("layer-wise Hydra", "corrected"),
        ("head-wise Hydra", "corrected"),
        ("induction", "corrected"),
        ("function vector", "corrected"),
        ("function vector", "context itself"),
        ("layer-wise Hydra", "as released"),
        ("induction", "as released"),
    ]
    assert (
        abs(found["layer-wise Hydra", "as released"]) < 0.1
        and abs(found["function vector", "context itself"]) < 0.1
    )
    assert (
        abs(found["induction", "corrected"]) < 0.02
        and abs(found["function vector", "corrected"]) < 0.02
    )
    assert found["induction", "as released"] == pytest.approx(
        1 / 24, abs=0.02
    )  # of 17 to 32 tokens, one


def test_what_is_called_induction_is_found_in_the_model_that_has_it():
    few = torch.randint(10, (16, 32), generator=torch.Generator().manual_seed(0))
    found = {
        name: found_in(model, natural=few)
        for name, model in (("induction", induction_model()), ("duplicate", duplicate_model()))
    }
    assert (
        found["induction"]["induction", "corrected"]
        > 0.8
        > 0.2
        > found["induction"]["induction", "as released"]
    )
    assert (
        found["duplicate"]["induction", "as released"]
        > 0.8
        > 0.2
        > found["duplicate"]["induction", "corrected"]
    )
    alike = torch.arange(16).repeat(
        16, 2
    )  # what was matched stands at the same place in every sequence: positions explain it
    assert found_in(induction_model(), natural=alike)["induction", "corrected"] == pytest.approx(
        0, abs=1e-6
    )


def test_repair_and_its_released_reading_are_those_of_the_model():
    found = found_in(repair_model("head", 0.4), question=repair_stimulus())
    assert (
        found["layer-wise Hydra", "corrected"]
        == pytest.approx(1, abs=1e-3)
        == found["head-wise Hydra", "corrected"]
    )
    model = build_model("gpt2", VOCABULARY, 3, 16, 2, CONTEXT).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    clean, ablated = as_released(model, toys(TOY)[:, :31], 1)
    rise = max(float((ablated[0, layer] - clean[layer]).mean()) for layer in (1, 2))
    assert found_in(model)["layer-wise Hydra", "as released"] == pytest.approx(rise, abs=1e-6)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_function_vector_of_a_model_that_counts_is_what_it_counted(layer):
    """The own context's output adds how often it had each block, another latent's context adds its own numbers."""
    contexts, prompts = vector_prompts(PROCESS, 4)
    context, prompt = (
        torch.stack([(tokens // 16 == block).double().mean(1) for block in range(4)], 1)
        for tokens in (contexts.tokens, prompts.tokens)
    )

    def missed(added):
        log_p = torch.nn.functional.pad(
            SCALE * (prompt + added).repeat_interleave(16, 1), (0, 1)
        ).log_softmax(-1)
        return -(prompts.gold * log_p).sum(1)

    gain = missed(context[of_next_latent(contexts)]) - missed(context)
    assert gain.mean() > 1
    found = found_in(reader(layer=layer), PROCESS)
    assert found["function vector", "corrected"] == pytest.approx(float(gain.mean()), abs=1e-4)
    used = missed(0 * context) - missed(context - prompt)
    assert found["function vector", "context itself"] == pytest.approx(float(used.mean()), abs=1e-4)
