"""Legal mass and levels against enumeration; as oracles, exact predictors recover what they know."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from grammars import RECURSIVE, make, random_grammar, sentence_grammars
from hypothesis import given, settings
from latentree.data.corpus import held_out, load_corpus
from latentree.data.sampler import GrammarProcess
from latentree.exact.parser import PrefixParser
from latentree.exact.predictors import predictive
from latentree.measure.legal import followers, legal_mass, masses, next_roles
from latentree.measure.stages import followed, windows_with_calls
from latentree.train.model import build_model

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
    tokens = held_out(process, 64, 63)["tokens"]
    knows = exactly(process, 64, 64)
    says, states = Says(lambda _: knows(tokens).logits[:, :-1]), next_roles(process.grammar, tokens)
    table = masses(says, process.grammar, tokens, states)
    legal = means(table, quantity="legal")
    assert legal.to_numpy() == pytest.approx(1, abs=1e-5)
    by_role = means(table, quantity="role")
    assert 0.6 < by_role["subject > verb"] < 0.73
    assert by_role["connector > subject"] == pytest.approx(1, abs=1e-5)
    seen = table[(table["quantity"] == "legal") & (table["name"] != "all")]
    assert seen["count"].sum() == tokens.numel()


# ---------------------------------------------------------------------- levels


def exactly(process, sequences, context, **knows):
    """A model that is an exact predictor of these held-out windows."""
    found = {}

    def annotate(documents):
        found["p"] = predictive(process.grammar, documents, **knows)
        return {"number": torch.arange(len(documents.tokens))}

    rows = held_out(process, sequences, context, annotate=annotate)
    return Says(lambda _: found["p"][rows["number"]].log().roll(-1, 1))


def levels_of(model, process, rows):
    return means(followed(model, process.grammar, rows))


def test_who_knows_all_latents_follows_both_levels_and_who_knows_none_neither():
    process = GrammarProcess(make(**SECTIONS))
    rows = windows_with_calls(process, 300, 40)
    knows = levels_of(exactly(process, 300, 40), process, rows)
    assert list(knows.index) == ["document", "section"]
    assert knows["document"] > 0.8 and knows["section"] > 0.8
    none = levels_of(exactly(process, 300, 40, latent_aware=False), process, rows)
    assert none["document"] == pytest.approx(1 / 4)  # of four verbs
    assert none["section"] == pytest.approx(1 / 3)  # of what is left beside the document's


def test_who_follows_the_document_alone_is_not_said_to_follow_the_section():
    process = GrammarProcess(make(**SECTIONS))
    rows = windows_with_calls(process, 300, 40)
    verbs = torch.as_tensor(process.grammar.words[1])

    def says(_):
        p = torch.full((*rows["tokens"].shape, process.vocabulary_size), 1e-9)
        p[..., verbs] = 0.05
        above = rows["called_above"].roll(-1, 1)
        return p.scatter(-1, above.clamp(min=0)[..., None], 0.85).log()

    found = levels_of(Says(says), process, rows)
    assert found["document"] == pytest.approx(0.85, abs=0.01)
    assert found["section"] == pytest.approx(1 / 3, abs=0.01)


def test_words_called_for_are_those_that_come():
    process = GrammarProcess(make(**SECTIONS))
    rows = windows_with_calls(process, 300, 40)
    there, differ = rows["called"] >= 0, rows["called"] != rows["called_above"]
    assert torch.equal(there, rows["called_above"] >= 0)
    comes = (rows["called"] == rows["tokens"])[there].float().mean()
    assert 0.8 < comes < 0.95  # the binding, and by chance
    assert (rows["called_above"] == rows["tokens"])[there & differ].float().mean() < 0.15
    assert 0.5 < differ[there].float().mean() < 0.9  # noun, habit, verb: each may be redrawn


def test_one_level_has_no_second_and_what_redraws_nothing_is_refused():
    process = GrammarProcess(make(binding=0.8, habits={"verb": "noun"}))
    rows = windows_with_calls(process, 20, 20)
    model = build_model("llama", process.vocabulary_size, 1, 16, 2, 20).eval()
    assert set(followed(model, process.grammar, rows)["name"]) == {"document"}
    for grammar in (make(RECURSIVE), make(redraw={})):
        with pytest.raises(ValueError, match="tiny: recursive, or redraws nothing"):
            windows_with_calls(GrammarProcess(grammar), 2, 8)
