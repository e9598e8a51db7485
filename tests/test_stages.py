"""Legal mass, levels and the ideal reader against enumeration; as oracles, exact predictors recover what they know."""

from dataclasses import replace
from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch
from grammars import RECURSIVE, make, random_grammar, sentence_grammars
from hypothesis import given, settings
from latentree.data.corpus import HELD_OUT, held_out, load_corpus
from latentree.data.sampler import GrammarProcess
from latentree.evidence.curves import Curve, sequence_sums
from latentree.exact.parser import PrefixParser
from latentree.exact.predictors import counts_losses, predictive, role_losses, token_losses
from latentree.exact.reader import reader_losses
from latentree.measure.legal import followers, legal_mass, masses, next_roles, role_mass
from latentree.measure.stages import (
    exact_predictors,
    known_to,
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


def shares(own, exact):
    """Values of `level_curves` of one checkpoint whose parts of the loss are `own`."""
    losses = {
        level: Curve(np.array([1]), part.nansum(1, keepdim=True).numpy(), np.ones((len(part), 1)))
        for level, part in own.items()
    }
    return {level: curve.table().loc[0] for level, curve in level_curves(losses, exact).items()}


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
        ended = rows["tokens"][row, column] == grammar.end
        prefix = (
            ()
            if ended
            else tuple(grammar.roles[r] for r in rows["role"][row, begin : column + 1].tolist())
        )
        assert prefix_of.setdefault(int(state[row, column]), prefix) == prefix
    for number, prefix in prefix_of.items():
        roles = {
            shape.roles[len(prefix)]
            for shape in grammar.shapes
            if shape.roles[: len(prefix)] == prefix
        }
        allowed = {
            token for role in roles for token in grammar.words[grammar.roles.index(role)].tolist()
        }
        assert set(legal[number].nonzero()[:, 0].tolist()) == allowed
        last, _, following = names[number].partition(" > ")
        assert last == (prefix or ("end",))[-1] and set(following.split("|")) == roles
    pairs = {}
    for shape in grammar.shapes:
        for pair in zip(shape.roles, shape.roles[1:]):
            pairs[pair] = pairs.get(pair, 0) + shape.probability
    table = followers(grammar)
    for a, b in product(table.index, table.columns):
        assert table[b][a] == pytest.approx(
            pairs.get((a, b), 0) / sum(p for (x, _), p in pairs.items() if x == a)
        )


@pytest.mark.parametrize(
    "fields", [{}, {"sentence": RECURSIVE}, {"shared": 0.5}, {"sentence": RECURSIVE, "shared": 0.5}]
)
def test_the_exact_predictors_mass_is_all_legal(fields):
    grammar = make(**fields)
    tokens = held_out(GrammarProcess(grammar), 6, 20)["tokens"]
    state, names, legal = next_roles(grammar, tokens)
    parser, p = (
        PrefixParser(grammar),
        torch.zeros(6, 20, grammar.vocabulary_size, dtype=torch.float64),
    )
    for row in range(6):
        begin = 0
        for at in range(20):
            begin = at + 1 if tokens[row, at] == grammar.end else begin
            p[row, at] = torch.tensor(parser.next_tokens(tokens[row, begin : at + 1].tolist()))
    mass = legal_mass(p.log(), state, legal)
    assert torch.allclose(mass, torch.ones_like(mass))
    uniform = torch.full_like(p, 1 / p.shape[-1]).log()
    assert torch.allclose(legal_mass(uniform, state, legal), (p > 0).double().mean(-1))


def test_released_values():
    process = load_corpus("released-small")
    table = followers(process.grammar)
    assert table["verb"]["subject"] == pytest.approx(2 / 3) and table["object"][
        "verb"
    ] == pytest.approx(2 / 3)
    assert table["subject"]["connector"] == pytest.approx(1)
    rows, exact = exact_predictors(process, 64, 64)
    mass = role_mass(process.grammar, exact["syntax"], rows["tokens"][:, :-1], "subject", "verb")
    assert 0.6 < mass.nanmean() < 0.73
    state, names, legal = next_roles(process.grammar, rows["tokens"][:, :-1])
    means = sequence_sums(mass, state, names).groupby("name")[["sum", "count"]].sum()
    means = means["sum"] / means["count"]
    assert means["subject > verb"] == pytest.approx(1) and means[
        "subject > object"
    ] == pytest.approx(0, abs=1e-12)
    for p in (exact["syntax"], exact["habits"]):
        assert legal_mass(p, state, legal).min() > 1 - 1e-9
    grammar = make(RECURSIVE)
    documents = GrammarProcess(grammar).documents(range(600))
    role, place = documents.token["role"], documents.token["place"]
    nouns = (role[:-1] == 0) & (place[1:] > 0)
    assert (
        abs(float((role[1:][nouns] == 1).double().mean()) - followers(grammar)["verb"]["noun"])
        < 0.03
    )


# ---------------------------------------------------------------------- levels


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
        assert stays / total == pytest.approx(
            kept + (1 - kept) / n
        ) and moves / total == pytest.approx((1 - kept) / n)


def test_predictors_that_know_a_level_equal_enumeration():
    """A word is anything with a chance, so ranks are enumerated: the hidden rank, its noisy token, the habit's noisy use."""
    grammar = make(INVERTED, roles=SMALL, **SECTIONS | {"habits": {"verb": "noun", "and": "verb"}})
    process = GrammarProcess(grammar, 3)
    documents = process.documents(HELD_OUT + torch.arange(2))
    above, trust = known_to(process, documents, "document")
    assert trust["verb"] == [pytest.approx((3 - 2) / 2), pytest.approx(1 - 1 / 2)] and trust[
        "end"
    ] == [1, 1]
    assert len(above.maps["noun"]) == 2 and len(documents.maps["noun"]) == 6
    found, prefix = predictive(grammar, above, trust=trust), ()
    places, units = documents.token["place"].tolist(), above.token["unit"].tolist()
    for at, (token, place, unit) in enumerate(zip(documents.tokens.tolist(), places, units)):
        prefix = prefix if place else ()
        mass = np.zeros(grammar.vocabulary_size)
        for shape in grammar.shapes:
            numbers = [grammar.roles.index(role) for role in shape.roles]
            for ranks in product(*(range(grammar.sizes[r]) for r in numbers)):
                p, emit = shape.probability, []
                for i, (r, rank) in enumerate(zip(numbers, ranks)):
                    role, n = grammar.roles[r], grammar.sizes[r]
                    parent, binding = shape.binds_to[i], 0.8 * trust[role][1]
                    fresh = grammar.frequencies[r][rank]
                    if parent >= 0:
                        called = int(above.habits[role][unit, ranks[parent]])
                        fresh = (1 - binding) * fresh + binding * (called == rank)
                    p *= fresh
                    row = np.zeros(grammar.vocabulary_size)
                    row[above.maps[role][unit % len(above.maps[role])]] = (1 - trust[role][0]) / n
                    row[int(above.maps[role][unit % len(above.maps[role]), rank])] += trust[role][0]
                    emit.append(row)
                if len(emit) > len(prefix):
                    mass += (
                        p
                        * np.prod([row[word] for row, word in zip(emit, prefix)])
                        * emit[len(prefix)]
                    )
        assert np.allclose(found[at], mass / mass.sum(), atol=1e-12)
        prefix = (*prefix, token)


def test_levels_are_ordered_and_what_knows_all_or_nothing_of_them_is_known():
    roles = {"noun": {"size": 8, "zipf": 1.0}, "verb": {"size": 8, "zipf": 0.7}, "and": {"size": 2}}
    process = GrammarProcess(make(**SECTIONS | {"roles": roles}))
    rows, exact = exact_predictors(process, 200, 40)
    assert list(exact) == ["uniform", "frequencies", "syntax", "maps", "habits", "section"]
    losses = {name: -p.gather(-1, rows["tokens"][:, 1:, None]).mean() for name, p in exact.items()}
    assert sorted(losses, key=losses.get, reverse=True) == list(exact)
    for p in exact.values():
        assert torch.allclose(p.exp().sum(-1), torch.ones(1, dtype=torch.float64))
    documents = process.documents(HELD_OUT + torch.arange(4))
    same, trust = known_to(process, documents, "section")  # the deepest level: nothing is lost
    assert all(torch.equal(same.maps[role], documents.maps[role]) for role in same.maps)
    assert torch.equal(same.habits["verb"], documents.habits["verb"]) and set(
        map(tuple, trust.values())
    ) == {(1.0, 1.0)}
    assert torch.allclose(
        token_losses(process.grammar, same),
        -predictive(process.grammar, same, trust=trust, log_token=True),
    )
    changed = (rows["called"] != rows["called_above"])[rows["called"] >= 0].float().mean()
    assert (
        0.5 < changed < 0.9
    )  # noun in place, habit kept, verb in place: each of three may be lost


def test_shares_are_one_for_what_a_predictor_knows_and_nought_for_what_it_does_not():
    process = GrammarProcess(make(**SECTIONS))
    rows, exact = exact_predictors(process, 300, 40)
    grammar, names = process.grammar, list(exact)
    parts = {name: loss_parts(grammar, p, rows) for name, p in exact.items()}
    for known, name in enumerate(names):
        found = shares(parts[name], parts)
        assert list(found) == names[1:] == list(parts[name])
        for number, level in enumerate(found, 1):
            if number in (known, known + 1):
                assert found[level].value == pytest.approx(float(number <= known), abs=1e-9)
            assert found[level].low - 1e-12 <= found[level].value <= found[level].high + 1e-12
    for name in (
        "syntax",
        "maps",
    ):  # the document's latents mislead where the section redrew: that is left out
        assert abs(shares(parts[name], parts)["section"].value) < 0.1
    loss, free = (
        -exact["habits"].gather(-1, rows["tokens"][:, 1:, None])[..., 0],
        rows["free"][:, 1:],
    )
    whole = sum(parts["habits"][name] for name in ("frequencies", "syntax", "maps"))
    assert torch.allclose(loss[free], whole[free]) and whole[~free].isnan().all()
    bound = rows["called"][:, 1:] >= 0
    told = ~parts["habits"]["habits"].isnan() | ~parts["habits"]["section"].isnan()
    assert torch.equal(
        told,
        bound
        & ~((rows["called"] != rows["called_above"]) & (rows["tokens"] == rows["called_above"]))[
            :, 1:
        ],
    )
    assert not (bound & free).any()


def test_levels_are_told_apart_in_whatever_order_they_are_learned():
    """A predictor that knows habits and maps, but of the syntax only how frequent roles are; and one the other way round."""
    process = GrammarProcess(make(binding=0.8, habits={"verb": "noun"}))
    rows, exact = exact_predictors(process, 300, 40)
    grammar, parts = (
        process.grammar,
        {name: loss_parts(process.grammar, p, rows) for name, p in exact.items()},
    )
    no_syntax = torch.zeros_like(exact["habits"])
    for share, words in zip(grammar.role_frequencies, grammar.words):
        p = exact["habits"][..., words].exp()
        within = torch.where(
            p.sum(-1, keepdim=True) > 0, p / p.sum(-1, keepdim=True), 1 / len(words)
        )
        no_syntax[..., words] = share * within
    found = shares(loss_parts(grammar, no_syntax.log(), rows), parts)
    assert abs(found["syntax"].value) < 0.01 and found["maps"].value == pytest.approx(1, abs=0.03)
    assert found["habits"].value == pytest.approx(1, abs=1e-9)
    found = shares(parts["syntax"], parts)
    assert (
        found["syntax"].value == 1 and found["maps"].value == 0 and abs(found["habits"].value) < 0.1
    )


def test_what_has_nothing_to_tell_is_left_out():
    rows, exact = exact_predictors(process := GrammarProcess(make()), 20, 20)
    parts = {name: loss_parts(process.grammar, p, rows) for name, p in exact.items()}
    found = shares(parts["maps"], parts)
    assert "habits" not in found and found["maps"].value == pytest.approx(1)
    for fields in ({"shared": 0.5}, {"sentence": RECURSIVE}, {"redraw": {}}):
        with pytest.raises(ValueError, match="apart"):
            exact_predictors(GrammarProcess(make(**fields)), 2, 8)


def test_tables_of_a_model_are_its_masses_and_losses():
    process = GrammarProcess(make(**SECTIONS))
    rows, _ = exact_predictors(process, 6, 24)
    model = build_model("llama", process.vocabulary_size, 1, 16, 2, 24).eval()
    log_p = log_probabilities(model, rows["tokens"], rows=4)
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(6, 24)) and not log_p.requires_grad
    losses = losses_by_level(model, process.grammar, rows)
    for level, part in loss_parts(process.grammar, log_p[:, :-1], rows).items():
        here = losses[losses["level"] == level]
        assert (
            here["sum"].to_numpy() == pytest.approx(part.nansum(1).numpy())
            and list(here["count"]) == (~part.isnan()).sum(1).tolist()
        )
    table = (
        masses(model, process.grammar, rows["tokens"])
        .groupby(["quantity", "name"])[["sum", "count"]]
        .sum()
    )
    legal = table.loc["legal"].drop("all")
    assert legal["count"].sum() == table.loc["legal", "all"]["count"] == 6 * 24
    assert legal["sum"].sum() == pytest.approx(table.loc["legal", "all"]["sum"], rel=1e-5)
    assert set(table.loc["role"].index) == {
        "noun > verb",
        "noun > end",
        "verb > noun",
        "verb > and",
        "verb > end",
        "and > noun",
    }


