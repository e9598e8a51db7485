"""Direct effects and ablations: identities on random models; models that repair as set by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from circuit_models import CONTEXT, VOCABULARY, repair_model
from grammars import RECURSIVE, make
from latentree.data.corpus import held_out
from latentree.data.ngrams import Chain, HashedTables, Successors
from latentree.data.sampler import GrammarProcess
from latentree.data.text import Text
from latentree.evidence.figures import pick
from latentree.inside.names import Internals, norm_gain, norm_scale, weight
from latentree.inside.trace import run
from latentree.measure.donors import (
    Stimulus,
    _draw_donors,
    _syntactic_states,
    at_answers,
    stimulus,
)
from latentree.measure.hydra import (
    PARTS,
    Ablations,
    cross_judged,
    given_back,
    measure,
    reaching_the_logit,
    repair_terms,
    repairs,
)
from latentree.measure.released import as_released
from latentree.measure.stimuli import bound_queries
from latentree.train.model import build_model
from speed import counted
from test_inside import MODELS, close, random_model

torch.set_num_threads(1)
POINTS = ("stream", "attention", "mlp", "logits")
COMPONENTS = [("layer", 0), ("attention", 0), ("mlp", 0), ("attention", 1), ("mlp", 1)]


def by_hand(tokens, at, target=None):
    """A stimulus of these tokens (sequence, position) in which all positions are of one state."""
    target = tokens[torch.arange(len(tokens)), at + 1] if target is None else target
    return Stimulus(tokens, at, target, torch.zeros_like(tokens))


def random_stimulus():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, (6, 12), generator=generator)
    return by_hand(tokens, torch.randint(5, 11, (6,), generator=generator))


def bound_corpus():
    return GrammarProcess(make(binding=0.8, habits={"verb": "noun"}))


def by_definition(model, shown, clean, found):
    """Direct effects of what a run `found` writes: the target's logit of it, less the mean."""
    inside, row = Internals(model), torch.arange(len(shown.at))
    scale = norm_scale(inside.final_norm, clean["stream"][-1].double())

    def effect(vectors):
        with torch.no_grad():
            normed = norm_gain(inside.final_norm, vectors.double()) * scale
            logits = normed @ weight(inside.unembedding).T.double()
        return logits[row, shown.at, shown.target] - logits[row, shown.at].mean(-1)

    effects = {
        name: torch.stack([effect(layer) for layer in found[name]], 1)
        for name in ("attention", "mlp")
    }
    logits = found["logits"][row, shown.at].double()
    return effects | {
        "embedding": effect(found["stream"][0]),
        "logit": logits[row, shown.target] - logits.mean(-1),
    }


@pytest.mark.parametrize("architecture, config", MODELS)
def test_direct_effects_sum_to_the_centred_logit(architecture, config):
    model, shown = random_model(architecture, **config), random_stimulus()
    clean = Ablations(model, shown).clean
    found = run(model, shown.tokens, POINTS)
    for name, expected in by_definition(model, shown, found, found).items():
        close(getattr(clean, name), expected)
    total = clean.embedding + clean.attention.sum(1) + clean.mlp.sum(1) + clean.bias
    torch.testing.assert_close(total, clean.logit, atol=1e-4, rtol=0)
    torch.testing.assert_close(clean.frozen, clean.logit, atol=1e-4, rtol=0)


def replaced(model, shown, clean, how, kind, layer):
    """What a whole run writes in which a component is replaced, from the ways' definitions."""
    here = torch.zeros_like(shown.tokens, dtype=torch.bool)
    here[torch.arange(len(here)), shown.at] = True

    def change(point):
        written = clean[point][layer]
        new = torch.zeros_like(written) if how == "zero" else written[shown.same_state]
        return lambda own: torch.where(here[..., None], new, own)

    points = ("attention", "mlp") if kind == "layer" else (kind,)
    return run(model, shown.tokens, POINTS, {(point, layer): change(point) for point in points})


