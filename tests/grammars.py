"""Small grammars for the tests: one recursive, one with shared tokens, and random ones for hypothesis."""

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
    """Random finite sentence grammars over the roles a, b, c with two or three levels of nonterminals."""

    def weights(n):
        raw = [draw(st.integers(1, 9)) for _ in range(n)]
        return [w / sum(raw) for w in raw]

    def rule(left, below):
        symbols = [*below, "'a'", "'b'", "'c'"]
        sides = [
            " ".join(draw(st.lists(st.sampled_from(symbols), min_size=1, max_size=3)))
            for _ in range(draw(st.integers(1, 3)))
        ]
        return f"{left} -> " + " | ".join(
            f"{side} [{p:.6f}]" for side, p in zip(sides, weights(len(sides)))
        )

    middle = rule("M", [])
    return f"S -> M 'a' [0.3] | 'b' M 'c' [0.3] | M M [0.4]\n{middle}"


def random_grammar(sentence, binding, redraw):
    """A Grammar for a sentence grammar over a, b, c."""
    roles = {"a": {"size": 3, "zipf": 1.0}, "b": {"size": 4, "zipf": 0.5}, "c": {"size": 2}}
    return make(
        sentence,
        roles=roles,
        binding=binding,
        habits={"b": "a", "c": "b"} if binding else {},
        redraw=redraw,
    )