# ---------------------------------------------------------------------- ideal reader


def windows_with_role_losses(process, sequences, context):
    return held_out(
        process,
        sequences,
        context,
        annotate=lambda d: {"role_loss": role_losses(process.grammar, d)},
    )


HABITS = [
    (0.0, {}),
    (0.7, {"verb": "noun"}),
    (0.7, {"verb": "noun", "and": "verb"}),
    (0.9, {"noun": "verb"}),
]


@pytest.mark.parametrize("binding, habits", HABITS)
def test_the_reader_equals_enumeration_of_all_latents(binding, habits):
    roles = SMALL if len(habits) < 2 else SMALL | {"verb": {"size": 2, "zipf": 1.0}}
    grammar = make(INVERTED, roles=roles, binding=binding, habits=habits)
    process = GrammarProcess(grammar, 5)
    rows = windows_with_role_losses(process, 3, 12)
    found = reader_losses(process, rows, rows["role_loss"])
    names, laws = grammar.roles[:-1], dict(zip(grammar.roles, grammar.frequencies))
    maps = list(product(*(permutations(grammar.words[r].tolist()) for r in range(3))))
    parents = {child: len(laws[parent]) for child, parent in habits.items()}
    drawn = list(
        product(*(product(range(len(laws[child])), repeat=n) for child, n in parents.items()))
    )
    chance = [
        np.prod([laws[child][list(h)].prod() for child, h in zip(parents, habit)])
        for habit in drawn
    ]
    prior = np.tile(chance, len(maps)) / len(maps)
    documents = process.documents(HELD_OUT + torch.arange(6))
    tables = {
        role: torch.tensor([m[i] for m in maps for _ in drawn]) for i, role in enumerate(names)
    }
    tables["end"] = documents.maps["end"][:1]
    called = {
        child: torch.tensor([h[i] for _ in maps for h in drawn]) for i, child in enumerate(parents)
    }
    for row in range(3):
        known, unit = prior, None
        for at in range(12):
            if rows["unit"][row, at] != unit:
                unit, known = rows["unit"][row, at], prior
                here = documents.token["document"] == unit
                fields = {
                    name: value[here].repeat(len(prior)) for name, value in documents.token.items()
                }
                fields["unit"] = torch.arange(len(prior)).repeat_interleave(int(here.sum()))
                losses = token_losses(
                    grammar, replace(documents, token=fields, maps=tables, habits=called)
                )
                p = losses.neg().exp().nan_to_num(0.0).view(len(prior), -1).numpy()
            now = p[:, int(rows["position"][row, at])]
            assert found[row, at] == pytest.approx(
                -np.log((known * now).sum() / known.sum()), abs=1e-9
            )
            known = known * now


