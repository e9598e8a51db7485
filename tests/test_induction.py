"""Scores of heads whose attention is known, and of models whose circuits are set by hand."""

import pandas as pd
import pytest
import torch
from circuit_models import (
    CONTEXT,
    SIZES,
    VOCABULARY,
    duplicate_model,
    evenly,
    heads_that_attend,
    induction_model,
)
from grammars import make
from latentree.data.corpus import load_corpus
from latentree.data.ngrams import Chain, HashedTables
from latentree.data.sampler import GrammarProcess
from latentree.evidence.figures import pick
from latentree.evidence.intervals import ratio
from latentree.measure.ablation import ablated_losses
from latentree.measure.induction import (
    _chance,
    _in_context_gain,
    attention_sums,
    choose_and_score,
    emergence_step,
    measure,
)
from latentree.measure.stimuli import LONGEST, RELEASED, Stimulus, stimuli
from latentree.train.model import build_model

torch.set_num_threads(1)
HALF = 16
SHUFFLED = [torch.randperm(40, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
DISTINCT = torch.stack([row[:HALF] for row in SHUFFLED]).repeat(1, 2)
# Three words: matches of every order.
FEW = torch.randint(3, (4, 40), generator=torch.Generator().manual_seed(0))
DOCUMENT = torch.arange(40).expand(4, -1) // 13


def scores(attention, stimulus, targets=None):
    """{(score, order): value} of one head with attention (sequence, query, key)."""
    targets = targets or stimulus.targets
    sums = attention_sums(attention[:, None], targets)[..., 0].sum(0)
    values = (sums / targets.queries.sum(0)).tolist()
    return dict(zip(targets.names, values, strict=True))


def attending(stimulus, look_for):
    """Attention, uniform over the keys that `look_for(sequence, query)` lists."""
    sequences, length = stimulus.tokens.shape
    attention = torch.zeros(sequences, length, length)
    for s in range(sequences):
        for q in range(length):
            keys = look_for(s, q) or [0]
            attention[s, q, keys] = 1 / len(keys)
    return attention


def common(tokens, q, j):
    """The length of the longest context that positions j < q share, from the definition."""
    length = 0
    while length <= j and tokens[j - length] == tokens[q - length]:
        length += 1
    return length


@pytest.mark.parametrize("document", [None, DOCUMENT], ids=["one document", "several"])
def test_matches_agree_with_the_definition(document):
    stimulus = Stimulus(FEW, document)
    for s, row in enumerate(FEW):
        for q in range(40):
            start = 0 if document is None else q // 13 * 13
            for j in range(40):
                order = common(row[start:], q - start, j - start) if start <= j < q else 0
                assert stimulus.orders[s, q, j] == min(order, LONGEST + 1)
            assert stimulus.orders[s, q].any() == (row[q] in row[start:q])


# On [r, r] of distinct tokens, the query i of the second copy has one match, of order i + 1.
HEADS = {
    "previous token": (lambda s, q: [max(q - 1, 0)], {"previous-token": 1}),
    "duplicate token": (
        lambda s, q: [q - HALF] if q >= HALF else [],
        {"duplicate-token": 1, RELEASED: 1, "previous-token": 1 / 31},
    ),
    "induction": (
        lambda s, q: [q - HALF + 1] if q >= HALF else [],
        {"induction": 1, "previous-token": 1 / 31},
    ),
    "first token": (lambda s, q: [0], {"duplicate-token": 1 / HALF, "previous-token": 1 / 31}),
}


@pytest.mark.parametrize("look_for, expected", HEADS.values(), ids=HEADS)
def test_scores_of_perfect_heads(look_for, expected):
    stimulus = Stimulus(DISTINCT, period=HALF)
    found = scores(attending(stimulus, look_for), stimulus)
    assert {order for score, order in found if score == "induction"} == set(range(LONGEST + 1))
    for (score, order), value in found.items():
        assert value == pytest.approx(expected.get(score, 0), abs=1e-6), (score, order)


def test_uniform_attention_scores_at_chance():
    stimulus = Stimulus(DISTINCT, period=HALF)
    found = scores(attending(stimulus, lambda s, q: list(range(q + 1))), stimulus)
    for n in range(1, LONGEST + 1):
        seen = [1 / (q + 1) for q in range(HALF + n, 32)]
        assert found["induction", n] == pytest.approx(1 / (HALF + n), abs=1e-6)
        assert found[RELEASED, n] == pytest.approx(sum(seen) / len(seen), abs=1e-6)
    for each in (stimulus, Stimulus(FEW), Stimulus(FEW, DOCUMENT)):
        uniform = scores(attending(each, lambda s, q: list(range(q + 1))), each)
        expected = pytest.approx(list(uniform.values()), nan_ok=True, abs=1e-6)
        assert _chance(each.targets).tolist() == expected


@pytest.mark.parametrize("order", [1, 2, 3])
def test_heads_of_one_order_score_at_that_order_only(order):
    stimulus = Stimulus(FEW)

    def look_for(s, q):
        return [j + 1 for j in range(q) if common(FEW[s], q, j) == order]

    found = scores(attending(stimulus, look_for), stimulus)
    for n in range(1, 6):  # longer matches are rare in these tokens
        assert found["induction", n] == pytest.approx(float(n == order), abs=1e-6)
    assert 0.3 < found["induction", 0] < 1


def test_the_released_score_knows_no_order():
    # What this head pays does not depend on the query's place: dropping queries changes nothing.
    stimulus = Stimulus(DISTINCT, period=HALF)
    attention = 0.7 * attending(stimulus, lambda s, q: [q - HALF] if q >= HALF else [])
    found = scores(attention, stimulus)
    assert [found[RELEASED, k] for k in range(1, 11)] == pytest.approx([0.7] * 10)
    assert all(found["induction", n] == 0 for n in range(LONGEST + 1))


def test_attention_in_chunks_is_the_same():
    targets = Stimulus(FEW).targets
    attention = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    first = attention_sums(attention[:3], targets.of_sequences(0, 3))
    last = attention_sums(attention[3:], targets.of_sequences(3, 1))
    torch.testing.assert_close(torch.cat([first, last]), attention_sums(attention, targets))


def test_a_head_of_fixed_distance_scores_as_much_on_the_targets_of_another_sequence():
    # Sentences come in fours: three tokens back often stands what followed a match.
    stimulus = stimuli(load_corpus("bound"), 64, 64)["natural"]
    back = attending(stimulus, lambda s, q: [max(0, q - 3)])
    own = scores(back, stimulus)["induction", 0]
    other = scores(back, stimulus, stimulus.targets.of_another_sequence())["induction", 0]
    assert own > 0.15 and abs(own - other) < 0.03


@pytest.mark.parametrize("name", ["bound", "released-small"])
def test_a_perfect_head_clears_both_nulls_on_every_stimulus_and_no_fake_does(name):
    """In windows as long as notebook 03's. In a repeat, a head of the period's distance has a high score too."""
    corpus, sequences, context = load_corpus(name), 16, 128
    place = torch.arange(context)
    distance = place[:, None] - place
    model = build_model("llama", corpus.vocabulary_size, 1, 16, heads=4, context=context).eval()
    for kind, stimulus in stimuli(corpus, sequences, context).items():
        followed, match = stimulus.orders.roll(1, 2) > 0, stimulus.orders > 0
        places = [(distance == back).expand_as(match) for back in (3, context // 2 - 1)]
        with heads_that_attend(evenly(torch.stack([followed, match, *places], 1))):
            table = measure(model, {kind: stimulus}, rows=sequences)
        best = pick(table, score="induction", order=0, variant="best").iloc[0]
        heads = pick(table, score="induction", order=0, variant="head").set_index("head")
        beyond = heads.value - heads[["chance", "elsewhere"]].max(axis=1)
        assert heads.value[0] == pytest.approx(1) and beyond[0] > 0.35, (kind, beyond)
        assert best["head"] == 0 and best.low > best[["chance", "elsewhere"]].max() + 0.35
        assert beyond[1:].max() < 0.02, (kind, beyond)
        if stimulus.period:
            assert heads.value[3] > 0.6 and heads.value[3] > heads.chance[3] + 0.5


def test_ratio_covers_what_it_should():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 9, (400, 30, 1), generator=generator)
    noise = torch.randn(counts.shape, generator=generator, dtype=torch.float64)
    covered = 0
    for one, count in zip(counts * 0.3 + noise * counts.sqrt(), counts, strict=True):
        _, low, high = ratio(one, count)
        covered += bool(low <= 0.3 <= high)
    assert 0.92 < covered / 400 < 0.98
    value, low, high = ratio(torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[2, 0], [0, 0]]))
    assert value[0] == 1 and value[1].isnan() and low.isnan().all() and high.isnan().all()


def test_the_best_of_equal_heads_is_not_flattered():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 40, 100, generator=generator, dtype=torch.float64)
    count = torch.ones(40, dtype=torch.int64)
    best = pd.DataFrame(
        [[float(x) for x in choose_and_score(sums, count)] for sums in noise],
        columns=["value", "low", "high"],
    )
    assert abs(best.value.mean()) < 0.03  # the plain maximum gives 0.4
    assert 0.9 < ((best.low < 0) & (best.high > 0)).mean() < 0.99
    value, _, _ = choose_and_score(noise[0] + 2 * (torch.arange(100) == 7), count)
    assert value == pytest.approx(float(noise[0][:, 7].mean()) + 2)  # both halves choose it