@pytest.mark.parametrize("architecture", ["llama", "olmo2", "gpt_neox"])
def test_ablations_are_whole_runs_in_which_a_part_is_replaced(architecture):
    """A run on the clean run's keys and values is what a whole run gives; the parts add up."""
    model, shown = random_model(architecture), random_stimulus()
    clean = run(model, shown.tokens, POINTS)
    before = by_definition(model, shown, clean, clean)
    for how in ("resample", "zero"):
        runs = Ablations(model, shown, how)
        for kind, layer in COMPONENTS:
            whole = replaced(model, shown, clean, how, kind, layer)
            after = by_definition(model, shown, clean, whole)
            change = {name: after[name] - before[name] for name in before}
            found = runs.ablate(kind, layer)
            close(found.total, change["logit"])
            parts = ("attention", "mlp") if kind == "layer" else (kind,)
            close(found.removed, -sum(change[part][:, layer] for part in parts))
            first = layer + (kind in ("layer", "mlp"))
            close(found.attention[:, layer + 1 :], change["attention"][:, layer + 1 :])
            close(found.mlp[:, first:], change["mlp"][:, first:])
            assert not found.attention[:, : layer + 1].any() and not found.mlp[:, :first].any()
            close(found.total, -found.removed + found.compensation + found.norm)
            close(found.self_repair, found.compensation + found.norm)


def test_random_perturbations_are_as_long_as_those_of_resampling():
    model, shown = random_model("llama"), random_stimulus()
    runs = [Ablations(model, shown, how) for how in ("resample", "random")]
    for kind, layer in [("layer", 1), ("attention", 0), ("mlp", 1)]:
        lost = []
        for one in runs:
            new = one.replacement(kind, layer)
            lost.append(sum(one.written[point][layer][one.places] - new[point] for point in new))
        lengths = [gap.norm(dim=-1) for gap in lost]
        assert lengths[0].min() > 0.05
        torch.testing.assert_close(*lengths, atol=1e-5, rtol=1e-5)
        assert torch.cosine_similarity(*lost, dim=-1).abs().mean() < 0.7
    again = Ablations(model, shown, "random").ablate("attention", 0)
    assert again.total.equal(runs[1].ablate("attention", 0).total)


@pytest.mark.parametrize("how", ["resample", "random"])
def test_a_component_at_its_replacement_value_changes_nothing(how):
    # Two sequences that are each other's donors, and are the same.
    tokens = torch.randint(11, (1, 12), generator=torch.Generator().manual_seed(3)).repeat(2, 1)
    shown = by_hand(tokens, torch.tensor([7, 7]))
    shown.state = torch.arange(12).expand_as(tokens)
    runs = Ablations(random_model("gpt2"), shown, how)
    for component in COMPONENTS:
        found = runs.ablate(*component)
        for values in (found.removed, found.total, found.attention, found.mlp, found.norm):
            close(values, torch.zeros_like(values))


def test_parallel_blocks_leave_their_own_mlp_alone():
    llama, gpt_neox = (
        Ablations(random_model(name), random_stimulus()).ablate("attention", 0)
        for name in ("llama", "gpt_neox")
    )
    assert llama.mlp[:, 0].abs().max() > 1e-3 and gpt_neox.mlp[:, 0].abs().max() < 1e-6


# ---------------------------------------------------------------- models that repair by hand


def repair_stimulus():
    tokens = torch.randint(VOCABULARY, (40, CONTEXT), generator=torch.Generator().manual_seed(1))
    at = torch.randint(4, CONTEXT, (40,), generator=torch.Generator().manual_seed(2))
    return by_hand(tokens, at, tokens[torch.arange(40), at])


@pytest.mark.parametrize("later, share", [("head", 0.4), ("mlp", 1.0), ("idle", 0.0)])
def test_compensation_by_construction_is_read_as_what_it_is(later, share):
    model, shown = repair_model(later, share or 1.0), repair_stimulus()
    runs = Ablations(model, shown)
    # Head (0, 0) writes as much as the target's embedding is long; the vocabulary's mean is off.
    length = (shown.target + 1).double() / VOCABULARY * (1 - 1 / VOCABULARY)
    torch.testing.assert_close(runs.clean.attention[:, 0], length, atol=1e-3, rtol=0)
    found = runs.ablate("attention", 0)
    assert found.removed.std() > 0.2
    part = {"head": found.attention[:, 1], "mlp": found.mlp[:, 1], "idle": found.compensation}
    torch.testing.assert_close(part[later], share * found.removed, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.total, (share - 1) * found.removed, atol=2e-3, rtol=0)
    if later == "mlp":  # it may be erasure: it is no repair by attention
        assert given_back(repair_terms(model, shown, by="mlp")[:1])[0] == pytest.approx(1, abs=0.05)
        assert abs(repair_terms(model, shown)[0, :, 1]).max() < 1e-3
        return
    told = repairs(model, shown).set_index(["layer", "quantity"]).loc[0]
    for quantity in ("given back", "slope", "Theil-Sen"):
        assert told.loc[quantity, "value"] == pytest.approx(share, abs=0.05)
    assert told.loc["given back", "low"] > 0.2 if share else told.loc["given back", "high"] < 0.05


