"""Exact losses and informations against brute force."""

from collections import defaultdict
from itertools import permutations, product

import numpy as np
import pytest
import torch
from grammars import RECURSIVE, all_latents, make
from latentree.data.corpus import HELD_OUT, Documents, load_corpus
from latentree.data.grammar import open_binding
from latentree.data.sampler import GrammarProcess
from latentree.exact.ceilings import expected, in_sentence
from latentree.exact.parser import PrefixParser
from latentree.exact.predictors import (
    predictive,
    role_losses,
    token_losses,
)
from latentree.exact.reader import reader_losses

ORDERS = """
Sentence -> 'noun' 'verb' [0.3] | 'verb' 'noun' [0.3]
Sentence -> 'and' 'verb' 'noun' [0.2] | 'verb' 'and' 'noun' [0.2]
"""
VERB_FIRST = "Sentence -> 'verb' 'noun' 'and' [1.0]"


def brute_force(grammar, documents, unit):
    """Probability of every sentence, a tuple of tokens, under the latents of one unit."""
    table, binding = {}, grammar.file.binding
    for shape in grammar.shapes:
        numbers = [grammar.roles.index(role) for role in shape.roles]
        for ranks in product(*(range(grammar.sizes[r]) for r in numbers)):
            p, words = shape.probability, []
            for role, r, rank, parent in zip(shape.roles, numbers, ranks, shape.binds_to):
                chance = grammar.frequencies[r][rank]
                if parent >= 0:
                    called = documents.habits[role][unit, ranks[parent]]
                    chance = binding * float(called == rank) + (1 - binding) * chance
                p *= chance
                words.append(int(documents.maps[role][unit, rank]))
            table[tuple(words)] = table.get(tuple(words), 0) + p
    return table


@pytest.mark.parametrize("habits", [{}, {"verb": "noun", "and": "verb"}, {"noun": "verb"}])
def test_latent_aware_predictive_equals_enumeration(habits):
    grammar = make(ORDERS, binding=0.7 if habits else 0.0, habits=habits)
    documents = GrammarProcess(grammar, 1).documents(range(3))
    q = predictive(grammar, documents)
    for i, token in enumerate(documents.tokens.tolist()):
        if documents.token["place"][i] == 0:
            table, prefix = brute_force(grammar, documents, int(documents.token["unit"][i])), ()
        mass = np.zeros(grammar.vocabulary_size)
        for words, p in table.items():
            if words[: len(prefix)] == prefix and len(words) > len(prefix):
                mass[words[len(prefix)]] += p
        assert np.allclose(q[i], mass / mass.sum(), atol=1e-12)
        prefix = (*prefix, token)
    of_token = q.gather(1, documents.tokens[:, None])[:, 0]
    assert torch.allclose(token_losses(grammar, documents), -of_token.log())


def test_syntax_only_equals_the_parser():
    """Each token's probability is its role's, by the prefix parser, shared by the role's words."""
    grammar = make(ORDERS, binding=0.7, habits={"verb": "noun"})
    documents = GrammarProcess(grammar).documents(range(20))
    found = predictive(grammar, documents, latent_aware=False)
    parser, prefix = PrefixParser(grammar), ()
    for p, place, role in zip(found, documents.token["place"], documents.token["role"]):
        prefix = prefix[: int(place)]
        of_role = parser.next_roles(prefix) / grammar.sizes
        assert np.allclose(p, of_role[grammar.role_of])
        prefix = (*prefix, grammar.roles[int(role)])


def test_recursive_losses_factor_into_roles_and_words():
    grammar = make(RECURSIVE)
    documents = GrammarProcess(grammar).documents(range(20))
    words = []
    for role, rank in zip(documents.token["role"], documents.token["rank"]):
        words.append(-np.log(grammar.frequencies[role][rank]))
    wanted = role_losses(grammar, documents) + torch.tensor(words)
    assert torch.allclose(token_losses(grammar, documents), wanted)


# ---------------------------------------------------------------------- expected losses