def test_in_context_gain():
    tokens = torch.tensor([[1, 2, 1, 2, 3, 1, 2], [1, 2, 3, 1, 2, 1, 2]])
    losses = torch.tensor([[5.0, 3.0, 2.0, 9.0, 9.0, 1.0], [4.0, 9.0, 9.0, 3.0, 9.0, 1.0]])
    total, count = _in_context_gain(losses, Stimulus(tokens))
    assert total.tolist() == [3.0 + 4.0, 1.0 + 3.0] and count.tolist() == [2, 2]
    document = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [2, 2, 2, 3, 3, 3, 4]])
    total, count = _in_context_gain(losses, Stimulus(tokens, document))
    assert total.tolist() == [1.0, 0.0] and count.tolist() == [1, 0]


def test_stimuli_of_every_kind_of_corpus():
    grammar = GrammarProcess(make())
    chain = Chain(grammar, order=1, sample_tokens=2000)
    for corpus in (grammar, chain, HashedTables(vocabulary_size=30, tables=4)):
        made = stimuli(corpus, 5, 20, seed=3)
        natural, legal, random = (made[n] for n in ("natural", "legal repeat", "random repeat"))
        for stimulus in made.values():
            assert stimulus.tokens.shape == (5, 20) and stimulus.tokens.min() >= 0
            assert stimulus.tokens.max() < corpus.vocabulary_size
        assert natural.document is not None and natural.period is None
        assert legal.document is None and legal.period == random.period == 10
        assert torch.equal(legal.tokens, natural.tokens[:, :10].repeat(1, 2))
        assert torch.equal(random.tokens[:, :10], random.tokens[:, 10:])
        again = stimuli(corpus, 5, 20, seed=3)["random repeat"].tokens
        other = stimuli(corpus, 5, 20, seed=4)["random repeat"].tokens
        assert torch.equal(again, random.tokens) and not torch.equal(again, other)
    with pytest.raises(ValueError, match="context = 21, sequences = 5"):
        stimuli(grammar, 5, 21)


