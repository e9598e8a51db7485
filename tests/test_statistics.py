"""Intervals on data whose coverage is known, and the judge of written sentences."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from grammars import make
from hypothesis import given, settings
from hypothesis import strategies as st
from latentree.data.sampler import GrammarProcess
from latentree.evidence import figures
from latentree.evidence.intervals import bootstrap, holm, paired, recovered_share, t_interval
from latentree.exact.parser import legal_sentences
from PIL import Image
from scipy import stats


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
    value, low, high = recovered_share(
        (without + aware) / 2 + rng.normal(0, 0.1, 50), without, aware
    )
    assert low < value < high and value == pytest.approx(0.5, abs=0.1)


def test_one_estimate_has_no_interval():
    mean, low, high = t_interval([3.0])
    assert mean == 3 and np.isnan(low) and np.isnan(high)


def by_signs(values, statistic):
    """The share of all ways to set the values' signs in which a statistic comes out as large as it is, or larger."""
    ways = [
        statistic(np.array(signs) * np.abs(values))
        for signs in product((1, -1), repeat=len(values))
    ]
    return np.mean(np.array(ways) >= statistic(values) - 1e-12)


@pytest.mark.parametrize("shift", [-0.6, 0.0, 0.4, 3.0])
def test_paired_differences_are_tested_one_sided(shift):
    values = np.random.default_rng(1).normal(shift, 1, 9)
    found = paired(values)
    ranks = stats.rankdata(np.abs(values))
    assert found["mean"] == pytest.approx(values.mean()) and found["d"] == pytest.approx(
        values.mean() / values.std(ddof=1)
    )
    assert found["permutation"] == pytest.approx(by_signs(values, np.mean))
    assert found["wilcoxon"] == pytest.approx(by_signs(values, lambda v: ranks[v > 0].sum()))
    assert found["t"] == pytest.approx(stats.t.sf(found["d"] * 3, 8))
    turned = paired(-values)
    assert turned["d"] == pytest.approx(-found["d"]) and turned["t"] == pytest.approx(
        1 - found["t"]
    )
    assert found["permutation"] + turned["permutation"] == pytest.approx(
        1 + 2**-9
    )  # as it is counts on both sides


@pytest.mark.parametrize("pairs", [4, 5, 8])
def test_when_all_pairs_agree_no_sign_test_is_below_its_least(pairs):
    values = 1 + np.random.default_rng(0).random(pairs)
    assert paired(values)["permutation"] == 2.0**-pairs == paired(values)["wilcoxon"]
    assert paired(-values)["permutation"] == 1


def test_the_interval_of_d_is_that_of_resampled_pairs():
    values, rng = np.random.default_rng(2).normal(0.8, 1, 14), np.random.default_rng(3)
    drawn = [
        sample.mean() / sample.std(ddof=1)
        for sample in (rng.choice(values, 14) for _ in range(8000))
    ]
    found = paired(values)
    assert (found["d_low"], found["d_high"]) == pytest.approx(
        np.quantile(drawn, [0.025, 0.975]), abs=0.08
    )
    assert found == paired(values)


def test_holm_on_an_example_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )  # 4 p, 3 p, 2 p; the largest is held up
    assert (
        holm([0.5, 0.6]).tolist() == [1, 1]
        and holm([0.2]).tolist() == [0.2]
        and holm([]).tolist() == []
    )


@given(st.lists(st.floats(0, 1) | st.sampled_from([0.01, 0.02, 0.05]), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_holm_closes_bonferronis_test(p):
    """An adjusted p is the largest that Bonferroni gives to a set of tests with this one in it."""
    sets = [chosen for size in range(1, len(p) + 1) for chosen in combinations(range(len(p)), size)]
    expected = [
        max(min(1, len(chosen) * min(p[j] for j in chosen)) for chosen in sets if i in chosen)
        for i in range(len(p))
    ]
    found = holm(p)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert (found >= p).all() and (found <= np.minimum(1, len(p) * np.array(p))).all()
    assert (np.diff(found[np.argsort(p)]) >= 0).all()


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_every_sampled_sentence_is_legal_and_shuffled_ones_are_not(shared):
    grammar = make(shared=shared)
    tokens = GrammarProcess(grammar).documents(range(30)).tokens
    assert legal_sentences(grammar, tokens) == [True] * 180
    verb_first = torch.tensor(
        [grammar.words[1][0], grammar.words[1][0], grammar.end, grammar.words[0][0]]
    )
    assert legal_sentences(grammar, verb_first) == [
        False
    ]  # and the last, without an end, is not judged


@pytest.mark.parametrize(
    "name, kind",
    [
        ("bound", "PCFG"),
        ("bound-flat", "flat"),
        ("released-small", "small release"),
        ("released", "PCFG"),
        ("bound-order3", "n-gram"),
        ("released-ngram", "hashed n-gram"),
        ("bound-static", "static"),
    ],
)
def test_corpora_keep_their_colours(name, kind):
    assert figures.kind(name) == kind and figures.colour(name) == figures.KIND_COLOURS[kind]


def test_a_figure_carries_its_description(tmp_path):
    figure, axes = figures.plt.subplots(1, 2)
    axes[0].plot([0, 1], [1, 0], label="bound")
    axes[1].imshow([[0, 1]])
    axes[0].set(title="loss\nheld out", xlabel="training tokens", ylabel="loss (nats)")
    axes[1].set(title="matrix", xlabel="head")
    figures.save(figure, tmp_path, "01_x")
    text = Image.open(tmp_path / "figures" / "01_x.png").text["Description"]
    assert (
        text
        == "2 panels; loss held out, matrix; horizontally: training tokens, head; vertically: loss (nats); legend: bound."
    )