@pytest.mark.parametrize("name", ["bound", "bound-flat", "released-small"])
def test_losses_of_sampled_documents_are_the_expected_ones(name):
    corpus, count = load_corpus(name), 600
    documents = corpus.documents(corpus.apart(HELD_OUT, count))
    document = documents.token["document"]
    for column in ("latent_aware", "syntax_only"):
        losses = token_losses(corpus.grammar, documents, column == "latent_aware")
        table = expected(corpus.grammar).set_index("role")[column]
        for r, role in enumerate((*corpus.grammar.roles, "all")):
            here = (documents.token["role"] == r) | torch.tensor(role == "all")
            sums = torch.zeros(count, dtype=torch.float64)
            sums.index_add_(0, document[here], losses[here] - table[role])
            lengths = torch.bincount(document[here], minlength=count).double()
            error = float(sums.std() / lengths.mean() / count**0.5)  # of a ratio of sums
            assert abs(float(sums.mean() / lengths.mean())) < max(3.5 * error, 1e-9)


def test_expected_latent_aware_loss_equals_enumeration_over_habits():
    """A verb before its noun: its marginal over all 4**3 habits, and the noun's by Bayes."""
    roles = {"noun": {"size": 3, "zipf": 1.0}, "verb": {"size": 4, "zipf": 0.5}, "and": {"size": 2}}
    grammar = make(VERB_FIRST, roles=roles, binding=0.7, habits={"verb": "noun"})
    nouns, verbs = grammar.frequencies[:2]
    entropies = np.zeros(2)
    for habit in product(range(4), repeat=3):
        called = np.eye(4)[list(habit)]  # (noun, verb)
        joint = nouns[:, None] * (0.7 * called + 0.3 * verbs)
        marginal = joint.sum(0)
        of_verb = -(marginal * np.log(marginal)).sum()
        of_noun = -(joint * np.log(joint)).sum() - of_verb
        entropies += np.prod(verbs[list(habit)]) * np.array([of_verb, of_noun])
    table = expected(grammar).set_index("role")["latent_aware"]
    assert table[["verb", "noun"]].tolist() == pytest.approx(entropies.tolist())
    assert table["all"] == pytest.approx((entropies.sum() + np.log(2)) / 4)


def test_the_total_is_exact_where_roles_are_not():
    roles = {"noun": {"size": 20, "zipf": 1.0}, "verb": {"size": 20, "zipf": 0.5}}
    grammar = make(
        VERB_FIRST, roles=roles | {"and": {"size": 2}}, binding=0.7, habits={"verb": "noun"}
    )
    table = expected(grammar).set_index("role")
    assert np.isnan(table.latent_aware["verb"])
    losses = token_losses(grammar, GrammarProcess(grammar).documents(range(1500)))
    assert float(losses.mean()) == pytest.approx(table.latent_aware["all"], abs=0.02)


@pytest.mark.parametrize("zipf", [1.0, 0.0])
def test_in_sentence_loss_is_the_floor_of_a_flat_corpus(zipf):
    """Every latent of a two-word grammar enumerated, in a sentence of two clauses."""
    sentence = "Sentence -> Clause Clause [1.0]\nClause -> 'noun' 'verb' [1.0]"
    roles = {"noun": {"size": 2, "zipf": zipf}, "verb": {"size": 2, "zipf": 0.5}}
    flat = {"redraw": {"sentence": 1.0}}
    grammar = make(sentence, roles=roles, binding=0.8, habits={"verb": "noun"}, **flat)
    nouns, verbs = grammar.frequencies[:2]
    maps = list(permutations(range(2)))
    mass = np.zeros((2, 2, 2, 2))
    for noun_map, verb_map, habit in product(maps, maps, product(range(2), repeat=2)):
        latent = 0.25 * verbs[habit[0]] * verbs[habit[1]]
        for n1, v1, n2, v2 in product(range(2), repeat=4):
            p = latent * nouns[n1] * nouns[n2]
            for noun, verb in ((n1, v1), (n2, v2)):
                p *= 0.8 * (habit[noun] == verb) + 0.2 * verbs[verb]
            mass[noun_map[n1], verb_map[v1], noun_map[n2], verb_map[v2]] += p
    entropy = -(mass * np.log(mass)).sum()
    assert mass.sum() == pytest.approx(1)
    assert in_sentence(grammar) == pytest.approx(entropy / grammar.mean_length, abs=1e-12)


