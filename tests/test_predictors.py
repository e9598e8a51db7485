"""The exact predictors against brute-force enumeration, and the counts predictor against a hand calculation."""

from itertools import product

import numpy as np
import pytest
import torch
from grammars import RECURSIVE, make
from latentree.data.sampler import GrammarProcess
from latentree.exact.ceilings import expected, syntax_entropy
from latentree.exact.parser import PrefixParser
from latentree.exact.predictors import (
    counts_losses,
    fit_smoothing,
    predictive,
    role_losses,
    token_losses,
)

ORDERS = """
Sentence -> 'noun' 'verb' [0.3] | 'verb' 'noun' [0.3] | 'and' 'verb' 'noun' [0.2] | 'verb' 'and' 'noun' [0.2]
"""


def brute_force(grammar, documents, unit):
    """Probability of every sentence (tuple of tokens) under the latents of one unit, by enumerating all ranks."""
    table = {}
    for shape in grammar.shapes:
        numbers = [grammar.roles.index(role) for role in shape.roles]
        for ranks in product(*(range(grammar.sizes[r]) for r in numbers)):
            p = shape.probability
            for place, (r, rank) in enumerate(zip(numbers, ranks)):
                law, parent = grammar.frequencies[r], shape.binds_to[place]
                if parent < 0:
                    p *= law[rank]
                else:
                    called = int(documents.habits[shape.roles[place]][unit, ranks[parent]])
                    p *= (
                        grammar.file.binding * (called == rank)
                        + (1 - grammar.file.binding) * law[rank]
                    )
            rows = [documents.maps[role] for role in shape.roles]
            words = tuple(int(m[unit if len(m) > 1 else 0, rank]) for m, rank in zip(rows, ranks))
            table[words] = table.get(words, 0) + p
    return table


@pytest.mark.parametrize("shared", [0.0, 0.5])
@pytest.mark.parametrize(
    "habits", [{}, {"verb": "noun"}, {"verb": "noun", "and": "verb"}, {"noun": "verb"}]
)
def test_latent_aware_predictive_equals_enumeration(shared, habits):
    grammar = make(ORDERS, shared=shared, binding=0.7 if habits else 0.0, habits=habits)
    documents = GrammarProcess(grammar, 1).documents(range(3))
    q = predictive(grammar, documents)
    assert torch.allclose(q.sum(1), torch.ones(len(q), dtype=torch.float64))
    table, prefix = None, ()
    for i, token in enumerate(documents.tokens.tolist()):
        if documents.token["place"][i] == 0:
            table, prefix = brute_force(grammar, documents, int(documents.token["unit"][i])), ()
        mass = np.zeros(grammar.vocabulary_size)
        for words, p in table.items():
            if words[: len(prefix)] == prefix and len(words) > len(prefix):
                mass[words[len(prefix)]] += p
        assert np.allclose(q[i], mass / mass.sum(), atol=1e-12)
        prefix = (*prefix, token)
    assert torch.allclose(
        token_losses(grammar, documents), -q.gather(1, documents.tokens[:, None])[:, 0].log()
    )


def test_expected_latent_aware_loss_equals_enumeration_over_habits():
    """A verb before its noun: its marginal, averaged over all 4**3 habits, and the noun's by Bayes."""
    roles = {"noun": {"size": 3, "zipf": 1.0}, "verb": {"size": 4, "zipf": 0.5}, "and": {"size": 2}}
    grammar = make(
        "Sentence -> 'verb' 'noun' 'and' [1.0]", roles=roles, binding=0.7, habits={"verb": "noun"}
    )
    law_n, law_v = grammar.frequencies[:2]
    entropies = np.zeros(2)
    for habit in product(range(4), repeat=3):
        joint = np.array(
            [
                [law_n[n] * (0.7 * (habit[n] == v) + 0.3 * law_v[v]) for n in range(3)]
                for v in range(4)
            ]
        )
        marginal = joint.sum(1)
        h_v = -(marginal * np.log(marginal)).sum()
        entropies += np.prod(law_v[list(habit)]) * np.array(
            [h_v, -(joint * np.log(joint)).sum() - h_v]
        )
    table = expected(grammar).set_index("role")["latent_aware"]
    assert table["verb"] == pytest.approx(entropies[0]) and table["noun"] == pytest.approx(
        entropies[1]
    )
    assert table["all"] == pytest.approx((entropies.sum() + np.log(2)) / 4)