def test_no_layer_is_judged_where_it_was_chosen():
    """Five layers lose 1 and give back 1, each on its own fifth of the sequences: a fake."""
    draw = np.random.default_rng(0)
    terms = draw.normal(0, 0.05, (6, 80, 4))
    part = np.arange(80) % PARTS
    terms[:5, :, 0] += 1
    for layer in range(5):
        terms[layer, part == layer, 1] += 1
    found = cross_judged(terms, least=0.3)
    assert len(found) == 80
    assert given_back(found[None])[0] == pytest.approx(0, abs=0.05)
    terms[1, :, 1] += 0.5  # a repair everywhere
    found = cross_judged(terms, least=0.3)
    assert sorted(found.tolist()) == sorted(terms[1].tolist())
    assert given_back(found[None])[0] == pytest.approx(0.7, abs=0.05)
    assert cross_judged(terms[5:], least=0.3) is None  # nothing is removed
    terms[:5, :, 0] -= 1
    for layer in range(5):  # others name it, and where it is judged it removes nothing
        terms[layer, :, 0] += np.where(part == layer, -3, 1)
    assert cross_judged(terms, least=0.3) is None


def test_given_back_asks_for_all_three_conditions():
    """(removed, compensation, random) of one sequence: repair, damping, amplification."""
    cases = {(1.0, 0.5, 0.0): 0.5, (1.0, 0.5, 0.5): 0.0, (1.0, 0.2, -0.6): 0.2}
    cases |= {(1.0, -0.3, -0.9): -0.3}
    for terms, expected in cases.items():
        for spared, reaches in {1.0: expected, 0.1: min(expected, 0.1)}.items():
            shown = np.array([[[*terms, spared]]])
            assert given_back(shown)[0] == pytest.approx(expected)
            assert reaching_the_logit(shown)[0] == pytest.approx(reaches)


# ---------------------------------------------------------------------- the stimulus


def naive_states(tokens, document, grammar):
    """The roles of the sentence so far, one tuple for each position."""
    states = []
    for words, numbers in zip(tokens.tolist(), document.tolist(), strict=True):
        sentence = []
        for place, word in enumerate(words):
            if place and (words[place - 1] == grammar.end or numbers[place] != numbers[place - 1]):
                sentence = []
            sentence.append(int(grammar.role_of[word]))
            states.append(tuple(sentence))
    return states


@pytest.mark.parametrize("corpus", [bound_corpus(), GrammarProcess(make(RECURSIVE))])
def test_states_are_the_roles_of_the_sentence_so_far(corpus):
    fields = held_out(corpus, 6, 40)
    naive = naive_states(fields["tokens"], fields["document"], corpus.grammar)
    found = _syntactic_states(corpus.grammar, fields)
    both = set(zip(naive, found.flatten().tolist(), strict=True))
    assert len(both) == len(set(naive)) == len(found.unique())
    del fields["role"]  # then roles are read from the tokens
    assert _syntactic_states(corpus.grammar, fields).equal(found)
    assert not _syntactic_states(None, fields).any()


def test_donors_are_of_the_same_state_in_another_sequence():
    state = torch.randint(4, (6, 30), generator=torch.Generator().manual_seed(0))
    state[2, 5] = 9  # a state of its own
    state[3, 6:8] = 8  # a state that one sequence has
    row = torch.arange(6)[:, None].expand(6, 30)
    sequence, position = _draw_donors(state, 1)
    alone = state >= 8
    assert sequence[alone].equal(row[alone]) and position[2, 5] == 5
    assert state[sequence[~alone], position[~alone]].equal(state[~alone])
    assert (sequence[~alone] != row[~alone]).all()
    assert _draw_donors(state, 1)[1].equal(position)
    assert not _draw_donors(state, 2)[1].equal(position)


def test_donors_are_drawn_uniformly():
    counts = torch.zeros(4, 4)  # three others for each of four
    for seed in range(300):
        drawn, _ = _draw_donors(torch.zeros(4, 1, dtype=torch.long), seed)
        counts[torch.arange(4), drawn[:, 0]] += 1
    assert not counts.diagonal().any() and (counts + 100 * torch.eye(4) - 100).abs().max() < 40