def test_a_skeleton_repeat_keeps_the_roles_and_draws_words_evenly():
    corpus = load_corpus("bound")
    made = stimuli(corpus, 200, 60)
    role_of = torch.as_tensor(corpus.grammar.role_of)
    skeleton, natural = made["skeleton repeat"].tokens, made["natural"].tokens
    assert torch.equal(role_of[skeleton[:, :30]], role_of[natural[:, :30]])
    assert torch.equal(skeleton[:, :30], skeleton[:, 30:])
    subjects = torch.bincount(skeleton[role_of[skeleton] == 0], minlength=12).double()
    assert abs(subjects / subjects.sum() - 1 / 12).max() < 0.02


def test_emergence_step():
    low = [0.5, 0.0, 0.5, 0.2, 0.4]
    curve = pd.DataFrame({"step": [9, 0, 1, 3, 27], "low": low, "chance": 0.1})
    assert emergence_step(curve, "chance", 0.1) == 9 and emergence_step(curve, "chance", 0.05) == 1
    assert emergence_step(curve, "chance", 0.3) is None
    assert emergence_step(curve.assign(low=float("nan")), "chance", 0) is None
    hole = [0.5, 0.0, 0.5, 0.2, float("nan")]  # a step that cannot be judged is not clear
    assert emergence_step(curve.assign(low=hole), "chance", 0) is None
    with pytest.raises(ValueError, match="10 rows for 5 steps"):
        emergence_step(pd.concat([curve, curve]), "chance", 0)


