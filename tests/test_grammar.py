"""Exact quantities of grammars against nltk and enumeration; what a file may say."""

import itertools
import shutil
from collections import defaultdict
from pathlib import Path

import nltk
import numpy as np
import pytest
import yaml
from grammars import CLAUSES, RECURSIVE, ROLES, make, random_grammar, sentence_grammars
from hypothesis import given, settings
from latentree.data.corpus import load_corpus
from latentree.data.files import read_yaml
from latentree.exact.parser import PrefixParser, legal_sentences

GRAMMARS = Path("params/grammars")


def test_shipped_grammars_have_the_release_sentences():
    for name in ("bound", "bound-flat", "bound-static", "released", "released-small"):
        grammar = load_corpus(name).grammar
        assert grammar.mean_length == pytest.approx(6)
        assert [round(s.probability, 5) for s in grammar.shapes] == [0.5, 0.16667, 0.16667, 0.16667]
        next_roles = PrefixParser(grammar).next_roles(("subject",))
        assert next_roles[grammar.roles.index("verb")] == 1


def test_released_is_the_released_process():
    corpus = load_corpus("released")
    grammar, file = corpus.grammar, corpus.grammar.file
    assert grammar.vocabulary_size == 1001 and grammar.end == 1000
    starts = {role: (words[0], words[-1]) for role, words in zip(grammar.roles, grammar.words)}
    assert starts == {
        "subject": (0, 299),
        "verb": (300, 599),
        "object": (600, 899),
        "connector": (900, 999),
        "end": (1000, 1000),
    }
    assert corpus.mean_document_length == pytest.approx(96)
    assert corpus.repetitions == 10 and file.redraw == {"document": 1.0} and file.binding == 0


# ---------------------------------------------------------------------- what may come next


def test_legal_roles_match_the_earley_chart_of_nltk():
    for sentence in (CLAUSES, RECURSIVE):
        rules = nltk.PCFG.fromstring(sentence).productions()
        plain = "\n".join(str(rule).split(" [")[0].replace('"', "'") for rule in rules)
        chart_parser = nltk.EarleyChartParser(
            nltk.CFG.fromstring(f"ROOT -> Sentence 'end'\n{plain}")
        )
        grammar = make(sentence)
        parser, checked = PrefixParser(grammar), 0
        for length in range(6):
            for prefix in itertools.product(("noun", "verb", "and"), repeat=length):
                found = parser.next_roles(prefix)
                for role, chance in zip(grammar.roles, found):
                    # The chart grows beyond a role if and only if it is legal.
                    edges = chart_parser.chart_parse([*prefix, role]).edges()
                    legal = any(edge.end() == length + 1 and edge.rhs() for edge in edges)
                    assert (chance > 0) == legal, (prefix, role)
                checked += found.any()
        assert checked > 5


