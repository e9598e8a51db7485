"""Legal mass and levels against enumeration; as oracles, exact predictors recover what they know."""

from itertools import combinations, permutations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from grammars import RECURSIVE, make, random_grammar, sentence_grammars
from hypothesis import given, settings
from latentree.data.corpus import HELD_OUT, held_out, load_corpus
from latentree.data.sampler import GrammarProcess
from latentree.evidence.curves import Curve, curves
from latentree.exact.parser import PrefixParser
from latentree.exact.predictors import predictive, token_losses
from latentree.measure.legal import followers, legal_mass, masses, next_roles
from latentree.measure.stages import (
    _known_to,
    exact_predictors,
    level_curves,
    loss_parts,
    losses_by_level,
)
from latentree.train.model import build_model, log_probabilities

torch.set_num_threads(1)
SECTIONS = {
    "document": {"sections": 3, "paragraphs": 1, "sentences": 4},
    "redraw": {"document": 1.0, "section": 0.5},
    "binding": 0.8,
    "habits": {"verb": "noun"},
}
INVERTED = "Sentence -> 'noun' 'verb' 'and' [0.5] | 'verb' 'noun' [0.3] | 'and' [0.2]"
SMALL = {
    "noun": {"size": 2, "zipf": 1.0},
    "verb": {"size": 3, "zipf": 1.0},
    "and": {"size": 2, "zipf": 0.5},
}


class Says:
    """A model whose prediction is known: a function of tokens (sequence, position)."""

    device = "cpu"

    def __init__(self, log_p):
        self.log_p = log_p

    def __call__(self, input_ids, **options):
        return SimpleNamespace(logits=self.log_p(input_ids))


def means(table, **by):
    """Mean of a table of sums for each name."""
    for column, value in by.items():
        table = table[table[column] == value]
    totals = table.groupby("name")[["sum", "count"]].sum()
    return totals["sum"] / totals["count"]


# ---------------------------------------------------------------------- legal mass


@given(sentence_grammars())
@settings(max_examples=20, deadline=None)
def test_legal_tokens_and_followers_are_those_of_the_shapes(sentence):
    grammar = random_grammar(sentence, 0.0, {"document": 1.0})
    rows = held_out(GrammarProcess(grammar), 3, 24)
    state, names, legal = next_roles(grammar, rows["tokens"])
    prefix_of = {}
    for row, column in product(range(3), range(24)):
        begin = column - int(rows["place"][row, column])
        prefix = [grammar.roles[r] for r in rows["role"][row, begin : column + 1].tolist()]
        prefix = () if prefix[-1] == "end" else tuple(prefix)
        assert prefix_of.setdefault(int(state[row, column]), prefix) == prefix
    for number, prefix in prefix_of.items():
        size, roles, allowed = len(prefix), set(), set()
        for shape in grammar.shapes:
            if shape.roles[:size] == prefix:
                roles.add(shape.roles[size])
                allowed |= set(grammar.words[grammar.roles.index(shape.roles[size])].tolist())
        assert set(legal[number].nonzero()[:, 0].tolist()) == allowed
        last, _, following = names[number].partition(" > ")
        assert last == (prefix or ("end",))[-1] and set(following.split("|")) == roles
    table = followers(grammar)
    expected = table * 0
    for shape in grammar.shapes:
        for before, after in zip(shape.roles, shape.roles[1:]):
            expected.loc[before, after] += shape.probability
    expected = expected.div(expected.sum(axis=1), axis=0)
    assert np.allclose(table, expected, equal_nan=True)


def test_the_exact_predictors_mass_is_all_legal_in_a_recursive_grammar():
    grammar = make(RECURSIVE)
    tokens = held_out(GrammarProcess(grammar), 6, 20)["tokens"]
    state, _, legal = next_roles(grammar, tokens)
    parser = PrefixParser(grammar)
    p = torch.zeros(6, 20, grammar.vocabulary_size, dtype=torch.float64)
    for row in range(6):
        begin = 0
        for at in range(20):
            if tokens[row, at] == grammar.end:
                begin = at + 1
            seen = tokens[row, begin : at + 1].tolist()
            prefix = tuple(grammar.roles[r] for r in grammar.role_of[seen])
            of_role = parser.next_roles(prefix) / grammar.sizes
            p[row, at] = torch.tensor(of_role[grammar.role_of])
    assert torch.allclose(legal_mass(p.log(), state, legal), torch.ones(6, 20).double())
    uniform = torch.full_like(p, 1 / p.shape[-1]).log()
    assert torch.allclose(legal_mass(uniform, state, legal), (p > 0).double().mean(-1))


def test_followers_of_a_recursive_grammar_are_those_of_its_text():
    grammar = make(RECURSIVE)
    token = GrammarProcess(grammar).documents(range(600)).token
    nouns = (token["role"][:-1] == 0) & (token["place"][1:] > 0)
    share = float((token["role"][1:][nouns] == 1).double().mean())
    assert abs(share - followers(grammar).loc["noun", "verb"]) < 0.03


