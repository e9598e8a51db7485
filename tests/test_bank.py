"""A bank of fixed latents: its documents, its exact losses, and its ideal reader by brute force."""

from itertools import product

import numpy as np
import pytest
import torch
from grammars import make
from latentree.data.corpus import HELD_OUT, held_out, load_corpus
from latentree.data.sampler import GrammarProcess
from latentree.exact.ceilings import expected, in_sentence
from latentree.exact.predictors import token_losses
from latentree.exact.reader import bank_losses, reader_losses

torch.set_num_threads(1)
HABITS = {"verb": "noun", "and": "verb"}
INVERTED = "S -> 'noun' 'verb' 'and' [0.6] | 'verb' 'noun' 'and' [0.4]"
FIELDS = {
    "roles": {"noun": {"size": 3}, "verb": {"size": 3}, "and": {"size": 3}},
    "habits": HABITS,
    "binding": 0.7,
    "bank": 3,
}


def bank(sentence=INVERTED, **fields):
    return GrammarProcess(make(sentence, **(FIELDS | fields)), 5)


def test_every_document_has_one_of_the_banks_latents():
    process, ids = load_corpus("banked", seed=1), torch.arange(4000)
    documents = process.documents(ids)
    latent = documents.token["latent"][documents.token["position"] == 0]
    for child, parent in process.grammar.file.habits.items():
        table = process.bank[child]
        assert table.shape == (8, 16) and len(table.unique(dim=0)) == 8
        assert torch.equal(table.sort(1).values, torch.arange(16).expand(8, -1))  # one to one
        assert torch.equal(documents.habits[child], table[latent])  # both children by one latent
    counts = torch.bincount(latent)
    assert len(counts) == 8 and (counts - 500).abs().max() < 5 * 500**0.5
    # a word follows its partner of this latent, as often as `binding` and chance say
    token = documents.token
    verb = (token["role"] == 1).nonzero()[:, 0]
    called = process.bank["verb"][token["latent"][verb], token["rank"][verb - 1]]
    follows = (called == token["rank"][verb]).double().mean()
    assert follows == pytest.approx(0.9 + 0.1 / 16, abs=0.01)
    share = torch.bincount(documents.tokens, minlength=49).double() / len(documents.tokens)
    torch.testing.assert_close(share, torch.tensor(process.token_frequencies()), atol=2e-3, rtol=0)


def test_a_bank_drawn_for_each_sentence_and_none_at_all():
    process = bank(redraw={"sentence": 1.0})
    documents = process.documents(torch.arange(400))
    drawn = documents.token["latent"][documents.token["place"] == 0]
    assert len(drawn) == len(documents.habits["verb"]) == 2400
    assert (torch.bincount(drawn) - 800).abs().max() < 5 * 800**0.5
    assert (
        "bank" not in make().content and "latent" not in GrammarProcess(make()).documents([0]).token
    )


def joint(process, latent):
    """P(noun, verb, and) in a sentence under a latent, by hand: (3, 3, 3)."""
    binding, p = process.grammar.file.binding, np.zeros((3, 3, 3))
    verb, last = (process.bank[child][latent].tolist() for child in HABITS)
    for a, b, c in product(range(3), repeat=3):
        of_verb = binding * (verb[a] == b) + (1 - binding) / 3
        p[a, b, c] = of_verb * (binding * (last[b] == c) + (1 - binding) / 3) / 3
    return p


def entropy(p):
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def test_expected_losses_are_those_of_the_joint_law():
    process = bank()
    table, shape = expected(process.grammar).set_index("role"), entropy(np.array([0.6, 0.4]))
    words = np.mean([entropy(joint(process, latent)) for latent in range(3)])
    assert table.latent_aware["all"] * 4 == pytest.approx(words + shape, abs=1e-12)
    p = joint(process, 0).sum(2)  # noun and verb; the first of both tells the shape too
    noun = 0.6 * (entropy(p.sum(1)) - np.log(0.6)) + 0.4 * (entropy(p) - entropy(p.sum(0)))
    assert table.latent_aware["noun"] == pytest.approx(noun, abs=1e-12)
    documents = load_corpus("banked").documents(HELD_OUT + torch.arange(400))
    sampled = token_losses(load_corpus("banked").grammar, documents).mean()
    assert expected(load_corpus("banked").grammar).latent_aware.iloc[-1] == pytest.approx(
        float(sampled), abs=0.01
    )


def test_the_reader_weighs_the_latents_by_bayes():
    process = bank()
    rows = held_out(process, 6, 40)
    found, chances = bank_losses(process, rows), [joint(process, latent) for latent in range(3)]
    for row in range(6):
        known, tokens = np.full(3, 1 / 3), rows["tokens"][row].tolist()
        for at, place in enumerate(rows["place"][row].tolist()):
            if rows["position"][row, at] == 0:
                known, told = np.full(3, 1 / 3), np.ones(3)
            if place == 0:
                known, told, sentence = known * told, np.ones(3), []
            sentence.append(tokens[at])
            inverted = 3 <= sentence[0] < 6
            ranks = [token % 3 for token in sentence]
            if inverted:
                ranks[:2] = ranks[:2][::-1] if len(ranks) > 1 else [slice(None), ranks[0]]
            here = tuple(ranks[:3])
            now = np.array([p[here].sum() for p in chances]) * (0.4 if inverted else 0.6)
            loss = np.log((known * told).sum()) - np.log((known * now).sum())
            assert found[row, at] == pytest.approx(loss, abs=1e-12)
            told = now


def test_no_reader_of_the_bank_does_better_and_it_closes_in_on_the_latent():
    process = load_corpus("banked")
    rows = held_out(process, 256, 64, annotate=lambda d: {"aware": aware(process, d)})
    loss = bank_losses(process, rows)
    verb = rows["role"] == 1
    gap = (loss - rows["aware"]).where(verb, 0.0).sum(0) / verb.sum(0).clamp(min=1)
    assert gap[1] == pytest.approx(np.log(8), abs=0.8) and gap[1] > 1  # nothing known at first
    assert abs(gap[-16:]).max() < 0.02  # and all, at the end


def aware(process, documents):
    return token_losses(process.grammar, documents)


def test_what_a_bank_cannot_be_is_refused_by_name():
    wrong = {
        "drawn as a whole, at one level": {"redraw": {"document": 0.5}},
        "holds no maps": {"roles": FIELDS["roles"] | {"noun": {"size": 3, "zipf": 1.0}}},
        "give verb and noun one size": {"roles": FIELDS["roles"] | {"noun": {"size": 4}}},
    }
    for mend, fields in wrong.items():
        with pytest.raises(ValueError, match=f"grammar tiny: bank = 3: .*{mend}"):
            bank(**fields)
    process = bank()
    with pytest.raises(ValueError, match="bank = 3: its habits are no independent"):
        in_sentence(process.grammar)
    with pytest.raises(ValueError, match="bank = 3: its reader is `bank_losses`"):
        reader_losses(process, {}, torch.zeros(1, 1))