def test_prefix_probabilities_of_a_recursive_grammar_match_the_inside_probabilities_of_nltk():
    parser = PrefixParser(make(RECURSIVE))
    # nltk's inside parser cannot take the loop Group -> Group: its probability is folded in.
    folded = nltk.PCFG.fromstring("""
        Sentence -> Group Action [1.0]
        Group -> 'noun' [0.66666666] | Group 'and' Group [0.33333334]
        Action -> 'verb' [0.7] | 'verb' Group [0.3]
    """)
    inside = nltk.parse.pchart.InsideChartParser(folded)
    for sentence in ("noun verb", "noun and noun verb", "noun verb noun and noun and noun"):
        roles = sentence.split()
        total = sum(tree.prob() for tree in inside.parse(roles))
        assert np.exp(parser.log_probability((*roles, "end"))) == pytest.approx(total, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(sentence_grammars())
def test_random_grammars_agree_with_their_enumeration(sentence):
    grammar = random_grammar(sentence)
    table, counts = defaultdict(float), np.zeros(len(grammar.roles))
    for shape in grammar.shapes:
        table[shape.roles] += shape.probability
        counts += [shape.probability * shape.roles.count(role) for role in grammar.roles]
    assert sum(table.values()) == pytest.approx(1)
    assert np.allclose(grammar.role_counts, counts)
    parser = PrefixParser(grammar)
    for roles in list(table)[:5]:
        for cut in range(len(roles)):
            mass = np.zeros(len(grammar.roles))
            for other, p in table.items():
                if other[:cut] == roles[:cut] and len(other) > cut:
                    mass[grammar.roles.index(other[cut])] += p
            assert np.allclose(parser.next_roles(roles[:cut]), mass / mass.sum())
            assert np.exp(parser.log_probability(roles[:cut])) == pytest.approx(mass.sum())


def test_words_bind_to_the_sibling_that_their_habit_names():
    grammar = make(binding=0.5, habits={"verb": "noun"})
    bound = {shape.roles: shape.binds_to for shape in grammar.shapes}
    assert bound["noun", "verb", "end"] == (-1, 0, -1)
    assert bound["verb", "noun", "end"] == (1, -1, -1)
    assert bound["noun", "verb", "and", "noun", "verb", "end"] == (-1, 0, -1, -1, 3, -1)
    assert not any(any(np.array(shape.binds_to) >= 0) for shape in make().shapes)


def test_sampled_sentences_are_legal_and_shuffled_ones_are_not():
    corpus = load_corpus("bound")
    tokens = corpus.documents(range(20)).tokens
    assert legal_sentences(corpus.grammar, tokens) == [True] * 480
    assert not all(legal_sentences(corpus.grammar, tokens.flip(0)))


# ---------------------------------------------------------------------- files


def test_bad_grammars_are_refused_in_one_line_that_names_field_and_value():
    noun = "Sentence -> 'noun' 'verb' 'and' "
    bad = {
        "sentence is not a PCFG": {"sentence": "just words"},
        "do not sum to 1": {"sentence": "Sentence -> 'noun' [0.5] | 'verb' [0.2]"},
        "uses 'nuon'": {"sentence": "Sentence -> 'nuon' [1.0]"},
        "uses Clause": {"sentence": "Sentence -> Clause [1.0]"},
        "yields nothing or has probability 0": {"sentence": f"{noun} A [1.0]\nA -> [1.0]"},
        "role 'idle' is in no sentence": {"roles": ROLES | {"idle": {"size": 3}}},
        "symbol Idle is in no sentence": {"sentence": f"{noun} [1.0]\nIdle -> 'noun' [1.0]"},
        "role 'end' is added": {"roles": ROLES | {"end": {"size": 1}}},
        "reptitions = 3: no such field": {"reptitions": 3},
        "roles.and.size = 'two'": {"roles": ROLES | {"and": {"size": "two"}}},
        "redraw.chapter": {"redraw": {"chapter": 1.0}},
        "redraw.document = 1.5": {"redraw": {"document": 1.5}},
        "no habits say who follows whom": {"binding": 0.5},
        "'nuon' is no role": {"habits": {"verb": "nuon"}},
        "verb follows and, but no production has both": {"habits": {"verb": "and"}},
        "lead back in a circle": {"habits": {"verb": "noun", "noun": "verb"}},
        "kind = 'tree'": {"kind": "tree"},
    }
    for message, fields in bad.items():
        with pytest.raises(ValueError) as error:
            make(**fields)
        told = str(error.value)
        assert message in told and "\n" not in told and told.startswith("grammar tiny")


@pytest.mark.parametrize("chance", [0.5, 0.7])
def test_infinite_expected_length_is_refused(chance):
    with pytest.raises(ValueError, match="length is infinite: Sentence yields on average"):
        make(f"Sentence -> 'noun' 'verb' 'and' [{1 - chance}] | Sentence Sentence [{chance}]")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "corpora there: bound-static"),
        ("name: other\n", "name is 'other'"),
        ("name: wrong\nkind: n-gram\nparent: bund\n", "corpus 'bund': no file"),
        ("name: wrong\nkind: n-gram\nparent: wrong\n", "kind = 'n-gram': Input should be 'PCFG'"),
        ("name: wrong\nkind: n-gram\n", "grammar wrong: parent: Missing"),
        ("name: wrong\nkind: n-gram\nordr: 3\n", "ordr: no such field; fields: label, name, order"),
        ("name: wrong\nkind: n-gram\nparent: bound-static\norder: 3.0\n", "order = 3.0: "),
        ("name: wrong\nkind: n-gram\nparent: bound-static\nsample_tokens: -5\n", "= -5: Input"),
        ("name: wrong\nkind: treeless\nbinding: 1.5\n", "binding = 1.5: Input should be less"),
        ("name: wrong\nkind: treeless\nwords: 12\n", "words = 12: give more than choices = 12"),
        ("name: wrong\nkind: treeless\nseed: 1\n", "seed: no such field"),
        ("name: wrong\nkind: filtered tree\nspread: .nan\n", "spread = nan: Input should be a fin"),
        ("name: wrong\nkind: hashed n-gram\ntables: 0\n", "tables = 0: Input should be greater"),
        ("name: wrong\nkind: chain\n", "kind = 'chain': choose one of PCFG, flat, static"),
    ],
)
def test_bad_grammar_files_are_refused_in_one_line(tmp_path, content, message):
    shutil.copy(GRAMMARS / "bound-static.yaml", tmp_path)
    if content is not None:
        (tmp_path / "wrong.yaml").write_text(content)
    with pytest.raises(ValueError) as error:
        load_corpus("wrong", tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_digest_is_of_what_is_drawn_and_not_of_how_the_file_is_written(tmp_path):
    def digest(name="bound", **fields):
        content = read_yaml(GRAMMARS / f"{name}.yaml") | fields
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return load_corpus(name, tmp_path).digest

    same = {"about": "Otherwise.", "kind": "flat", "label": "ours", "repetitions": 1}
    assert digest() == digest(**same) == load_corpus("bound").digest
    assert digest(binding=0.8) != digest() != digest(habits={"verb": "subject"})
    digest("bound-static")
    chain = digest("bound-order3", sample_tokens=1000)
    assert digest("bound-order3", sample_tokens=1000, label="ours") == chain
    digest("bound-static", binding=0.8)
    assert digest("bound-order3", sample_tokens=1000) != chain  # its parent says something else