# ------------------------------------------------------ models whose weights are set by hand


@pytest.fixture(scope="module")
def made():
    """Repeats and documents over the vocabulary of the hand-made models."""
    return stimuli(HashedTables(vocabulary_size=VOCABULARY, tables=8), 24, CONTEXT)


def places(rows):
    """The (layer, head) that occur in these rows of a table."""
    return set(zip(rows["layer"], rows["head"], strict=True))


def test_a_working_induction_circuit_is_found(made):
    table = measure(induction_model(), made, rows=10)
    best = pick(table, score="induction", order=0, variant="best").set_index("stimulus")
    assert len(best) == 3 and places(best) == {(1, 1)}
    assert (best.low.drop("natural") > 0.999).all()
    # The head also looks into other documents, where nothing counts as a match.
    assert best.low["natural"] > 0.85
    # Short repeats of many words have their targets at one distance: there places explain much.
    beyond = best.low - best[["chance", "elsewhere"]].max(axis=1)
    assert (beyond.drop("random repeat") > 0.4).all() and beyond["random repeat"] > 0.2
    previous = pick(table, score="previous-token", variant="best")
    assert places(previous) == {(0, 0)} and (previous.value > 0.999).all()
    heads = pick(table, score="induction", order=0, variant="head")
    others = heads[(heads.layer != 1) | (heads["head"] != 1)]
    assert len(others) == 9 and (others.value < others.chance + 0.1).all()
    released = pick(table, variant="as released", stimulus="random repeat", order=3)
    assert float(released.value.iloc[0]) < 0.1
    gain = pick(table, score="second-copy gain", stimulus="random repeat")
    assert float(gain.low.iloc[0]) > 1


def test_an_untrained_model_scores_at_chance(made):
    table = measure(build_model("gpt2", VOCABULARY, **SIZES), made)
    best = pick(table, score="induction", order=0, variant="best")
    assert (best.value - best.chance).abs().max() < 0.05


def test_the_circuit_predicts_and_does_not_without_its_head():
    model = induction_model()
    with torch.no_grad():
        predicted = model(input_ids=DISTINCT).logits.argmax(-1)
    assert torch.equal(predicted[:, HALF:-1], DISTINCT[:, HALF + 1 :])
    assert ablated_losses(model, DISTINCT, [], "mean")[:, HALF:].max() < 0.1
    assert ablated_losses(model, DISTINCT, [(1, 1)], "mean")[:, HALF:].mean() > 1
    assert ablated_losses(model, DISTINCT, [(1, 0)], "mean")[:, HALF:].max() < 0.1


def test_a_duplicate_token_head_is_high_as_released_only(made):
    table = pick(measure(duplicate_model(), made), stimulus="random repeat")
    released = pick(table, score=RELEASED)
    assert len(released) == 10 and places(released) == {(0, 1)}
    assert released.value.min() > 0.8 and released.value.max() - released.value.min() < 0.05
    head = pick(table, score="induction", variant="head", layer=0, head=1)
    assert len(head) == 1 + LONGEST and (head.value <= head.chance + 0.02).all()
    assert pick(table, score="duplicate-token", variant="best").value.iloc[0] > 0.99
