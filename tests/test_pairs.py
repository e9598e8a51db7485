"""Readers of pairs: against brute force, against the ideal reader of any grammar, and on fakes."""

from itertools import product

import numpy as np
import pytest
import torch
from latentree.data.corpus import held_out, load_corpus
from latentree.data.lifetimes import Lifetimes
from latentree.data.ngrams import Successors
from latentree.exact import ceilings, pairs
from latentree.exact.predictors import role_losses, token_losses
from latentree.exact.reader import reader_losses
from latentree.measure.lookup import look_ups, of_keys

ONE = {"sections": 1, "paragraphs": 1}


def lasting(sentences, **fields):
    return load_corpus("called").changed(document=ONE | {"sentences": sentences}, **fields)


def crossed():
    return Lifetimes(lasting(6).grammar, {"verb": [2, 4], "object": [3, 3]})


def nested():
    return Lifetimes(lasting(6).grammar, {"verb": [3, 3], "object": [1, 2, 3]})


def inheriting(redrawn=0.25, sentences=32):
    """Two halves of a document, of two parts each, which draw a share of the habits anew."""
    lives = dict.fromkeys(("verb", "object"), [sentences])
    parts = [[sentences // 2] * 2, [sentences // 4] * 4]
    return Lifetimes(lasting(sentences).grammar, lives, parts=parts, redrawn=redrawn)


def test_the_ideal_reader_is_that_of_any_grammar_at_every_token():
    corpus, context = lasting(8), 64
    shown = look_ups(corpus, 6, context)
    rows = held_out(
        corpus,
        6,
        context,
        annotate=lambda documents: {"role_loss": role_losses(corpus.grammar, documents)},
    )
    reader = reader_losses(corpus, rows, rows["role_loss"])[:, 1:]
    asked = shown.kind[:, :-1] >= 0
    own = pairs.ideal_losses(shown.tokens, shown.match, 8, 0.9)[:, :-1]
    assert torch.allclose(own[asked], reader[asked], atol=1e-12)
    rest = np.log(8) * (rows["role"] == 0)[:, 1:]  # subjects are free, ends are sure
    assert torch.allclose(reader[~asked], rest[~asked].double(), atol=1e-12)


LIVES = {
    "all": {},
    "crossed": {"verb": [2, 4], "object": [3, 3]},
    "nested": {"verb": [6], "object": [2, 2, 2]},
    "one of 1": {"verb": [1] * 6, "object": [6]},
}


@pytest.mark.parametrize("lives", LIVES.values(), ids=LIVES)
def test_the_ideal_reader_is_bayes_rule_over_all_tables(lives):
    """Brute force: every table of who calls for whom, weighed by the tokens so far.

    A verb's and an object's tables are forgotten where its own lives end, and both at a document's
    end: V is what this reader gains.
    """
    size, binding, sentences = 2, 0.7, 6
    roles = {name: {"size": size} for name in ("subject", "verb", "object")}
    corpus = lasting(sentences, roles=roles, binding=binding)
    shown = look_ups(Lifetimes(corpus.grammar, lives) if lives else corpus, 4, 48)
    own = pairs.ideal_losses(shown.tokens, shown.match, size, binding)
    gained = np.zeros(4)
    for sequence, tokens in enumerate(shown.tokens):
        for begin, role in enumerate(("verb", "object")):  # called for by the word before
            tables = list(product(range(size), repeat=size))
            new = {0, *np.cumsum(lives.get(role, [sentences]))}
            for at in range(begin, 48, 4):
                if at // 4 % sentences in new:
                    seen = []
                parent, child = int(tokens[at]) - begin * size, int(tokens[at + 1])
                child -= (begin + 1) * size

                def chance(table, parent, child):
                    return binding * (table[parent] == child) + (1 - binding) / size

                weight = np.array([np.prod([chance(t, p, c) for p, c in seen]) for t in tables])
                chances = np.array([chance(table, parent, child) for table in tables])
                exact = -np.log((weight * chances).sum() / weight.sum())
                assert float(own[sequence, at]) == pytest.approx(exact, abs=1e-12)
                gained[sequence] += (np.log(size) - exact) / 48
                seen.append((parent, child))
    value = pairs.gains(own, shown.kind >= 0, size)
    assert value.tolist() == pytest.approx(gained.tolist(), abs=1e-12)


def test_a_window_of_several_documents_holds_the_same_value_and_misleads_who_counts_evenly():
    """The same documents, alone or four in a window: what they are worth is equal, text by text."""
    shown = look_ups(lasting(8), 24, 128)
    parts = [slice(at, at + 32) for at in range(0, 128, 32)]
    alone = torch.cat([shown.match[:, part, part] for part in parts])
    assert alone.sum() == shown.match.sum() and shown.stale.any()
    tokens = torch.cat([shown.tokens[:, part] for part in parts])
    asked = torch.cat([shown.kind[:, part] for part in parts]) >= 0
    ideal = pairs.gains(pairs.ideal_losses(tokens, alone, 8, 0.9), asked, 8)
    four = pairs.ideal_losses(shown.tokens, shown.match, 8, 0.9)
    value = pairs.gains(four, shown.kind >= 0, 8)
    assert float(ideal.mean()) == pytest.approx(float(value.mean()), abs=1e-12)

    def even(tokens, seen, asked):
        losses = pairs.even_losses(tokens, seen, 8, asked)
        return float(pairs.gains(losses, asked, 8).mean() / ideal.mean())

    assert 0.95 < even(tokens, alone, asked) < 1
    assert even(shown.tokens, shown.match | shown.stale, shown.kind >= 0) < 0.5


def test_what_does_not_last_is_worth_nothing():
    corpus = lasting(1)
    shown = look_ups(corpus, 16, 128)
    ideal = pairs.ideal_losses(shown.tokens, shown.match, 8, 0.9)
    assert torch.allclose(ideal, torch.full_like(ideal, np.log(8)))
    assert not shown.match.any() and shown.stale.any()


MEMBERS = {
    "lives of 1": lasting(1),
    "lives of 32": lasting(32),
    "crossed": crossed(),
    "nested": nested(),
    "parts": inheriting(),
}


@pytest.mark.parametrize("corpus", MEMBERS.values(), ids=MEMBERS)
def test_lifetimes_change_neither_what_syntax_gives_nor_what_latents_would(corpus):
    """Exactly, by the grammar; and by its documents, to their sampling error."""
    expected = ceilings.expected(corpus.grammar).iloc[-1]
    same = ceilings.expected(lasting(8).grammar).iloc[-1]
    assert expected.equals(same)
    documents = corpus.documents(range(400))
    for column in ("syntax_only", "latent_aware"):
        losses = token_losses(corpus.grammar, documents, column == "latent_aware").view(400, -1)
        error = float(losses.mean(1).std()) / 400**0.5
        assert float(losses.mean()) == pytest.approx(same[column], abs=3.5 * error + 1e-9)


# ---------------------------------------------------------------------- lifetimes of one's own


def test_each_role_changes_where_it_is_told_to_and_nowhere_else():
    corpus = crossed()
    documents = corpus.documents(range(50))
    alive = documents.token["alive"].view(50, 6, 4)
    verb = documents.habits["verb"].view(50, 6, 8)
    object_ = documents.habits["object"].view(50, 6, 8)
    for number, (habits, sets) in enumerate(((verb, [2, 4]), (object_, [3, 3])), 1):
        changes = (habits[:, 1:] != habits[:, :-1]).any(2)
        assert changes.all(0).tolist() == [at + 1 == sets[0] for at in range(5)]
        assert not changes[:, [at for at in range(5) if at + 1 != sets[0]]].any()
        told = alive[:, 1:, number] != alive[:, :-1, number]
        assert torch.equal(told, changes)
    assert torch.equal(corpus.documents([7]).tokens, documents.tokens[7 * 24 : 8 * 24])
    assert torch.equal(corpus.documents(range(50), detail=False).tokens, documents.tokens)


def test_words_follow_the_habits_of_their_own_role():
    corpus = crossed()
    documents = corpus.documents(range(400))
    tokens = documents.tokens.view(-1, 4)
    called = documents.habits["verb"].gather(1, tokens[:, :1])[:, 0] + 8 == tokens[:, 1]
    assert float(called.double().mean()) == pytest.approx(0.9 + 0.1 / 8, abs=0.02)
    parent = tokens[:, 1:2] - 8
    called = documents.habits["object"].gather(1, parent)[:, 0] + 16 == tokens[:, 2]
    assert float(called.double().mean()) == pytest.approx(0.9 + 0.1 / 8, abs=0.02)


def test_matches_are_of_the_role_s_own_set_and_stale_ones_of_another():
    shown = look_ups(crossed(), 40, 24)
    sentence = torch.arange(24) // 4
    sets = {"subject to verb": sentence >= 2, "verb to object": sentence >= 3}
    for number, kind in enumerate(shown.kinds):
        same = sets[kind][:, None] == sets[kind]
        here = (shown.kind == number)[:, :, None]
        assert (shown.match & here).any() and (shown.stale & here).any()
        assert not (shown.match & here & ~same).any() and not (shown.stale & here & same).any()


def test_lifetimes_that_do_not_fill_a_document_are_refused():
    with pytest.raises(ValueError, match="numbers that sum to the 6 sentences"):
        Lifetimes(lasting(6).grammar, {"verb": [2, 3], "object": [6]})
    with pytest.raises(ValueError, match="numbers that sum to the 6 sentences"):
        Lifetimes(lasting(6).grammar, {"verb": [6], "object": [6]}, parts=[[3, 2]])
    with pytest.raises(ValueError, match="ideal reader is known where one level"):
        rows = held_out(crossed(), 2, 24)
        reader_losses(crossed(), rows, torch.zeros(2, 24))


# ---------------------------------------------------------------------- parts that inherit


def test_parts_inherit_all_but_a_share():
    documents = inheriting().documents(range(200))
    for habits in (documents.habits["verb"], documents.habits["object"]):
        part = habits.view(200, 4, 8, 8)
        assert (part == part[:, :, :1]).all()
        changed = (part[:, [0, 1, 2], 0] != part[:, [1, 2, 3], 0]).double().mean((0, 2))
        near, far = 1 - 0.75**2, 1 - 0.75**4  # of two parts in a half; across the halves
        expected = torch.tensor([near, far, near], dtype=torch.float64) * 7 / 8
        assert torch.allclose(changed, expected, atol=0.04)


def test_words_of_one_draw_are_called_alike_and_others_are_not():
    documents = inheriting().documents(range(100))
    token = {name: documents.token[name].view(100, 32, 4) for name in ("tokens", "alive")}
    subject, alive = token["tokens"][:, :, 0], token["alive"][:, :, 1]
    called = documents.habits["verb"].view(100, 32, 8).gather(2, subject[:, :, None])[:, :, 0]
    same = subject[:, :, None] == subject[:, None]
    one_draw = same & (alive[:, :, None] == alive[:, None])
    alike = called[:, :, None] == called[:, None]
    assert alike[one_draw].all()
    assert float(alike[same & ~one_draw].double().mean()) == pytest.approx(1 / 8, abs=0.05)


@pytest.mark.parametrize("redrawn", [0.0, 0.3, 1.0])
def test_the_reader_of_parts_is_bayes_rule_over_all_trees(redrawn):
    """Brute force: every root, half and part, weighed by the words so far."""
    options, binding, length = 3, 0.6, 8
    words = torch.randint(options, (4, length), generator=torch.manual_seed(0))
    part = torch.arange(length).expand(4, -1) // 2
    seen = torch.ones(4, length, length, dtype=torch.bool).tril()
    own = pairs.inherited_losses(words, seen, part, [2, 2], redrawn, options, binding)

    def inherits(child, parent):
        return (1 - redrawn) * (child == parent) + redrawn / options

    def chance(tree, said):
        root, *halves_and_parts = tree
        halves, parts = halves_and_parts[:2], halves_and_parts[2:]
        likely = np.prod([inherits(half, root) for half in halves])
        likely *= np.prod([inherits(leaf, halves[at // 2]) for at, leaf in enumerate(parts)])
        for at, word in enumerate(said):
            likely *= binding * (word == parts[at // 2]) + (1 - binding) / options
        return likely

    trees = list(product(range(options), repeat=7))
    for sequence, said in enumerate(words.tolist()[:2]):
        total = [sum(chance(tree, said[:n]) for tree in trees) for n in range(1, length + 1)]
        expected = -np.log(np.array(total[1:]) / np.array(total[:-1]))
        assert np.allclose(own[sequence, :-1], expected, atol=1e-10)
    if redrawn in (0.0, 1.0):
        following = part.roll(-1, 1)[:, :, None]
        same = seen & (following == part[:, None]) if redrawn else seen
        ideal = pairs.ideal_losses(words, same, options, binding)
        assert torch.allclose(own[:, :-1], ideal[:, :-1], atol=1e-10)


def test_no_reader_that_takes_a_part_for_the_whole_does_better():
    corpus = inheriting()
    shown = look_ups(corpus, 200, 128)
    seen, asked = shown.match | shown.stale, shown.kind >= 0
    part = torch.arange(128).expand(200, -1) // 32

    def gain(losses):
        return float(pairs.gains(losses, asked, 8).mean())

    def told(within, redrawn):
        about = within, redrawn, 8, 0.9
        return gain(pairs.inherited_losses(shown.tokens % 8, seen, part, *about))

    best = told([2, 2], 0.25)
    same = part.roll(-1, 1)[:, :, None] == part[:, None]
    assert best > told([4], 0.25) > told([4], 0.9)
    assert best > gain(pairs.ideal_losses(shown.tokens, seen & same, 8, 0.9))  # of its part alone
    assert best > gain(pairs.even_losses(shown.tokens, seen, 8, asked))
    assert best < gain(pairs.ideal_losses(shown.tokens, shown.match, 8, 0.9))  # knows what expired


# ---------------------------------------------------------------------- without a tree


def test_without_a_tree_only_callers_are_looked_up():
    corpus = Successors("some", words=32, choices=8, binding=0.9, length=32, callers=16)
    shown = look_ups(corpus, 64, 64)
    asks = shown.tokens < 16
    asks[:, -1] = False
    asks[:, 31] = False  # the last word of a document: the next one begins another
    assert torch.equal(shown.kind >= 0, asks)
    assert of_keys(shown.match, shown)["look-up"] == pytest.approx(1.0)
    pays = pairs.gains(pairs.ideal_losses(shown.tokens, shown.match, 8, 0.9), asks, 8).mean()
    assert float(pays) > 0.2
    everyone = Successors("all", words=32, choices=8, binding=0.9, length=32)
    called, free = (c.documents(range(9)).tokens for c in (everyone, corpus))
    assert not torch.equal(called, free) and everyone.digest != corpus.digest


def test_documents_of_a_treeless_bank_follow_one_of_its_few_rings():
    corpus = Successors("few", words=24, choices=23, binding=0.9, length=64, bank=4)
    documents = corpus.documents(range(400))
    tokens, latent = (documents.token[name].view(400, 64) for name in ("tokens", "latent"))
    assert (latent == latent[:, :1]).all()
    assert torch.bincount(latent[:, 0], minlength=4).min() > 60  # a quarter of 400 each, about
    before = tokens[:, :-1]
    follows = corpus.bank[latent[:, :-1], before] == tokens[:, 1:]
    assert float(follows.double().mean()) == pytest.approx(0.9 + 0.1 / 23, abs=0.01)
    other = corpus.bank[(latent[:, :-1] + 1) % 4, before] == tokens[:, 1:]
    assert float(other.double().mean()) < 0.15
    for ring in corpus.bank.tolist():  # all words, one after the other
        word, met = 0, set()
        while word not in met:
            met.add(word)
            word = ring[word]
        assert word == 0 and len(met) == 24
    assert torch.equal(corpus.documents([7]).tokens, tokens[7])