def test_ceilings_are_ordered_and_total_is_exact_where_roles_are_not():
    roles = {
        "noun": {"size": 20, "zipf": 1.0},
        "verb": {"size": 20, "zipf": 0.5},
        "and": {"size": 2},
    }
    grammar = make(
        "Sentence -> 'verb' 'noun' 'and' [1.0]", roles=roles, binding=0.7, habits={"verb": "noun"}
    )
    table = expected(grammar).set_index("role")
    assert (
        np.isnan(table.latent_aware["verb"])
        and table.latent_aware["all"] < table.syntax_only["all"]
    )
    documents = GrammarProcess(grammar).documents(range(1500))
    assert float(token_losses(grammar, documents).mean()) == pytest.approx(
        table.latent_aware["all"], abs=0.02
    )


def test_syntax_only_with_shared_tokens_equals_the_parser():
    """Each token's probability from the prefix parser, with the roles it could serve as weights."""
    grammar = make(ORDERS, shared=0.5)
    documents = GrammarProcess(grammar).documents(range(200))
    losses = token_losses(grammar, documents, latent_aware=False)
    whole = predictive(grammar, GrammarProcess(grammar).documents(range(12)), latent_aware=False)
    parser, prefix = PrefixParser(grammar), []
    for i, token in enumerate(documents.tokens[:60].tolist()):
        p = parser.next_tokens(prefix)
        assert np.allclose(p, whole[i])
        assert -np.log(p[token]) == pytest.approx(float(losses[i]))
        prefix = [] if token == grammar.end else [*prefix, token]
    assert float(losses.mean()) == pytest.approx(expected(grammar).syntax_only.iloc[-1], abs=0.05)


def test_recursive_losses_factor_into_roles_and_words():
    grammar = make(RECURSIVE)
    documents = GrammarProcess(grammar).documents(range(20))
    words = -torch.tensor(
        [
            np.log(grammar.frequencies[r][rank])
            for r, rank in zip(documents.token["role"].tolist(), documents.token["rank"].tolist())
        ]
    )
    assert torch.allclose(token_losses(grammar, documents), role_losses(grammar, documents) + words)
    with pytest.raises(ValueError, match="set shared to 0"):
        shared = make(RECURSIVE, shared=0.5)
        token_losses(shared, GrammarProcess(shared).documents([0]))


def test_syntax_entropy_of_a_recursive_grammar():
    """Every string has one derivation, so the entropy of derivations is the expected loss of the best syntax predictor."""
    grammar = make("Sentence -> 'noun' 'verb' [0.6] | 'and' Sentence [0.4]")
    documents = GrammarProcess(grammar).documents(range(3000))
    per_sentence = float(role_losses(grammar, documents).sum()) / int(
        (documents.tokens == grammar.end).sum()
    )
    assert syntax_entropy(grammar) == pytest.approx(-(0.6 * np.log(0.6) + 0.4 * np.log(0.4)) / 0.6)
    assert per_sentence == pytest.approx(syntax_entropy(grammar), rel=0.03)


def test_counts_predictor_by_hand():
    """Words of one role (size 4): 0 1 0 1 0 | 1 ... the second document starts afresh."""
    windows = {
        "tokens": torch.tensor([[0, 1, 0, 1, 0, 1]]),
        "role": torch.zeros(1, 6, dtype=torch.int64),
        "document": torch.tensor([[0, 0, 0, 0, 1, 1]]),
        "position": torch.tensor([[0, 1, 2, 3, 0, 1]]),
    }
    a, b = 0.5, 2.0
    losses = counts_losses(windows, [4], (a, b), torch.zeros(1, 6))

    def p(pairs, follows, word, role):
        return (pairs + a * (word + b / 4) / (role + b)) / (follows + a)

    by_hand = [
        p(0, 0, 0, 0),
        p(0, 0, 0, 1),
        p(0, 0, 1, 2),
        p(1, 1, 1, 3),
        p(0, 0, 0, 0),
        p(0, 0, 0, 1),
    ]
    assert torch.allclose(losses[0], -torch.tensor(by_hand).log(), atol=1e-6)
    best = fit_smoothing(windows, [4])
    assert all(value > 0 for value in best)
