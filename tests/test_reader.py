"""The ideal reader's posterior and losses against enumeration of all maps and habits."""

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import torch
from grammars import all_latents, make
from hypothesis import given, settings
from hypothesis import strategies as st
from latentree.data.corpus import HELD_OUT, held_out, load_corpus
from latentree.data.sampler import GrammarProcess
from latentree.exact.predictors import role_losses, token_losses
from latentree.exact.reader import posterior_frequencies, reader_losses

torch.set_num_threads(1)
INVERTED = "Sentence -> 'noun' 'verb' 'and' [0.5] | 'verb' 'noun' [0.3] | 'and' [0.2]"
SMALL = {"noun": {"size": 3, "zipf": 1.0}, "verb": {"size": 3, "zipf": 0.7}, "and": {"size": 2}}


# ---------------------------------------------------------------------- one role's words


@st.composite
def draws(draw, most):
    """Counts of one to six words, and a law of as many ranks in any order, ties included."""
    size = draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(0, most), min_size=size, max_size=size))
    weight = st.sampled_from([0.1, 1.0, 3.0]) | st.floats(1e-4, 10)
    weights = draw(st.lists(weight, min_size=size, max_size=size))
    return np.array(counts), np.array(weights) / sum(weights)


@given(draws(most=6))
@settings(max_examples=200, deadline=None)
def test_posterior_equals_enumeration(drawn):
    """Each assignment of ranks to words weighs as much as the draws are probable under it."""
    counts, law = drawn
    total, evidence = np.zeros(len(law)), 0.0
    for ranks in permutations(range(len(law))):
        frequency = law[list(ranks)]
        weight = np.prod(frequency**counts)
        total, evidence = total + weight * frequency, evidence + weight
    found = posterior_frequencies(torch.tensor(counts), torch.tensor(law))
    np.testing.assert_allclose(found, total / evidence, rtol=0, atol=1e-12)


@given(draws(most=100_000))
@settings(max_examples=100, deadline=None)
def test_any_number_of_words_may_be_seen(drawn):
    counts, law = drawn
    found = posterior_frequencies(counts, law)
    assert found.isfinite().all() and abs(float(found.sum()) - 1) < 1e-12
    assert law.min() - 1e-12 <= found.min() and found.max() <= law.max() + 1e-12
    in_order = found.numpy()[counts.argsort()]
    assert (np.diff(in_order) >= -1e-12).all()  # a word seen more often is more frequent


def test_nothing_seen_is_the_mean_law_and_many_words_are_the_law():
    law = 1 / torch.arange(1, 31, dtype=torch.float64)
    law /= law.sum()
    nothing = posterior_frequencies(torch.zeros(30, dtype=torch.int64), law)
    assert torch.allclose(nothing, torch.full_like(law, 1 / 30), atol=1e-13, rtol=0)
    few = law[[4, 0, 2, 1, 3]] / law[:5].sum()
    distances = []
    for seen in (10, 100, 1000, 100_000):
        counts = (few * seen).round().long()
        found = posterior_frequencies(counts, few.sort().values)  # in whatever order the law is
        distances.append(float((found - few).abs().max()))
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-12


def test_divergences_sum_to_what_the_words_tell_of_the_map():
    """The chain rule: expected divergences add up to the information of map and words."""
    law, length = np.array([0.6, 0.3, 0.1]), 4
    maps = [law[list(ranks)] for ranks in permutations(range(3))]
    expected = np.zeros(length)
    for seen in range(length):
        for words in product(range(3), repeat=seen):
            counts = np.bincount(np.array(words, dtype=int), minlength=3)
            believed = posterior_frequencies(counts, law).numpy()
            for frequency in maps:
                weight = frequency[list(words)].prod() / 6
                expected[seen] += weight * (frequency * np.log(frequency / believed)).sum()
    information = 0.0
    for words in product(range(3), repeat=length):
        likelihood = np.array([frequency[list(words)].prod() for frequency in maps])
        information += (likelihood * np.log(likelihood / likelihood.mean())).sum() / 6
    assert abs(expected.sum() - information) < 1e-12 and information < np.log(6)
    assert abs(expected[0] - (law * np.log(3 * law)).sum()) < 1e-12


# ---------------------------------------------------------------------- whole documents


def windows_with_role_losses(process, sequences, context):
    def annotate(documents):
        return {"role_loss": role_losses(process.grammar, documents)}

    return held_out(process, sequences, context, annotate=annotate)


@pytest.mark.parametrize(
    "binding, habits",
    [(0.0, {}), (0.7, {"verb": "noun", "and": "verb"}), (0.9, {"noun": "verb"})],
)
def test_the_reader_equals_enumeration_of_all_latents(binding, habits):
    roles = SMALL | ({"verb": {"size": 2, "zipf": 1.0}} if len(habits) > 1 else {})
    grammar = make(INVERTED, roles=roles, binding=binding, habits=habits)
    process = GrammarProcess(grammar, 5)
    rows = windows_with_role_losses(process, 3, 12)
    found = reader_losses(process, rows, rows["role_loss"])
    documents = process.documents(HELD_OUT + torch.arange(6))
    maps, called, prior = all_latents(grammar, habits)
    for row in range(3):
        for at in range(12):
            if at == 0 or rows["unit"][row, at] != rows["unit"][row, at - 1]:
                known = prior
                here = documents.token["document"] == rows["unit"][row, at]
                token = {name: v[here].repeat(len(prior)) for name, v in documents.token.items()}
                token["unit"] = torch.arange(len(prior)).repeat_interleave(int(here.sum()))
                given_all = replace(documents, token=token, maps=maps, habits=called)
                p = token_losses(grammar, given_all).neg().exp().nan_to_num(0.0)
                p = p.view(len(prior), -1).numpy()
            now = p[:, int(rows["position"][row, at])]
            loss = -np.log((known * now).sum() / known.sum())
            assert found[row, at] == pytest.approx(loss, abs=1e-9)
            known = known * now


def test_the_reader_by_sampled_maps_comes_close_and_none_does_better():
    process = load_corpus("bound")
    rows = windows_with_role_losses(process, 24, 96)
    one = reader_losses(process, rows, rows["role_loss"], maps=512, seed=0)
    other = reader_losses(process, rows, rows["role_loss"], maps=512, seed=1)
    assert abs((one - other).mean()) < 0.002 and (one - other).abs().max() < 0.3
    of_documents = lambda documents: {
        "aware": token_losses(process.grammar, documents),
        "syntax": token_losses(process.grammar, documents, latent_aware=False),
    }
    known = held_out(process, 24, 96, annotate=of_documents)
    assert known["aware"].mean() < one.mean() < known["syntax"].mean() - 0.4
    by_sentence = rows | {"unit": (rows["place"] == 0).cumsum(1)}
    forgets = reader_losses(process, by_sentence, rows["role_loss"], maps=128)
    assert forgets.mean() > one.mean() + 0.1 and torch.allclose(forgets[:, 0], one[:, 0])


def test_latents_that_the_reader_does_not_know_are_refused():
    for redraw in ({"document": 0.5}, {"document": 1.0, "section": 0.3}):
        with pytest.raises(ValueError, match="choose another grammar"):
            reader_losses(GrammarProcess(make(redraw=redraw)), {}, torch.zeros(1, 1))
