"""Intervals on data whose coverage is known, and the judge of written sentences."""

import numpy as np
import pytest
import torch
from grammars import make
from latentree import plots
from latentree.parsing import legal_sentences
from latentree.sampler import GrammarProcess
from latentree.statistics import bootstrap, recovered_share, t_interval


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    samples = rng.exponential(size=(300, 60))
    for interval in (lambda s: bootstrap(s, draws=400), t_interval):
        covered = np.mean([low <= 1 <= high for _, low, high in map(interval, samples)])
        assert 0.88 < covered < 0.985


def test_recovered_share_is_one_for_the_ceiling_and_zero_for_the_floor():
    rng = np.random.default_rng(0)
    without, aware = 2 + rng.random(50), 1 + rng.random(50)
    assert recovered_share(aware, without, aware) == (1.0, 1.0, 1.0)
    assert recovered_share(without, without, aware) == (0.0, 0.0, 0.0)
    value, low, high = recovered_share((without + aware) / 2 + rng.normal(0, 0.1, 50), without, aware)
    assert low < value < high and value == pytest.approx(0.5, abs=0.1)


def test_one_estimate_has_no_interval():
    mean, low, high = t_interval([3.0])
    assert mean == 3 and np.isnan(low) and np.isnan(high)


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_every_sampled_sentence_is_legal_and_shuffled_ones_are_not(shared):
    grammar = make(shared=shared)
    tokens = GrammarProcess(grammar).documents(range(30)).tokens
    assert legal_sentences(grammar, tokens) == [True] * 180
    verb_first = torch.tensor([grammar.words[1][0], grammar.words[1][0], grammar.end, grammar.words[0][0]])
    assert legal_sentences(grammar, verb_first) == [False]  # and the last, without an end, is not judged


@pytest.mark.parametrize("name, kind", [("bound", "PCFG"), ("bound-flat", "flat"), ("released-small", "small release"), ("released", "PCFG"),
                                        ("bound-order3", "n-gram"), ("released-ngram", "hashed n-gram"), ("bound-static", "static")])
def test_corpora_keep_their_colours(name, kind):
    assert plots.kind(name) == kind and plots.colour(name) == plots.KIND_COLOURS[kind]
