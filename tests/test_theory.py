"""Tests of the theorem and its assumptions, on models for which the answer is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from circuit_models import CONTEXT, VOCABULARY, duplicate_model, induction_model, repair_model
from latentree.data.corpus import HELD_OUT
from latentree.data.two_level import TwoLevel, contested
from latentree.evidence.intervals import t_interval
from latentree.exact.two_level import losses, predictive
from latentree.inside.names import Internals
from latentree.inside.trace import run
from latentree.measure import donors, theory
from latentree.measure.function_vectors import of_next_latent
from latentree.measure.hydra import Ablations, Response
from latentree.measure.prompts import Prompts
from latentree.measure.released import as_released
from latentree.measure.stimuli import Stimulus, stimuli
from latentree.train.model import build_model

torch.set_num_threads(1)
PROCESS = TwoLevel(seed=0, segments=4)
PLACES, BLOCKS, SCALE = torch.arange(32), torch.arange(64) // 16, 8.0
# What a head weighs places by, before softmax: alike, the later ones more, or one kind of places only.
EVEN, FADING = torch.zeros(32), 0.05 * PLACES
QUERIES = torch.where(PLACES % 8 == 7, 0.0, -200.0)
EVIDENCE = torch.where(PLACES % 8 < 6, 0.0, -200.0)


@pytest.fixture(scope="module")
def shown():
    documents = PROCESS.documents(HELD_OUT + torch.arange(60))
    return documents.tokens.view(60, -1), documents.token["z0"].view(60, -1)[:, 0]


def model_with(layers=2, mlp=False):
    """A model whose MLPs write nothing, unless they shall."""
    model = build_model("llama", PROCESS.vocabulary_size, layers, 16, 2, 32).eval()
    for block in model.model.layers:
        block.mlp.down_proj.weight.data *= float(mlp)
        block.self_attn.o_proj.weight.data *= 20
    return model


def blind_model():
    """It gives all tokens the same probability, whatever it reads."""
    model = model_with()
    model.lm_head.weight.data.zero_()
    return model


def reader(favour=EVEN, layer=0):
    """A GPT-2 without norms that predicts what `read` says: a head of a layer attends by `favour`."""
    model = build_model("gpt2", PROCESS.vocabulary_size, 2, 12, 1, 32, mlp_width=4).eval()
    for parameter in model.parameters():
        parameter.data.zero_()
    stack, four = model.transformer, torch.arange(4)
    stack.wte.weight.data[torch.arange(64), BLOCKS] = 1.0
    stack.wpe.weight.data[:, 4] = favour
    attention = stack.h[layer].attn
    attention.c_attn.bias.data[0] = 12**0.5
    attention.c_attn.weight.data[4, 12] = 1.0
    attention.c_attn.weight.data[four, 24 + four] = 1.0
    attention.c_proj.weight.data[four, 8 + four] = SCALE
    model.lm_head.weight.data[torch.arange(64), 8 + BLOCKS] = 1.0
    for block in stack.h:
        block.ln_1 = torch.nn.Identity()
    stack.ln_f = torch.nn.Identity()
    return model


def read(tokens, favour=EVEN, seen=None):
    """What a reader predicts for the last of tokens: SCALE times the weight of each block."""
    before = tokens[:, :-1]
    weights = favour.double()[: before.shape[1]].expand(before.shape)
    if seen is not None:
        weights = weights.masked_fill(~seen[:, :-1], -torch.inf)
    return predicted(share_of_blocks(before, weights.softmax(1)))


def share_of_blocks(tokens, weights):
    """The weight (sequence, block) of the tokens of each block."""
    return torch.stack([(weights * (tokens // 16 == block)).sum(1) for block in range(4)], 1)


def predicted(share):
    """Log probabilities (sequence, vocabulary) of a reader that has found shares (sequence, block)."""
    logits = torch.nn.functional.pad(SCALE * share.repeat_interleave(16, 1), (0, 1))
    return logits.log_softmax(-1)


def test_floors_are_the_exact_losses_and_a_uniform_model_lies_above(shown):
    table = theory.floors(blind_model(), PROCESS, shown[0])
    assert np.allclose(table["value"], np.log(65)) and len(table) == 31
    assert np.allclose(table["exact"], losses(PROCESS, shown[0]).mean(0)[1:])
    assert (table["exact"] < table["value"]).all()
    assert (table[table["place"] == 6]["exact"] == 0).all()  # the cue is certain
    assert table["segment"].tolist() == [position // 8 for position in range(1, 32)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_last_query_is_the_models_own_prediction_from_what_is_seen(architecture):
    model = build_model(architecture, 65, 2, 16, 2, 32, initializer_range=0.3).eval()
    tokens = torch.randint(64, (20, 32), generator=torch.Generator().manual_seed(0))
    own = run(model, tokens, ["logits"])["logits"][:, -2].double().log_softmax(-1)
    seen = torch.ones_like(tokens, dtype=torch.bool)
    for mask in (None, seen):
        assert torch.allclose(theory.last_query(model, tokens, mask), own, atol=1e-5)
    seen[:10, :12], seen[:, 20] = False, False
    found = theory.last_query(model, tokens, seen)
    for at in (5, 15, 20, 30):
        other = torch.where(PLACES == at, (tokens + 7) % 64, tokens)
        changed = (theory.last_query(model, other, seen) - found).abs().max(1).values
        assert (changed[seen[:, at]] > 1e-5).all() and not changed[~seen[:, at]].any()


def test_what_is_not_seen_is_left_out_and_the_rest_keeps_its_position(shown):
    tokens = shown[0]
    seen = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    seen[:, 23] = True  # a query
    for favour in (EVEN, FADING, QUERIES):
        found = theory.last_query(reader(favour), tokens, seen)
        assert torch.allclose(found, read(tokens, favour, seen), atol=1e-4)


def test_the_excess_of_a_window_is_what_the_rest_would_have_told(shown):
    tokens, windows = shown[0], [1, 7, 15, 31]
    table = theory.window_excess(reader(), PROCESS, tokens, windows)
    last, row = tokens[:, -1], torch.arange(len(tokens))
    for one in table.itertuples():
        seen = (PLACES >= 31 - one.window).expand(tokens.shape)
        own = (read(tokens) - read(tokens, EVEN, seen))[row, last]
        assert (one.value, one.low, one.high) == pytest.approx(t_interval(own), abs=1e-4)
        lost = losses(PROCESS, tokens, seen) - losses(PROCESS, tokens)
        assert one.exact == pytest.approx(float(lost[:, -1].mean()), abs=1e-12)
    assert (table["exact"][:3] > 0.1).all() and table["exact"][3] == 0 == table["value"][3]


def test_the_exact_effect_does_not_depend_on_distance_and_a_blind_model_has_none():
    table = theory.distance_effects(blind_model(), PROCESS, [1, 2, 3])
    assert np.allclose(table[["value", "low", "high", "share"]], 0)
    assert (table["exact"] > 1).all() and np.ptp(table["exact"]) < 1e-9
    flat = TwoLevel("matched flat", segments=4)  # where nothing is shared, there is no share
    table = theory.distance_effects(blind_model(), flat, [1, 3])
    assert not table["exact"].any() and table["share"].isna().all()


def test_a_model_that_reads_what_is_near_is_moved_less_from_afar():
    """Known: of the deciding segment's tokens, how many more are of the own side's block."""
    table = theory.distance_effects(reader(FADING), PROCESS, [1, 2, 3], 30, seed=2)
    contests, sides = contested(PROCESS, 30, [1, 2, 3], seed=2)
    weights, row = FADING[:31].double().softmax(0), torch.arange(30)
    for one, pair in zip(table.itertuples(), contests):
        odds = []
        for tokens in pair[..., :31]:
            share = share_of_blocks(tokens, weights)
            odds.append(SCALE * (share[row, sides[1]] - share[row, sides[0]]))
        expected = t_interval((odds[1] - odds[0]) / 2)
        assert (one.value, one.low, one.high) == pytest.approx(expected, abs=1e-4)
        assert one.share == pytest.approx(one.value / one.exact)
    assert table["value"][0] / table["value"][1] == pytest.approx(np.exp(0.05 * 8), rel=1e-3)


# ---------------------------------------------------------------------- reuse


def followed(z0, log_p, seed=0):
    """(share of predictions that give more to the donor's block, mean of its share of the two)."""
    masses = log_p[:, :64].exp().unflatten(1, (4, 16)).sum(-1)
    row = torch.arange(len(z0))
    theirs, own = masses[row, z0[theory.other_latent(z0, seed)]], masses[row, z0]
    return float((theirs > own).double().mean()), float((theirs / (theirs + own)).mean())


def test_at_the_embeddings_a_patch_is_another_text(shown):
    """The stream in layer 0 is what the donor's tokens would have written there."""
    tokens, z0 = shown
    model = build_model("llama", 65, 3, 16, 2, 32, initializer_range=0.5).eval()
    table = theory.reuse(model, PROCESS, tokens, z0, seed=4).set_index(["site", "layer"])
    place, earlier = PLACES % 8, PLACES < 24
    sites = {
        "none": PLACES < 0,
        "queries": earlier & (place == 7),
        "cues": earlier & (place == 6),
        "evidence": earlier & (place < 6),
        "all": earlier,
        "current": ~earlier & (place < 6),
    }
    donor = tokens[theory.other_latent(z0, 4)]
    for site, at in sites.items():
        given = torch.where(at, donor, tokens)
        ideal = followed(z0, predictive(PROCESS, given)[:, -1], 4)[0]
        logits = run(model, given, ["logits"])["logits"][:, -2]
        own = followed(z0, logits.double().log_softmax(-1), 4)
        found = table.loc[(site, 0), ["value", "mass", "exact"]].tolist()
        assert found == pytest.approx([*own, ideal], abs=1e-6)
    assert table["exact"].isna().tolist() == [layer > 0 for _, layer in table.index]
    assert table["mass"].nunique() == 15  # cues are alike before the first block: the clean run


@pytest.mark.parametrize(
    "favour, site", [(QUERIES, "queries"), (EVIDENCE, "evidence"), (EVEN, "all")]
)
def test_a_patch_is_followed_where_and_until_it_is_read(shown, favour, site):
    """A head that reads one kind of places follows a patch there, up to its own layer only."""
    tokens, z0 = shown
    given = torch.cat([tokens[theory.other_latent(z0), :24], tokens[:, 24:]], 1)
    clean, patched = followed(z0, read(tokens, favour)), followed(z0, read(given, favour))
    assert clean[0] < 0.2 and patched[0] > 0.8
    for reads in (0, 1):
        table = theory.reuse(reader(favour, reads), PROCESS, tokens, z0)
        for layer in (0, 1):
            rows = table[table["layer"] == layer].set_index("site")[["value", "mass"]]
            expected = patched if layer <= reads else clean
            assert rows.loc[site].tolist() == pytest.approx(expected, abs=1e-4)
            assert rows.loc["all"].tolist() == pytest.approx(expected, abs=1e-4)
            if site != "all":
                other = {"queries": "evidence", "evidence": "queries"}[site]
                assert rows.loc[other].tolist() == pytest.approx(clean, abs=1e-4)


def test_donors_have_another_latent_and_there_must_be_one(shown):
    z0 = shown[1]
    donor = theory.other_latent(z0)
    assert (z0[donor] != z0).all() and not torch.equal(donor, theory.other_latent(z0, 1))
    with pytest.raises(ValueError, match="z0: is 2 in all 5 sequences; give more sequences"):
        theory.other_latent(torch.full((5,), 2))


def test_a_head_is_changed_by_the_segments_that_it_reads(shown):
    """Even attention reads 24 earlier tokens and 6 of the current segment."""
    table = theory.specialisation(reader(layer=1), PROCESS, *shown).set_index(["layer", "head"])
    assert table["earlier"][1, 0] > table["current"][1, 0] > 0
    only = torch.where(PLACES >= 24, 0.0, -200.0)
    table = theory.specialisation(reader(only, 1), PROCESS, *shown).set_index(["layer", "head"])
    assert table["earlier"][1, 0] == 0 and table["current"][1, 0] > 0.5


# ---------------------------------------------------------------------- assumptions


def test_a_direction_that_a_later_mlp_takes_out_does_not_arrive(shown):
    """The MLP of layer 1 writes minus what stands in coordinate 0 of the stream it reads."""
    model = build_model("gpt2", PROCESS.vocabulary_size, 2, 16, 2, 32, mlp_width=4).eval()
    for block in model.transformer.h:
        block.ln_1 = block.ln_2 = torch.nn.Identity()
        for parameter in block.mlp.parameters():
            parameter.data.zero_()
        block.attn.c_proj.weight.data[:] = torch.eye(16)
    mlp = model.transformer.h[1].mlp
    mlp.c_fc.weight.data[0, :2] = torch.tensor([1.0, -1.0])  # gelu(x) - gelu(-x) = x
    mlp.c_proj.weight.data[:2, 0] = torch.tensor([-1.0, 1.0])
    model.transformer.h[1].attn.c_attn.weight.data.zero_()  # layer 1's heads pass nothing on
    least = theory.transparency(model, shown[0][:4]).set_index(["layer", "head"])["least"]
    assert np.allclose(least[1], [0, 1], atol=1e-3) and least[0, 0] == pytest.approx(0, abs=1e-3)
    assert least[0, 1] == pytest.approx(1, abs=1e-3)


def test_where_nothing_comes_after_all_of_a_contribution_reaches_the_end(shown):
    table = theory.transparency(model_with(layers=1), shown[0][:4])
    assert np.allclose(table["least"], 1, atol=1e-3)


def test_gradients_within_equal_spaces_agree_and_within_orthogonal_ones_do_not(shown):
    tokens, model = shown[0][:8], model_with(layers=1)
    weight = model.model.layers[0].self_attn.o_proj.weight.data  # (width, heads * head_dim)
    weight[:, 8:] = weight[:, :8]
    assert np.allclose(theory.gradient_cosines(model, tokens)["value"], 1, atol=1e-4)
    weight[:] = torch.eye(16)
    cosines = theory.gradient_cosines(model, tokens).set_index(["head", "other"])["value"]
    assert abs(cosines[0, 1]) < 1e-5 and cosines[1, 1] == pytest.approx(1)


def test_curvature_is_that_of_the_final_norm_where_nothing_else_comes(shown):
    (tokens, z0), model = (part[:10] for part in shown), model_with(layers=1)
    found = theory.curvature(model, tokens, z0, 0, 1, size=0.5)
    seen = run(model, tokens, ["z", "stream"])
    stream = seen["stream"][-1, :, -2]
    own = Internals(model).head_written(0, seen["z"][0, :, -2])[:, 1].detach()
    u = own[theory.other_latent(z0)] - own

    def target(step):
        logits = model.lm_head(model.model.norm(stream + step * u)).detach()
        return (logits[torch.arange(10), tokens[:, -1]] - logits.mean(-1)).double()

    expected = (target(0.5) - 2 * target(0.0) + target(-0.5)) * 4
    assert torch.allclose(found, expected, atol=1e-3)
    random = theory.curvature(model, tokens, z0, 0, 1, random=True, size=0.5)
    assert not torch.allclose(random, found)


# ---------------------------------------------------------------------- the paper's toy experiment


def test_the_last_query_is_scored_and_donors_stand_at_its_place(shown):
    tokens, row = shown[0], torch.arange(60)
    question = theory.scored(tokens, seed=1)
    assert (tokens[row, question.at] == PROCESS.cue).all()
    assert (question.at == 30).all() and torch.equal(question.target, tokens[:, 31])
    sequence, position = question.same_state
    assert (position == PLACES).all() and (sequence != row[:, None]).all()


def test_vector_prompts_are_the_last_segments_of_contexts_of_another_latent():
    contexts, prompts = theory.vector_prompts(PROCESS, 5, seed=1)
    latent = torch.arange(4).repeat_interleave(5)
    assert torch.equal(contexts.query_latent, latent) and torch.equal(prompts.latent, latent)
    assert contexts.tokens.shape == (20, 31) and (contexts.position == 30).all()
    assert torch.equal(prompts.tokens, contexts.tokens[:, -7:])
    said = contexts.tokens.masked_fill(contexts.tokens == PROCESS.cue, -1) // 16
    own = (said == latent[:, None]).double()
    assert own[:, :24].sum(1).min() >= 18 and own[:, 24:].mean() < 0.1
    whole = torch.nn.functional.pad(contexts.tokens, (0, 1))
    assert torch.allclose(prompts.gold, predictive(PROCESS, whole)[:, -1].exp(), atol=1e-12)
    masses = theory.block_masses(PROCESS, prompts.gold.log())
    assert (masses[torch.arange(20), latent] > 0.9).all()


def invented(layer, head, even, odd, mended):
    """A response that removes `even` and `odd` in turn, and makes up for the shares `mended` of it."""
    removed = torch.tensor([even, odd]).double().repeat(10) + torch.arange(20).double() / 100
    attention = torch.zeros(20, 4, dtype=torch.float64)
    attention[:, 3] = removed * torch.tensor(mended).double().repeat(10)
    zero = torch.zeros_like(attention)
    return Response("head", layer, head, removed, -removed, attention, zero, zero, removed * 0)


def test_the_strongest_is_chosen_on_every_other_sequence_and_scored_on_the_rest():
    """1 would come out if the odd ones chose, or the even ones scored, or the last layer counted."""
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
    assert theory.strongest_repair(runs, "head") == pytest.approx(-1)


def repair_question():
    """Positions whose own token is to be predicted again: what repair_model does."""
    tokens = torch.randint(VOCABULARY, (40, CONTEXT), generator=torch.Generator().manual_seed(1))
    at = torch.randint(4, CONTEXT, (40,), generator=torch.Generator().manual_seed(2))
    target = tokens[torch.arange(40), at]
    return donors.Stimulus(tokens, at, target, torch.zeros_like(tokens))


def test_where_a_share_is_made_up_for_repair_follows_what_is_removed():
    """Head (0, 0) alone removes something; a known share of it comes back or is lost on top."""
    for later, share in (("head", 0.4), ("mlp", 0.4), ("head", -0.4)):
        runs = Ablations(repair_model(later, share), repair_question())
        for kind in ("layer", "head"):
            found = theory.strongest_repair(runs, kind)
            assert found == pytest.approx(np.sign(share), abs=1e-3)


TOY = TwoLevel(seed=0, segments=4, tokens=56)  # its sequences fit the models of circuit_models.py


def found_in(model, process=TOY, natural=None):
    """`mechanisms` of a model on a process of 32 tokens, values by metric and definition."""
    shown = stimuli(process, 16, 32)
    if natural is not None:
        shown["natural"] = Stimulus(natural)
    contexts, prompts = theory.vector_prompts(process, 4)
    others = model.config.vocab_size - process.vocabulary_size  # words the process does not have
    gold = torch.nn.functional.pad(prompts.gold, (0, others))
    question = theory.scored(process.documents(HELD_OUT + torch.arange(16)).tokens.view(16, -1))
    given = shown, question, contexts, Prompts(prompts.tokens, gold, prompts.latent)
    table = theory.mechanisms(model, *given)
    return table.set_index(["metric", "definition"])["value"]


def test_an_untrained_model_has_none_of_the_mechanisms():
    found = found_in(build_model("llama", VOCABULARY, 3, 16, 2, CONTEXT).eval())
    assert len(found) == 7
    assert abs(found["function vector"]).max() < 0.1
    assert abs(found["layer-wise Hydra", "as released"]) < 0.1
    assert abs(found["induction", "corrected"]) < 0.02
    assert found["induction", "as released"] == pytest.approx(1 / 24, abs=0.02)  # of 17 to 32


def test_what_is_called_induction_is_found_in_the_model_that_has_it():
    few = torch.randint(10, (16, 32), generator=torch.Generator().manual_seed(0))
    found = found_in(induction_model(), natural=few)["induction"]
    assert found["corrected"] > 0.8 and found["as released"] < 0.2
    found = found_in(duplicate_model(), natural=few)["induction"]
    assert found["as released"] > 0.8 and found["corrected"] < 0.2
    alike = torch.arange(16).repeat(16, 2)  # matches stand alike everywhere: positions explain them
    found = found_in(induction_model(), natural=alike)["induction"]
    assert found["corrected"] == pytest.approx(0, abs=1e-6)


def test_the_released_reading_is_the_largest_rise_of_the_lens():
    model = build_model("gpt2", VOCABULARY, 3, 16, 2, CONTEXT).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    tokens = TOY.documents(HELD_OUT + torch.arange(16)).tokens.view(16, -1)
    clean, ablated = as_released(model, tokens[:, :31], 1)
    rise = float((ablated[0, 1:] - clean[1:]).mean(1).max())
    assert found_in(model)["layer-wise Hydra", "as released"] == pytest.approx(rise, abs=1e-6)


def test_the_function_vector_of_a_model_that_counts_is_what_it_counted():
    """The own context's output adds how often it had each block, another's adds its own numbers."""
    contexts, prompts = theory.vector_prompts(PROCESS, 4)
    context = share_of_blocks(contexts.tokens, torch.full((16, 31), 1 / 31).double())
    prompt = share_of_blocks(prompts.tokens, torch.full((16, 7), 1 / 7).double())

    def missed(share):
        return -(prompts.gold * predicted(share)).sum(1)

    found = found_in(reader(layer=1), PROCESS)["function vector"]
    gain = missed(prompt + context[of_next_latent(contexts)]) - missed(prompt + context)
    assert found["corrected"] == pytest.approx(float(gain.mean()), abs=1e-4) and gain.mean() > 1
    used = missed(prompt) - missed(context)
    assert found["context itself"] == pytest.approx(float(used.mean()), abs=1e-4)