def test_released_values_and_what_an_exact_predictor_gives_to_roles():
    process = load_corpus("released-small")
    exact = followers(process.grammar)
    assert exact.loc["subject", "verb"] == pytest.approx(2 / 3)
    assert exact.loc["verb", "object"] == pytest.approx(2 / 3)
    assert exact.loc["connector", "subject"] == pytest.approx(1)
    rows, predictors = exact_predictors(process, 64, 64)
    tokens = rows["tokens"][:, :-1]
    table = masses(Says(lambda _: predictors["habits"]), process.grammar, tokens)
    legal = means(table, quantity="legal")
    assert legal.to_numpy() == pytest.approx(1, abs=1e-5)
    by_role = means(table, quantity="role")
    assert 0.6 < by_role["subject > verb"] < 0.73
    assert by_role["connector > subject"] == pytest.approx(1, abs=1e-5)
    seen = table[(table["quantity"] == "legal") & (table["name"] != "all")]
    assert seen["count"].sum() == tokens.numel()


# ---------------------------------------------------------------------- levels


def parts_of(process, sequences, context):
    """Windows of `exact_predictors`, their log probabilities, and each one's loss parts."""
    rows, exact = exact_predictors(process, sequences, context)
    return rows, exact, {k: loss_parts(process.grammar, p, rows) for k, p in exact.items()}


def shares(own, exact):
    """Each level's recovered share (value, low, high), for one checkpoint with loss parts `own`."""
    losses = {}
    for level, part in own.items():
        sums = part.nansum(1, keepdim=True).numpy()
        losses[level] = Curve(np.array([1]), sums, np.ones_like(sums))
    return {level: curve.table().loc[0] for level, curve in level_curves(losses, exact).items()}


def test_a_map_partly_redrawn_leaves_a_word_with_the_stated_probability():
    for n, k in ((4, 2), (5, 3), (3, 3), (4, 1), (4, 0)):
        stays = moves = total = 0
        for chosen in combinations(range(n), k):
            for order in permutations(chosen):
                row = list(range(n))
                for place, value in zip(chosen, order):
                    row[place] = value
                stays, moves, total = stays + (row[0] == 0), moves + (row[0] == 1), total + 1
        kept = min(1.0, (n - k) / (n - 1))
        assert stays / total == pytest.approx(kept + (1 - kept) / n)
        assert moves / total == pytest.approx((1 - kept) / n)


def test_predictors_that_know_a_level_equal_enumeration():
    """A word is anything with a chance: all ranks, their noisy tokens, the habits' noisy uses."""
    grammar = make(INVERTED, roles=SMALL, **SECTIONS | {"habits": {"verb": "noun", "and": "verb"}})
    process = GrammarProcess(grammar, 3)
    documents = process.documents(HELD_OUT + torch.arange(2))
    above, trust = _known_to(process, documents, "document")
    assert trust["verb"] == (pytest.approx((3 - 2) / 2), pytest.approx(1 - 1 / 2))
    assert trust["end"] == (1, 1)
    assert len(above.maps["noun"]) == 2 and len(documents.maps["noun"]) == 6

    def emitted(role, rank, unit):
        """P(token of a word of this rank)."""
        tokens = above.maps[role][unit % len(above.maps[role])]
        p = np.zeros(grammar.vocabulary_size)
        p[tokens] = (1 - trust[role][0]) / len(tokens)
        p[tokens[rank]] += trust[role][0]
        return p

    def rank_law(shape, ranks, at, unit):
        """P(rank of the word `at` | its parent's rank)."""
        role, parent = shape.roles[at], shape.binds_to[at]
        fresh = grammar.frequencies[grammar.roles.index(role)][ranks[at]]
        if parent < 0:
            return fresh
        binding = 0.8 * trust[role][1]
        called = int(above.habits[role][unit, ranks[parent]]) == ranks[at]
        return (1 - binding) * fresh + binding * called

    found, prefix = predictive(grammar, above, trust=trust), ()
    places, units = documents.token["place"].tolist(), above.token["unit"].tolist()
    for number, (token, place, unit) in enumerate(zip(documents.tokens.tolist(), places, units)):
        prefix = prefix if place else ()
        mass = np.zeros(grammar.vocabulary_size)
        for shape in grammar.shapes:
            if len(shape.roles) <= place:
                continue
            sizes = [int(grammar.sizes[grammar.roles.index(role)]) for role in shape.roles]
            for ranks in product(*map(range, sizes)):
                p = shape.probability
                for at, role in enumerate(shape.roles):
                    p *= rank_law(shape, ranks, at, unit)
                    if at < place:
                        p *= emitted(role, ranks[at], unit)[prefix[at]]
                mass += p * emitted(shape.roles[place], ranks[place], unit)
        assert np.allclose(found[number], mass / mass.sum(), atol=1e-12)
        prefix = (*prefix, token)