def windows(corpus, sequences, shown):
    """The fields of the held-out windows of 48 tokens that are left in a stimulus, and which."""
    fields = held_out(corpus, sequences, 48)
    kept = (fields["tokens"][:, None] == shown.tokens).all(-1).any(1)
    assert 15 < kept.sum() == len(shown.tokens)
    return {name: field[kept] for name, field in fields.items()}, kept


def test_the_stimulus():
    corpus = bound_corpus()
    shown = stimulus(corpus, 20, 48, seed=3)
    (fields, _), row = windows(corpus, 20, shown), torch.arange(len(shown.at))
    assert shown.tokens.equal(fields["tokens"])
    assert shown.target.equal(shown.tokens[row, shown.at + 1])
    assert (shown.at >= 24).all() and (shown.at < 47).all()
    assert fields["document"][row, shown.at].equal(fields["document"][row, shown.at + 1])
    assert shown.at.equal(stimulus(corpus, 20, 48, seed=3).at)
    assert not shown.at.equal(stimulus(corpus, 20, 48, seed=4).at)
    role = torch.as_tensor(corpus.grammar.role_of)
    assert shown.peers.equal(role == role[shown.target][:, None])
    sequence, position = (donor[row, shown.at] for donor in shown.same_state)
    assert (sequence != row).all()  # a donor has the same word in the same state
    assert shown.tokens[sequence, position].equal(shown.tokens[row, shown.at])
    states = _syntactic_states(corpus.grammar, fields)
    assert states[sequence, position].equal(states[row, shown.at])


def test_a_stimulus_at_some_positions_only():
    corpus = bound_corpus()
    allowed = bound_queries(corpus.grammar, held_out(corpus, 20, 48)["tokens"])
    allowed[5] = False
    shown = stimulus(corpus, 20, 48, where=allowed)
    _, kept = windows(corpus, 20, shown)
    assert not kept[5]
    assert allowed[kept][torch.arange(len(shown.at)), shown.at].all()


def test_a_grammar_reads_the_states_of_a_corpus_without_one():
    parent = bound_corpus()
    chain = Chain(parent, order=1)
    shown = stimulus(chain, 20, 48, grammar=parent.grammar)
    fields, _ = windows(chain, 20, shown)
    naive = naive_states(fields["tokens"], fields["document"], parent.grammar)
    words = fields["tokens"].flatten().tolist()
    both = set(zip(zip(naive, words), shown.state.flatten().tolist(), strict=True))
    assert len(both) == len(set(zip(naive, words))) == len(shown.state.unique())
    shown = stimulus(HashedTables(), 4, 32)
    assert shown.state.equal(shown.tokens) and shown.peers is None


def test_text_in_which_no_position_has_a_donor_is_refused():
    words = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).view(20, 50)
    text = Text("random", [*words.numpy()], vocabulary_size=1001, end=1000)
    with pytest.raises(ValueError, match="where: leaves 0 of 8 sequences .* for 2 or more"):
        stimulus(text, 8, 24)  # no word comes twice
    # Where two keep each other's donors, the rest is left out.
    shown = random_stimulus()
    shown.state = torch.arange(6)[:, None].clamp(min=1).expand_as(shown.tokens)
    assert shown.of(torch.arange(6) < 5).tokens.equal(shown.tokens[:2])


# ---------------------------------------------------------------------- the table


def test_the_table():
    corpus = bound_corpus()
    shown = stimulus(corpus, 16, 24)
    count = len(shown.at)
    model = build_model("llama", corpus.vocabulary_size, layers=3, width=16, heads=2, context=24)
    with counted(model.eval()) as seen:
        table = measure(model, shown)
    # A clean run, then one position for each component.
    assert seen == {"runs": 1 + 3 + 3, "tokens": count * (24 + 6)}
    assert (table["n"] == count).all()
    assert not table.duplicated(["ablated", "layer", "responding", "quantity"]).any()
    found = Ablations(model, shown).ablate("attention", 1)
    rows = pick(table, ablated="attention", layer=1)
    change = pick(rows, quantity="change")
    assert change["responding"].tolist() == [2]
    assert change["value"].tolist() == pytest.approx([float(found.responses[:, 2].mean())])
    one = pick(rows, responding=-1).set_index("quantity")
    for name in ("removed", "compensation"):
        assert one.loc[name, "value"] == pytest.approx(float(getattr(found, name).mean()))
        assert one.loc[name, "low"] < one.loc[name, "value"] < one.loc[name, "high"]
    told = repairs(model, replace(shown, peers=None)).set_index(["layer", "quantity"]).value
    x, y = (values - values.mean() for values in (found.removed, found.attention.sum(1)))
    assert told[1, "slope"] == pytest.approx(float((x * y).sum() / (x * x).sum()))
    # Nothing comes after the last layer: it has no slope, and no row of changes.
    assert (2, "slope") not in told.index and (2, "removed") in told.index
    assert not len(pick(table, ablated="layer", layer=2, quantity="change"))


