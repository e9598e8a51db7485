"""The ideal reader's posterior against enumeration of all maps."""

from itertools import permutations, product

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latentree.exact.bayes import posterior_frequencies

torch.set_num_threads(1)


def enumerated(counts, law):
    """The definition: each assignment of ranks to words weighs as much as the draws are probable under it."""
    total, evidence = np.zeros(len(law)), 0.0
    for ranks in permutations(range(len(law))):
        frequency = np.array([law[rank] for rank in ranks])
        weight = np.prod(frequency**counts)
        total, evidence = total + weight * frequency, evidence + weight
    return total / evidence


@st.composite
def draws(draw, most=6):
    """Counts of one to six words, and a law of as many ranks in any order, ties included."""
    size = draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(0, most), min_size=size, max_size=size))
    weights = draw(
        st.lists(
            st.sampled_from([0.1, 1.0, 3.0]) | st.floats(1e-4, 10), min_size=size, max_size=size
        )
    )
    return np.array(counts), np.array(weights) / sum(weights)


@given(draws())
@settings(max_examples=300, deadline=None)
def test_posterior_equals_enumeration(drawn):
    counts, law = drawn
    found = posterior_frequencies(torch.tensor(counts), torch.tensor(law))
    assert found.shape == (len(law),) and found.dtype == torch.float64 and not found.requires_grad
    np.testing.assert_allclose(found, enumerated(counts, law), rtol=0, atol=1e-12)
    assert abs(float(found.sum()) - 1) < 1e-12


@given(draws(most=100_000))
@settings(max_examples=200, deadline=None)
def test_any_number_of_words_may_be_seen(drawn):
    counts, law = drawn
    found = posterior_frequencies(counts, law)
    assert found.isfinite().all() and abs(float(found.sum()) - 1) < 1e-12
    assert law.min() - 1e-12 <= found.min() and found.max() <= law.max() + 1e-12
    order = counts.argsort()
    assert (
        np.diff(found.numpy()[order]) >= -1e-12
    ).all()  # a word seen more often is believed to be more frequent


def test_nothing_seen_is_the_mean_law_and_many_words_are_the_law():
    law = 1 / torch.arange(1, 31, dtype=torch.float64)
    law /= law.sum()
    nothing = posterior_frequencies(torch.zeros(30, dtype=torch.int64), law)
    torch.testing.assert_close(
        nothing, torch.full((30,), 1 / 30, dtype=torch.float64), atol=1e-13, rtol=0
    )
    assert posterior_frequencies([7], [1.0]).tolist() == [1.0]
    few = law[[4, 0, 2, 1, 3]] / law[:5].sum()
    distances = []
    for seen in (10, 100, 1000, 100_000):
        found = posterior_frequencies(
            (few * seen).round().long(), few.sort().values
        )  # whatever order the law has
        distances.append(float((found - few).abs().max()))
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-12


def test_divergences_sum_to_what_the_words_tell_of_the_map():
    """The chain rule: the reader's expected divergences add up to the information between map and words."""
    law, length = np.array([0.6, 0.3, 0.1]), 4
    maps = [law[list(ranks)] for ranks in permutations(range(3))]
    expected = np.zeros(length)
    for seen in range(length):
        for words in product(range(3), repeat=seen):
            believed = posterior_frequencies(
                np.bincount(np.array(words, dtype=int), minlength=3), law
            ).numpy()
            weights = [frequency[list(words)].prod() / 6 for frequency in maps]
            expected[seen] += sum(
                w * (f * np.log(f / believed)).sum() for w, f in zip(weights, maps, strict=True)
            )
    information = 0.0
    for words in product(range(3), repeat=length):
        likelihood = np.array([frequency[list(words)].prod() for frequency in maps])
        information += (likelihood * np.log(likelihood / likelihood.mean())).sum() / 6
    assert abs(expected.sum() - information) < 1e-12 and information < np.log(6)
    assert (
        abs(expected[0] - (law * np.log(3 * law)).sum()) < 1e-12 and (np.diff(expected) < 0).all()
    )