def test_expected_losses_of_a_recursive_grammar_are_refused():
    for exact_value in (expected, in_sentence):
        with pytest.raises(ValueError, match="recursive, or too many"):
            exact_value(make(RECURSIVE))


# ---------------------------------------------------------------------- ambiguous grammars

OVERLAP = """
S -> A [0.6] | B [0.4]
A -> 'noun' 'verb' [0.5] | 'noun' [0.5]
B -> 'noun' 'verb' [0.3] | 'verb' [0.7]
"""
# The second noun is the verb's in one derivation and of the first noun's phrase in the other.
ATTACHED = """
S -> 'noun' Act [0.5] | Phrase 'verb' [0.5]
Act -> 'and' 'noun' 'verb' [1.0]
Phrase -> 'noun' 'and' 'noun' [1.0]
"""
TWOS = {"noun": {"size": 2, "zipf": 1.0}, "verb": {"size": 2, "zipf": 0.5}}


def entropies(grammar):
    """Nats a token: latents fresh in each sentence and unknown, or known; by enumeration."""
    maps, habits, prior = all_latents(grammar, grammar.file.habits)
    everything = defaultdict(float)
    known = 0.0
    for unit, weight in enumerate(prior):
        table = brute_force(grammar, Documents({}, 1, maps=maps, habits=habits), unit)
        known -= weight * sum(p * np.log(p) for p in table.values() if p > 0)
        for words, p in table.items():
            everything[words] += weight * p
    unknown = -sum(p * np.log(p) for p in everything.values() if p > 0)
    return unknown / grammar.mean_length, known / grammar.mean_length


@pytest.mark.parametrize(
    "sentence, habits",
    [(OVERLAP, {}), (OVERLAP, {"verb": "noun"}), (ATTACHED, {}), (ATTACHED, {"verb": "noun"})],
)
def test_derivations_of_the_same_roles_are_weighed_not_told_apart(sentence, habits):
    roles = TWOS | ({"and": {"size": 1}} if sentence is ATTACHED else {})
    grammar = make(sentence, roles=roles, binding=0.8 if habits else 0.0, habits=habits)
    unknown, known = entropies(grammar)
    assert in_sentence(grammar) == pytest.approx(unknown, abs=1e-12)
    if sentence is ATTACHED and habits:
        assert open_binding(grammar.shapes) == ("noun", "and", "noun", "verb")
        with pytest.raises(ValueError, match="'noun and noun verb' has derivations in which"):
            expected(grammar)
    else:
        assert open_binding(grammar.shapes) is None
        assert expected(grammar).latent_aware.iloc[-1] == pytest.approx(known, abs=1e-12)


def test_a_binding_that_a_later_role_tells_of_has_a_total_but_no_losses_by_role():
    later = "S -> 'noun' 'verb' 'and' [0.5] | N 'verb' [0.5]\nN -> 'noun' [1.0]"
    roles = TWOS | {"and": {"size": 1}}
    grammar = make(later, roles=roles, binding=0.8, habits={"verb": "noun"})
    table = expected(grammar)
    assert table.latent_aware[:-1].isna().all()
    assert table.latent_aware.iloc[-1] == pytest.approx(entropies(grammar)[1], abs=1e-12)


def test_looking_back_is_worth_nothing_in_single_flat_clauses():
    grammar = load_corpus("clauses-flat").grammar
    without = expected(grammar).iloc[-1].syntax_only
    assert in_sentence(grammar) == pytest.approx(without, abs=1e-12)
    longer = load_corpus("bound-flat").grammar
    assert in_sentence(longer) < expected(longer).iloc[-1].syntax_only - 0.04


def test_a_recursive_grammar_whose_roles_leave_a_binding_open_is_refused():
    sentence = "S -> 'noun' 'verb' [0.4] | N 'verb' [0.2] | S 'and' S [0.4]\nN -> 'noun' [1.0]"
    grammar = make(sentence, binding=0.5, habits={"verb": "noun"})
    process = GrammarProcess(grammar)
    documents = process.documents(range(20))
    with pytest.raises(ValueError, match="leaves open whom its last word follows"):
        token_losses(grammar, documents)
    assert token_losses(grammar, documents, latent_aware=False).isfinite().all()
    with pytest.raises(ValueError, match="the ideal reader is not known"):
        reader_losses(process, {}, torch.zeros(1, 1))