def test_among_the_words_of_the_role():
    """What raises all words of a role alike counts for nothing, and parts still add up."""
    corpus = bound_corpus()
    shown = stimulus(corpus, 12, 24)
    model = build_model("llama", corpus.vocabulary_size, layers=2, width=16, heads=2, context=24)
    runs, whole = Ablations(model.eval(), shown, among="role"), Ablations(model, shown)
    logits = run(model, shown.tokens, ("logits",))["logits"].double()
    for i, target in enumerate(shown.target):
        here = logits[i, shown.at[i]]
        close(runs.clean.logit[i], here[target] - here[shown.peers[i]].mean())
    clean = runs.clean
    close(clean.embedding + clean.attention.sum(1) + clean.mlp.sum(1) + clean.bias, clean.logit)
    found = runs.ablate("layer", 0)
    close(found.total, -found.removed + found.compensation + found.norm)
    role = torch.as_tensor(corpus.grammar.role_of)
    by_role = torch.randn(int(role.max()) + 1, 16, generator=torch.Generator().manual_seed(0))
    model.lm_head.weight.data += by_role[role]
    close(Ablations(model, shown, among="role").clean.attention, clean.attention)
    assert not Ablations(model, shown).clean.attention.allclose(whole.clean.attention, atol=1e-2)


def test_bad_input_is_named():
    model, shown = random_model("llama"), random_stimulus()
    with pytest.raises(ValueError, match="among = 'role': the stimulus has no roles"):
        Ablations(model, shown, among="role")
    with pytest.raises(ValueError, match="how = 'noise'.* resample, zero, random"):
        Ablations(model, shown, "noise")
    with pytest.raises(ValueError, match=r"change = \('mlp', -1\)"):
        Ablations(model, shown).ablate("mlp", -1)
    shown = random_stimulus()
    shown.state[0, shown.at[0]] = 1
    with pytest.raises(ValueError, match="stimulus: 1 scored positions have no donor"):
        Ablations(model, shown)


# ---------------------------------------------------------------------- as released


def test_a_block_without_biases_maps_zero_to_zero():
    tokens = torch.randint(11, (4, 12), generator=torch.Generator().manual_seed(0))
    deep = build_model("llama", 11, layers=4, width=16, heads=2, context=12, seed=1).eval()
    clean, ablated = as_released(deep, tokens, furthest=3)
    known = ablated.isfinite().all(-1)
    assert known.tolist() == [
        [False, True, True, True],
        [False, False, True, True],
        [False, False, False, True],
    ]
    assert (ablated[known] == 0).all() and clean.abs().min() > 0
    zero, place = torch.zeros(1, 3, 16), torch.arange(3)[None]
    rotary = deep.model.rotary_emb(zero, place)
    assert not deep.model.layers[1](zero, position_embeddings=rotary).any()
    # By definition: transformers' own streams, unembedded without the norm, the current token.
    with torch.no_grad():
        streams = deep(input_ids=tokens, output_hidden_states=True).hidden_states[1:-1]
        lens = torch.stack([deep.lm_head(stream[:, -1]) for stream in streams])
    close(clean[:-1], lens[:, torch.arange(4), tokens[:, -1]])


def test_biases_make_something_out_of_nothing():
    tokens = torch.randint(11, (5, 7), generator=torch.Generator().manual_seed(0))
    model = random_model("gpt2")
    clean, ablated = as_released(model, tokens, 1)
    assert ablated[0, 1].abs().min() > 1e-3


def test_answers_stand_after_words_that_call_for_one():
    def before(shown):
        return shown.tokens[torch.arange(len(shown.at)), shown.at]

    corpus = bound_corpus()
    shown = at_answers(corpus, 32, 24)
    noun = list(corpus.grammar.roles).index("noun")
    assert (torch.as_tensor(corpus.grammar.role_of)[before(shown)] == noun).all()
    bare = Successors("bare", words=32, choices=8, binding=0.9, length=32, callers=16)
    shown = at_answers(bare, 32, 32)
    assert (before(shown) < 16).all() and (shown.peers.sum(1) == 8).all()
    assert shown.peers.gather(1, shown.target[:, None]).all()
