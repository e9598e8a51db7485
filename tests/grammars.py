"""Small grammars for the tests: one finite, one recursive, and random ones for hypothesis."""

from itertools import permutations, product

import numpy as np
import torch
from hypothesis import strategies as st
from latentree.data.grammar import Grammar

RECURSIVE = """
Sentence -> Group Action [1.0]
Group -> 'noun' [0.6] | Group 'and' Group [0.3] | Group [0.1]
Action -> 'verb' [0.7] | 'verb' Group [0.3]
"""
CLAUSES = """
Sentence -> Clause [0.4] | Clause 'and' Clause [0.3] | 'verb' 'noun' [0.3]
Clause -> 'noun' 'verb' [1.0]
"""
ROLES = {"noun": {"size": 5, "zipf": 1.0}, "verb": {"size": 4, "zipf": 0.7}, "and": {"size": 2}}
LAYOUT = {"sections": 1, "paragraphs": 2, "sentences": 3}


def make(sentence=CLAUSES, **fields):
    """A grammar from a sentence grammar, with any field of a grammar file replaced."""
    content = {
        "name": "tiny",
        "about": "for tests",
        "sentence": sentence,
        "roles": ROLES,
        "document": LAYOUT,
        "redraw": {"document": 1.0},
    }
    return Grammar(content | fields)


@st.composite
def sentence_grammars(draw):
    """Random finite sentence grammars over the roles a, b, c, all of which are used."""
    symbols = st.lists(st.sampled_from(["'a'", "'b'", "'c'"]), min_size=1, max_size=3)
    sides = draw(st.lists(symbols, min_size=1, max_size=3))
    weights = [draw(st.integers(1, 9)) for _ in sides]
    rules = []
    for side, weight in zip(sides, weights):
        rules.append(f"{' '.join(side)} [{weight / sum(weights):.6f}]")
    return f"S -> M 'a' [0.3] | 'b' M 'c' [0.3] | M M [0.4]\nM -> {' | '.join(rules)}"


def random_grammar(sentence, binding=0.0, redraw=None):
    """A Grammar for a sentence grammar over a, b, c."""
    roles = {"a": {"size": 3, "zipf": 1.0}, "b": {"size": 4, "zipf": 0.5}, "c": {"size": 2}}
    together = any("'a'" in side and "'b'" in side for side in sentence.split("|"))
    habits = {"c": "b"} | ({"b": "a"} if together else {}) if binding else {}
    redraw = redraw or {"document": 1.0}
    return make(sentence, roles=roles, binding=binding, habits=habits, redraw=redraw)


def all_latents(grammar, habits):
    """Every map with every habit, as maps and habits of documents, and their probability."""
    laws = dict(zip(grammar.roles, grammar.frequencies))
    tables = [permutations(words.tolist()) for words in grammar.words]
    for child, parent in habits.items():
        tables.append(product(range(len(laws[child])), repeat=len(laws[parent])))
    columns = [torch.tensor(column) for column in zip(*product(*tables))]
    maps = dict(zip(grammar.roles, columns))
    called = dict(zip(habits, columns[len(grammar.roles) :]))
    prior = np.ones(len(columns[0]))
    for child, drawn in called.items():
        prior *= laws[child][drawn.numpy()].prod(1)
    return maps, called, prior / prior.sum()
