"""The look-up score tells a head that looks up from heads that know only roles, places or words."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from circuit_models import evenly, heads_that_attend
from latentree.data.corpus import held_out, load_corpus
from latentree.measure import lookup
from latentree.measure.lookup import look_ups, measure
from latentree.train.model import build_model

SEQUENCES, CONTEXT = 24, 96


@pytest.fixture(scope="module")
def shown():
    return look_ups(load_corpus("bound"), SEQUENCES, CONTEXT)


def hand_made(shown):
    """Five heads by name: what each attends to."""
    grammar = load_corpus("bound").grammar
    role, tokens = torch.as_tensor(grammar.role_of)[shown.tokens], shown.tokens
    earlier = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril()
    same = (tokens[:, :, None] == tokens[:, None]) & earlier.tril(-1)
    next_role = role.roll(-1, 1)[:, :, None] == role[:, None]
    place = torch.arange(CONTEXT)
    return {
        "look-up": shown.match,
        "induction": same.roll(1, 2) & earlier,
        "role bag": next_role & earlier,
        "position": (place[:, None] - place == 3).expand_as(same),
        "duplicate": same,
    }


@pytest.fixture(scope="module")
def scores(shown):
    """The table of a model whose five heads in one layer are the hand-made ones."""
    model = build_model("llama", 41, layers=1, width=20, heads=5, context=CONTEXT).eval()
    heads = torch.stack([evenly(keys) for keys in hand_made(shown).values()], 1)
    with heads_that_attend(heads):
        return measure(model, shown, rows=SEQUENCES)


def value(table, score, kind="all", column="value", **where):
    for name, wanted in {"score": score, "kind": kind, **where}.items():
        table = table[table[name] == wanted]
    return table[column].item()


def null(table, score, **where):
    return value(table, score, column="null", **where)


def test_the_score_is_one_for_look_up_and_low_for_all_fakes(shown, scores):
    chance = null(scores, "look-up", head=0, variant="head")
    by_head = {
        name: value(scores, "look-up", head=number, variant="head")
        for number, name in enumerate(hand_made(shown))
    }
    assert by_head["look-up"] == pytest.approx(1.0)
    assert by_head["induction"] > 3 * chance  # it finds those that directly follow their parent
    assert value(scores, "look-up", "verb to object", head=1, variant="head") > 0.4
    for fake in ("role bag", "position", "duplicate"):
        assert by_head[fake] < 0.25, by_head
    assert value(scores, "look-up", variant="best") == pytest.approx(1.0)


def test_decoys_tell_a_role_bag_from_a_look_up(shown, scores):
    paid = {
        name: value(scores, "decoys", head=number) for number, name in enumerate(hand_made(shown))
    }
    assert paid["look-up"] == 0.0
    assert paid["role bag"] == pytest.approx(1.0)  # it cannot tell them apart
    assert paid["induction"] < 0.25


def by_brute_force(grammar, fields):
    """Of each query of a sequence, from its derivation: (query, asked, match, decoy).

    `fields` are lists. asked is None, or the place of what is looked up and the child's role;
    match and decoy are the places that were in a pair with the same word, and with another.
    """
    pairs, length = set(), len(fields["tokens"])  # (place, place, role of the child)
    for at in range(length):
        place, shape = fields["place"][at], grammar.shapes[fields["shape"][at]]
        other = at - place + shape.binds_to[place]
        if shape.binds_to[place] >= 0 and 0 <= other < length:
            pairs |= {(at, other, shape.roles[place]), (other, at, shape.roles[place])}
    for query in range(length - 1):
        following, asked = query + 1, None
        for one, other, habit in pairs:
            if one == following and other <= query:
                asked = other, habit
        match, decoy = set(), set()
        for one, other, habit in pairs if asked else ():
            alike = all(fields[f][one] == fields[f][following] for f in ("document", "role"))
            if habit == asked[1] and alike and max(one, other) <= query:
                same = fields["tokens"][other] == fields["tokens"][asked[0]]
                (match if same else decoy).add(one)
        yield query, asked, match, decoy


def test_look_ups_are_what_the_grammar_binds(shown):
    """By brute force, from the derivations: pairs, and who was in a pair with the same word."""
    corpus = load_corpus("bound")
    rows = held_out(corpus, SEQUENCES, CONTEXT)
    kinds = ["subject to verb", "verb to object", "verb past subject to object", "verb to subject"]
    assert sorted(shown.kinds) == sorted(kinds)
    for sequence in range(3):
        fields = {name: rows[name][sequence].tolist() for name in rows}
        for query, asked, match, decoy in by_brute_force(corpus.grammar, fields):
            assert (shown.kind[sequence, query] >= 0) == (asked is not None)
            assert set(shown.match[sequence, query].nonzero()[:, 0].tolist()) == match
            assert set(shown.decoy[sequence, query].nonzero()[:, 0].tolist()) == decoy


def test_the_answer_stands_only_where_a_match_is_the_next_word(shown):
    sequence, query = shown.stands.nonzero().T
    for s, q in zip(sequence.tolist()[:50], query.tolist()):
        assert shown.tokens[s, q + 1] in shown.tokens[s][shown.match[s, q]]
    matched = shown.match.any(2)
    assert 0.6 < shown.stands.sum() / matched.sum() < 0.95  # binding .9 twice, and chance


def test_losses_are_those_of_the_queries_of_each_kind_and_case():
    """By brute force: every query's loss, by what is looked up there and whether it stands."""
    corpus, sequences, context = load_corpus("bound"), 6, 64
    rows, shown = held_out(corpus, sequences, context), look_ups(corpus, sequences, context)
    config = {"width": 8, "heads": 2, "context": context, "initializer_range": 1.0}
    model = build_model("llama", corpus.vocabulary_size, layers=1, **config).eval()
    with torch.no_grad():
        losses = -model(input_ids=rows["tokens"]).logits.double().log_softmax(-1)
    expected, roles = defaultdict(list), corpus.grammar.roles
    for sequence in range(sequences):
        fields = {name: rows[name][sequence].tolist() for name in rows}
        for query, asked, match, _ in by_brute_force(corpus.grammar, fields):
            if asked is None:
                continue
            first, *past, last = (roles[r] for r in fields["role"][asked[0] : query + 2])
            kind = f"{first}{''.join(f' past {role}' for role in past)} to {last}"
            word = fields["tokens"][query + 1]
            cases = ["matched" if match else "unmatched"]
            cases += ["stands"] * (word in [fields["tokens"][key] for key in match])
            for key in [(of, case) for of in (kind, "all") for case in cases]:
                expected[key].append(float(losses[sequence, query, word]))
    found = measure(model, shown, rows=4).query("score == 'loss' and queries > 0")
    found = found.set_index(["kind", "variant"])
    assert set(found.index) == set(expected) and len(expected) >= 12
    for key, those in expected.items():
        assert found.queries[key] == len(those)
        assert found.value[key] == pytest.approx(np.mean(those), abs=1e-5), key
    assert found.value["all"].max() - found.value["all"].min() > 0.05  # no case is another


