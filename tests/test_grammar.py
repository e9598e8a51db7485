"""Exact quantities of sentence grammars against nltk and against enumeration."""

import itertools
import shutil

import nltk
import numpy as np
import pytest
import yaml
from grammars import CLAUSES, RECURSIVE, ROLES, make, random_grammar, sentence_grammars
from hypothesis import given, settings
from latentree.data.corpus import load_corpus
from latentree.data.files import read_yaml
from latentree.data.grammar import Grammar
from latentree.exact.parser import PrefixParser

SHIPPED = [
    "bound",
    "bound-flat",
    "bound-static",
    "released",
    "released-flat",
    "released-static",
    "released-small",
    "released-small-flat",
    "released-small-static",
]


def strings(grammar):
    """Probability of every role string of a finite grammar."""
    table = {}
    for shape in grammar.shapes:
        table[shape.roles] = table.get(shape.roles, 0) + shape.probability
    return table


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_grammars_have_the_release_sentences(name):
    grammar = load_corpus(name).grammar
    assert grammar.mean_length == pytest.approx(6)
    assert [round(s.probability, 5) for s in grammar.shapes] == [0.5, 0.16667, 0.16667, 0.16667]
    assert PrefixParser(grammar).next_roles(("subject",))[grammar.roles.index("verb")] == 1


def test_released_is_the_released_process():
    grammar = load_corpus("released").grammar
    assert grammar.vocabulary_size == 1001 and grammar.end == 1000
    starts = {role: (words[0], words[-1]) for role, words in zip(grammar.roles, grammar.words)}
    assert starts == {
        "subject": (0, 299),
        "verb": (300, 599),
        "object": (600, 899),
        "connector": (900, 999),
        "end": (1000, 1000),
    }
    assert grammar.mean_document_length == pytest.approx(96)
    assert (
        grammar.file.repetitions == 10
        and grammar.file.redraw == {"document": 1.0}
        and grammar.file.binding == 0
    )


def test_probability_that_a_verb_follows_a_subject_word_is_two_thirds():
    """An SVO subject is followed by a verb, a VSO subject by an object: 1 clause against 1/2 per sentence."""
    grammar = load_corpus("released").grammar
    follows = {"verb": 0.0, "object": 0.0}
    for shape in grammar.shapes:
        for here, following in itertools.pairwise(shape.roles):
            if here == "subject":
                follows[following] += shape.probability
    assert follows["verb"] / sum(follows.values()) == pytest.approx(2 / 3)


def test_recursive_grammar_moments_match_its_length_distribution():
    grammar = make(RECURSIVE)
    lengths = grammar.length_distribution(600)
    n = np.arange(601)
    mean, variance = grammar.length_moments()
    assert lengths.sum() == pytest.approx(1, abs=1e-9)
    assert (lengths * n).sum() == pytest.approx(mean, abs=1e-6)
    assert (lengths * n**2).sum() - mean**2 == pytest.approx(variance, rel=1e-6)
    assert grammar.shapes is None and grammar.mean_length == pytest.approx(mean)


@pytest.mark.parametrize("chance", [0.5, 0.7])
def test_infinite_expected_length_is_refused_with_the_reason(chance):
    with pytest.raises(
        ValueError, match="expected sentence length is infinite: Sentence yields on average"
    ) as error:
        make(f"Sentence -> 'noun' 'verb' 'and' [{1 - chance}] | Sentence Sentence [{chance}]")
    assert "lower its recursive productions" in str(error.value)


def test_legal_roles_match_the_earley_chart_of_nltk():
    for sentence in (CLAUSES, RECURSIVE):
        grammar, plain = (
            make(sentence),
            nltk.CFG.fromstring("ROOT -> Sentence 'end'\n" + nltk_without_probabilities(sentence)),
        )
        parser, chart_parser = PrefixParser(grammar), nltk.EarleyChartParser(plain)
        checked = 0
        for length in range(6):
            for prefix in itertools.product(("noun", "verb", "and"), repeat=length):
                legal = set()
                for role in (
                    "noun",
                    "verb",
                    "and",
                    "end",
                ):  # the chart grows beyond a role if and only if it is legal
                    chart = chart_parser.chart_parse([*prefix, role])
                    if any(edge.end() == length + 1 and edge.rhs() for edge in chart.edges()):
                        legal.add(role)
                assert parser.legal_roles(prefix) == legal, prefix
                checked += bool(legal)
        assert checked > 5