def test_levels_are_ordered_and_the_deepest_knows_all():
    roles = {"noun": {"size": 8, "zipf": 1.0}, "verb": {"size": 8, "zipf": 0.7}, "and": {"size": 2}}
    process = GrammarProcess(make(**SECTIONS | {"roles": roles}))
    rows, exact = exact_predictors(process, 200, 40)
    assert list(exact) == ["uniform", "frequencies", "syntax", "maps", "habits", "section"]
    losses = {name: -p.gather(-1, rows["tokens"][:, 1:, None]).mean() for name, p in exact.items()}
    assert sorted(losses, key=losses.get, reverse=True) == list(exact)
    for p in exact.values():
        assert torch.allclose(p.exp().sum(-1), torch.ones(1, dtype=torch.float64))
    documents = process.documents(HELD_OUT + torch.arange(4))
    same, trust = _known_to(process, documents, "section")
    assert set(trust.values()) == {(1.0, 1.0)}
    losses = -predictive(process.grammar, same, trust=trust, log_token=True)
    assert torch.allclose(token_losses(process.grammar, documents), losses)
    changed = (rows["called"] != rows["called_above"])[rows["called"] >= 0].float().mean()
    assert 0.5 < changed < 0.9  # noun in place, habit kept, verb in place: each may be lost


def test_shares_are_one_for_what_a_predictor_knows_and_nought_for_what_it_does_not():
    rows, exact, parts = parts_of(GrammarProcess(make(**SECTIONS)), 300, 40)
    names = list(exact)
    for known, name in enumerate(names):
        found = shares(parts[name], parts)
        assert list(found) == names[1:] == list(parts[name])
        for number, level in enumerate(found, 1):
            if number in (known, known + 1):
                assert found[level].value == pytest.approx(float(number <= known), abs=1e-9)
            assert found[level].low - 1e-12 <= found[level].value <= found[level].high + 1e-12
    for name in ("syntax", "maps"):  # the document misleads where the section redrew: left out
        assert abs(shares(parts[name], parts)["section"].value) < 0.1


def test_parts_add_up_to_the_loss_and_every_bound_word_is_in_one():
    rows, exact, parts = parts_of(GrammarProcess(make(**SECTIONS)), 300, 40)
    own, free, bound = parts["habits"], rows["free"][:, 1:], rows["called"][:, 1:] >= 0
    loss = -exact["habits"].gather(-1, rows["tokens"][:, 1:, None])[..., 0]
    whole = own["frequencies"] + own["syntax"] + own["maps"]
    assert torch.allclose(loss[free], whole[free]) and whole[~free].isnan().all()
    misled = (rows["called"] != rows["called_above"]) & (rows["tokens"] == rows["called_above"])
    told = ~own["habits"].isnan() | ~own["section"].isnan()
    assert torch.equal(told, bound & ~misled[:, 1:])
    assert not (bound & free).any()


def test_levels_are_told_apart_in_whatever_order_they_are_learned():
    """A predictor that knows habits and maps, but of the syntax only how frequent roles are."""
    process = GrammarProcess(make(binding=0.8, habits={"verb": "noun"}))
    grammar = process.grammar
    rows, exact, parts = parts_of(process, 300, 40)
    no_syntax = torch.zeros_like(exact["habits"])
    for share, words in zip(grammar.role_frequencies, grammar.words):
        p = exact["habits"][..., words].exp()
        total = p.sum(-1, keepdim=True)
        no_syntax[..., words] = share * torch.where(total > 0, p / total, 1 / len(words))
    found = shares(loss_parts(grammar, no_syntax.log(), rows), parts)
    assert abs(found["syntax"].value) < 0.01
    assert found["maps"].value == pytest.approx(1, abs=0.03)
    assert found["habits"].value == pytest.approx(1, abs=1e-9)


def test_what_has_nothing_to_tell_is_left_out_and_what_cannot_be_told_apart_refused():
    _, _, parts = parts_of(GrammarProcess(make()), 20, 20)
    found = shares(parts["maps"], parts)
    assert "habits" not in found and found["maps"].value == pytest.approx(1)
    for grammar in (make(RECURSIVE), make(redraw={})):
        with pytest.raises(ValueError, match="tiny: recursive, or redraws nothing"):
            exact_predictors(GrammarProcess(grammar), 2, 8)


def test_a_sweep_of_losses_gives_the_shares_of_its_models():
    process = GrammarProcess(make(**SECTIONS))
    rows, _, parts = parts_of(process, 6, 24)
    model = build_model("llama", process.vocabulary_size, 1, 16, 2, 24).eval()
    log_p = log_probabilities(model, rows["tokens"], rows=4)
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(6, 24)) and not log_p.requires_grad
    table = losses_by_level(model, process.grammar, rows).assign(step=3)
    found = level_curves(curves(table, "level", 10), parts)
    expected = shares(loss_parts(process.grammar, log_p[:, :-1], rows), parts)
    for level, curve in found.items():
        assert curve.values == pytest.approx(expected[level].value)