def test_a_role_bag_head_is_one_where_it_should_be(shown, scores):
    names = list(hand_made(shown))

    def beyond_places(name):
        head = {"head": names.index(name), "variant": "head"}
        own = value(scores, "role bag", **head)
        return own, own - null(scores, "role bag", **head)

    own, beyond = beyond_places("role bag")
    assert own > 0.85 and beyond > 0.3  # documents end in between
    # Three words back is the same role in many a sentence: its places give a position-only head away.
    own, beyond = beyond_places("position")
    assert own > 0.6 and abs(beyond) < 0.05


def test_the_null_of_a_perfect_head_is_low(shown, scores):
    """It sees what others of its sequence show, so another sequence's targets are nothing to it."""
    assert null(scores, "look-up", head=0, variant="head") < 0.15
    assert null(scores, "look-up", variant="best") < 0.15


def test_a_corpus_without_habits_has_a_role_bag_only():
    shown = look_ups(load_corpus("released-small"), 4, 64)
    model = build_model("llama", 401, layers=1, width=8, heads=2, context=64).eval()
    table = measure(model, shown)
    assert not shown.kinds and set(table.score) == {"role bag"}
    best = value(table, "role bag", variant="best")
    assert best == pytest.approx(null(table, "role bag", variant="best"), abs=0.02)


def test_a_chain_is_read_by_the_grammar_whose_words_it_has():
    grammar = load_corpus("bound").grammar
    shown = look_ups(load_corpus("bound-order3"), 4, 64, grammar)
    assert shown.kinds == ["subject to verb", "verb to object"]
    role = torch.as_tensor(grammar.role_of)[shown.tokens]
    sequence, query = (shown.kind == 1).nonzero().T
    roles = list(grammar.roles)
    assert (role[sequence, query] == roles.index("verb")).all()
    assert (role[sequence, query + 1] == roles.index("object")).all()