def test_the_reader_by_sampled_maps_comes_close_and_none_does_better():
    process = load_corpus("bound")
    rows = windows_with_role_losses(process, 24, 96)
    found = [
        reader_losses(process, rows, rows["role_loss"], maps=512, seed=seed) for seed in (0, 1)
    ]
    assert abs((found[0] - found[1]).mean()) < 0.002 and (found[0] - found[1]).abs().max() < 0.3
    counts = counts_losses(rows, process.grammar.sizes, (1.0, 20.0), rows["role_loss"])
    documents = held_out(
        process, 24, 96, annotate=lambda d: {"aware": token_losses(process.grammar, d)}
    )
    assert documents["aware"].mean() < found[0].mean() < counts.mean() - 0.05
    forgets = reader_losses(
        process, rows | {"unit": (rows["place"] == 0).cumsum(1)}, rows["role_loss"], maps=128
    )
    assert forgets.mean() > found[0].mean() + 0.1 and torch.allclose(forgets[:, 0], found[0][:, 0])


@pytest.mark.parametrize(
    "fields",
    [{"redraw": {"document": 0.5}}, {"redraw": {"document": 1.0, "section": 0.3}}, {"shared": 0.5}],
)
def test_latents_that_the_reader_does_not_know_are_refused(fields):
    process = GrammarProcess(make(**fields))
    with pytest.raises(ValueError, match="choose such a grammar"):
        reader_losses(process, {}, torch.zeros(1, 1))