def nltk_without_probabilities(sentence):
    return "\n".join(
        str(rule).split(" [")[0] for rule in nltk.PCFG.fromstring(sentence).productions()
    ).replace('"', "'")


def test_prefix_probabilities_of_a_recursive_grammar_match_the_inside_probabilities_of_nltk():
    grammar = make(RECURSIVE)
    parser = PrefixParser(grammar)
    # nltk's inside parser cannot take the loop Group -> Group, so its probability is folded into the others.
    folded = nltk.PCFG.fromstring(
        "Sentence -> Group Action [1.0]\nGroup -> 'noun' [0.66666666] | Group 'and' Group [0.33333334]\n"
        "Action -> 'verb' [0.7] | 'verb' Group [0.3]"
    )
    inside = nltk.parse.pchart.InsideChartParser(folded)
    for words in (
        ["noun", "verb"],
        ["noun", "and", "noun", "verb"],
        ["noun", "verb", "noun", "and", "noun", "and", "noun"],
    ):
        total = sum(tree.prob() for tree in inside.parse(words))
        assert parser.probability((*words, "end")) == pytest.approx(total, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(sentence_grammars())
def test_random_grammars_agree_with_their_enumeration(sentence):
    try:
        grammar = random_grammar(sentence, 0.0, {"document": 1.0})
    except ValueError as error:
        assert "appears in no production" in str(error)
        return
    table = strings(grammar)
    assert sum(table.values()) == pytest.approx(1)
    lengths = np.zeros(32)
    counts = np.zeros(len(grammar.roles))
    for roles, p in table.items():
        lengths[len(roles)] += p
        counts += p * np.array([roles.count(role) for role in grammar.roles])
    assert np.allclose(grammar.length_distribution(31), lengths)
    assert np.allclose(grammar.role_counts, counts)
    mean, variance = grammar.length_moments()
    assert mean == pytest.approx((lengths * np.arange(32)).sum())
    assert variance == pytest.approx((lengths * np.arange(32) ** 2).sum() - mean**2)
    parser = PrefixParser(grammar)
    for roles in list(table)[:5]:
        for cut in range(len(roles)):
            prefix = roles[:cut]
            mass = np.zeros(len(grammar.roles))
            for other, p in table.items():
                if other[:cut] == prefix and len(other) > cut:
                    mass[grammar.roles.index(other[cut])] += p
            assert np.allclose(parser.next_roles(prefix), mass / mass.sum())
            assert parser.probability(prefix) == pytest.approx(mass.sum())


def test_shared_tokens_serve_several_roles():
    grammar = make(shared=0.5)
    nouns, verbs = set(grammar.words[0].tolist()), set(grammar.words[1].tolist())
    assert len(nouns & verbs) == 2 and len(nouns) == 5 and len(verbs) == 4
    assert grammar.vocabulary_size == 5 + 4 - 2 + 2 + 1
    assert grammar.end == grammar.vocabulary_size - 1


def test_a_token_that_could_serve_two_roles_leaves_both_paths_open():
    parser = PrefixParser(make(shared=0.5))
    ambiguous = (("noun", 1 / 5), ("verb", 1 / 4))
    p = dict(zip(parser.roles, parser.next_roles((ambiguous,))))
    noun, verb = 0.7 / 5, 0.3 / 4
    assert p["verb"] == pytest.approx(noun / (noun + verb)) and p["noun"] == pytest.approx(
        verb / (noun + verb)
    )


BAD = {
    "no productions": ({"sentence": "just words"}, "sentence is not a PCFG"),
    "probabilities": ({"sentence": "Sentence -> 'noun' [0.5] | 'verb' [0.2]"}, "do not sum to 1"),
    "unknown role": ({"sentence": "Sentence -> 'nuon' [1.0]"}, "uses role 'nuon'; roles: noun"),
    "undefined symbol": (
        {"sentence": "Sentence -> Clause [1.0]"},
        "Clause, which has no production",
    ),
    "empty production": (
        {"sentence": "Sentence -> 'noun' 'verb' 'and' A [1.0]\nA -> [1.0]"},
        "is empty",
    ),
    "zero probability": (
        {"sentence": "Sentence -> 'noun' 'verb' 'and' [1.0] | 'noun' [0.0]"},
        "probability 0; remove it",
    ),
    "unreachable": ({"sentence": CLAUSES + "Lost -> 'noun' [1.0]"}, "Lost is never reached"),
    "unused role": (
        {"roles": ROLES | {"idle": {"size": 3}}},
        "role 'idle' appears in no production",
    ),
    "end role": ({"roles": ROLES | {"end": {"size": 1}}}, "role 'end' is added"),
    "unknown field": ({"reptitions": 3}, "reptitions, got 3: remove it"),
    "missing field": ({"about": None}, "about, got None"),
    "size zero": ({"roles": ROLES | {"and": {"size": 0}}}, "roles.and.size, got 0"),
    "negative exponent": (
        {"roles": ROLES | {"and": {"size": 2, "zipf": -1.0}}},
        "roles.and.zipf, got -1.0",
    ),
    "size as text": ({"roles": ROLES | {"and": {"size": "two"}}}, "roles.and.size, got 'two'"),
    "redraw level": (
        {"redraw": {"chapter": 1.0}},
        "redraw level 'chapter' is unknown; levels: corpus",
    ),
    "redraw share": ({"redraw": {"document": 1.5}}, "redraw.document is 1.5"),
    "binding without habits": ({"binding": 0.5}, "no habits say who follows whom"),
    "binding above one": ({"binding": 1.5, "habits": {"verb": "noun"}}, "binding, got 1.5"),
    "habit of unknown role": ({"habits": {"verb": "nuon"}}, "habits name role 'nuon'"),
    "habits in a circle": ({"habits": {"verb": "noun", "noun": "verb"}}, "lead back to"),
    "habit of itself": ({"habits": {"verb": "verb"}}, "lead back to 'verb'"),
    "shared all": ({"shared": 1.0}, "shared, got 1.0"),
    "shared nobody": ({"shared": 0.01}, "no token can serve two roles"),
    "repetitions zero": ({"repetitions": 0}, "repetitions, got 0"),
    "empty document": (
        {"document": {"sections": 0, "paragraphs": 1, "sentences": 1}},
        "document.sections, got 0",
    ),
}


@pytest.mark.parametrize("fields, message", BAD.values(), ids=BAD)
def test_bad_grammars_are_refused_in_one_line(fields, message):
    with pytest.raises(ValueError) as error:
        make(**fields)
    text = str(error.value)
    assert message in text and "\n" not in text and text.startswith("grammar tiny")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "corpora there: bound-static"),
        ("name: other\n", "name is 'other'"),
        ("name: wrong\nkind: n-gram\nparent: bound-static\nordre: 3\n", "ordre, got 3: remove it"),
    ],
)
def test_bad_grammar_files_are_refused_in_one_line(tmp_path, content, message):
    shutil.copy("params/grammars/bound-static.yaml", tmp_path)
    if content is not None:
        (tmp_path / "wrong.yaml").write_text(content)
    with pytest.raises(ValueError) as error:
        load_corpus("wrong", tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_digest_is_of_what_is_drawn_and_not_of_how_the_file_is_written(tmp_path):
    def digest(name="bound", **fields):
        content = read_yaml(f"params/grammars/{name}.yaml") | fields
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


def test_grammar_without_a_name():
    with pytest.raises(ValueError, match="name"):
        Grammar({"about": "x"})