def test_the_scores_of_keys_are_those_of_a_head_with_this_attention(shown, scores):
    for number, (name, keys) in enumerate(hand_made(shown).items()):
        found = lookup.of_keys(keys, shown)
        measured = value(scores, "look-up", head=number, variant="head")
        assert found["look-up"] == pytest.approx(measured, abs=0.03), name
        if name in ("role bag", "position"):  # the others rest on the first token at times
            measured = value(scores, "role bag", head=number, variant="head")
            assert found["role bag"] == pytest.approx(measured, abs=0.03), name
        if name != "duplicate":  # whose ratio is of nothing
            assert found["decoys"] == pytest.approx(value(scores, "decoys", head=number), abs=0.05)
    reach = lookup.perfect(shown)
    assert reach["look-up"] == pytest.approx(
        1 - null(scores, "look-up", head=0, variant="head"), abs=0.03
    )
    assert 0.2 < reach["role bag"] < 0.6


# ---------------------------------------------------------------------- the rule of notebook 03

# The cells that judge, by what stands in each, in order.
RULE = [
    'profile: str = "laptop"',
    "from latentree.measure import induction, lookup",
    'best = pick(runs, kind="all"',
    "best = best.assign(null=",
    "curves = over_seeds(best, keys)",
    "in lookup.perfect(marks).items()",
    "shares = {end: (last[end] - last.null)",
    'ends = over_seeds(last.assign(**shares), keys, "t")',
    "claim, claims = partial(Claim",
    "def judge(",
]


@pytest.fixture(scope="module")
def judged(shown, scores):
    """The names of notebook 03 after its cells have judged models of one hand-made head each.

    A head is its model's best; before training, at step 0, it attends evenly to all it sees.
    """
    cells = nbformat.read(Path("notebooks/03_induction_heads.ipynb"), 4).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    with heads_that_attend(evenly(torch.ones(SEQUENCES, 1, CONTEXT, CONTEXT).tril())):
        model = build_model("llama", 41, layers=1, width=4, heads=1, context=CONTEXT).eval()
        before = measure(model, shown, rows=SEQUENCES).query("variant == 'best'").assign(step=0)
    runs, heads = [], list(hand_made(shown))
    for number, name in enumerate(heads):
        head = scores[(scores["head"] == number) & (scores.variant == "head")]
        both = pd.concat([before, head.assign(variant="best", step=1)], ignore_index=True)
        runs.append(both.assign(corpus=name, tokens=both.step, seed=0))
    corpus, work = load_corpus("bound"), SimpleNamespace(save=lambda table, name: None)
    given = {"runs": pd.concat(runs), "shown": dict.fromkeys(heads, shown), "work": work}
    given |= {"corpus_of": dict.fromkeys(heads, corpus), "series_of": dict.fromkeys(heads, [0])}
    names = {}
    for part in RULE:
        (source,) = [source for source in sources if part in source]
        exec(source, names)
        names |= given | {"seeds": [0], "sequences": SEQUENCES}
    return names


def test_the_rule_of_notebook_03_passes_the_real_heads_and_fails_the_fakes(judged):
    judge, verdicts = judged["judge"], {}
    for name in judged["shown"]:
        for present in (True, False):
            judged["claims"].clear()
            judge("lookup-present", "look-up", "look-up")  # an absence asks for it first
            judge("of a head", "look-up", name, "control", present)
            verdicts[name, present] = judged["claims"][-1].verdict
    for name in ("look-up", "induction"):
        assert verdicts[name, True] == "as predicted", verdicts
        assert verdicts[name, False] == "contradicted", verdicts
    for name in ("role bag", "position", "duplicate"):
        assert verdicts[name, True] == "contradicted", verdicts
        assert verdicts[name, False] == "as predicted", verdicts
    share = judged["ends"].value
    assert share["look-up", "look-up"] > 0.95 and 0.4 < share["look-up", "induction"] < 0.6


def test_the_same_rule_for_the_role_bag_passes_it_alone_of_heads_that_look_nothing_up(judged):
    low, high = judged["ends"].low["role bag"], judged["ends"].high["role bag"]
    assert low["role bag"] > 0.95
    assert max(high["position"], high["duplicate"]) < judged["margin"]
