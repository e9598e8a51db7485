import json
from functools import partial

import pandas as pd
import pytest
import torch
from circuit_models import CONTEXT, SIZES, VOCABULARY, duplicate_model, induction_model
from grammars import make
from latentree.data.corpus import load_corpus
from latentree.data.ngrams import Chain, HashedTables
from latentree.data.sampler import GrammarProcess
from latentree.evidence.intervals import ratio
from latentree.inside.trace import ablated_losses
from latentree.measure import circuits
from latentree.measure.circuits import copying, k_composition
from latentree.measure.induction import (
    COLUMNS,
    attention_sums,
    chance,
    in_context_gain,
    measure,
    second_copy_gain,
)
from latentree.measure.selection import choose_and_score, control_heads, emergence_step
from latentree.measure.stimuli import (
    BOUND,
    LONGEST,
    RELEASED,
    Stimulus,
    match_orders,
    matched,
    stimuli,
)
from latentree.series.checkpoints import LocalSeries, save_checkpoint
from latentree.series.sweep import sweep
from latentree.train.model import build_model

torch.set_num_threads(1)
HALF = 16
SHUFFLED = [torch.randperm(40, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
DISTINCT = torch.stack([row[:HALF] for row in SHUFFLED]).repeat(1, 2)
FEW = torch.randint(
    3, (4, 40), generator=torch.Generator().manual_seed(0)
)  # three words: matches of every order


def scores(attention, stimulus):
    """{(score, order): value} of one head with attention (sequence, query, key)."""
    sums = attention_sums(attention[:, None], stimulus.targets)[..., 0]
    return dict(
        zip(
            stimulus.targets.names,
            (sums.sum(0) / stimulus.targets.queries.sum(0)).tolist(),
            strict=True,
        )
    )


def attending(stimulus, look_for):
    """Attention (sequence, query, key), uniform over the keys that `look_for(sequence, query)` lists; else the first."""
    sequences, length = stimulus.tokens.shape
    attention = torch.zeros(sequences, length, length)
    for s in range(sequences):
        for q in range(length):
            keys = look_for(s, q) or [0]
            attention[s, q, keys] = 1 / len(keys)
    return attention


def common(tokens, q, j):
    """The length of the longest context that positions j < q share, from the definition."""
    return max(
        n for n in range(j + 2) if torch.equal(tokens[j + 1 - n : j + 1], tokens[q + 1 - n : q + 1])
    )


def test_matches_agree_with_the_definition():
    document = torch.arange(40).expand(4, -1) // 13
    for longest, boundary in ((10, None), (2, None), (10, document)):
        expected = set()
        for s, row in enumerate(FEW):
            for q in range(40):
                for j in range(q):
                    start = 0 if boundary is None else q // 13 * 13
                    if j >= start and (n := common(row[start:], q - start, j - start)):
                        expected.add((s, q, j, min(n, longest + 1)))
        found = match_orders(FEW, boundary, longest)
        assert set(zip(*(x.tolist() for x in found), strict=True)) == expected
        assert len(found[0]) == len(expected) > 200


def test_matched_queries():
    document = torch.arange(40).expand(4, -1) // 13
    found = matched(Stimulus(FEW, document))
    for s, row in enumerate(FEW.tolist()):
        assert found[s].tolist() == [row[q] in row[q // 13 * 13 : q] for q in range(40)]


# On [r, r] of distinct tokens, the query i of the second copy has one match, of order i + 1.
ATTENTION = {
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


@pytest.mark.parametrize("look_for, expected", ATTENTION.values(), ids=ATTENTION)
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
        assert found["induction", n] == pytest.approx(1 / (HALF + n), abs=1e-6)
        assert found[RELEASED, n] == pytest.approx(
            sum(1 / (q + 1) for q in range(HALF + n, 32)) / (HALF - n), abs=1e-6
        )
    seen = sum(1 / (q + 1) for q in range(HALF, 32)) / HALF
    assert found["duplicate-token", 0] == pytest.approx(seen, abs=1e-6) == found["induction", 0]
    assert found["previous-token", 0] == pytest.approx(
        sum(1 / (q + 1) for q in range(1, 32)) / 31, abs=1e-6
    )
    for each in (stimulus, Stimulus(FEW), Stimulus(FEW, torch.arange(40).expand(4, -1) // 13)):
        uniform = scores(attending(each, lambda s, q: list(range(q + 1))), each)
        assert chance(each.targets).tolist() == pytest.approx(
            list(uniform.values()), nan_ok=True, abs=1e-6
        )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_heads_of_one_order_score_at_that_order_only(order):
    stimulus = Stimulus(FEW)
    attention = attending(
        stimulus, lambda s, q: [j + 1 for j in range(q) if common(FEW[s], q, j) == order]
    )
    found = scores(attention, stimulus)
    for n in range(1, 6):  # longer matches are rare in these tokens
        assert found["induction", n] == pytest.approx(float(n == order), abs=1e-6)
    assert 0.3 < found["induction", 0] < 1


def test_k_makes_no_difference_in_the_released_score():
    # What a head pays to its duplicate does not depend on the query's place, so dropping queries changes nothing.
    stimulus = Stimulus(DISTINCT, period=HALF)
    for share in (0.2, 0.7):
        attention = attending(stimulus, lambda s, q: [q - HALF] if q >= HALF else []) * share
        assert [scores(attention, stimulus)[RELEASED, k] for k in range(1, 11)] == pytest.approx(
            [share] * 10
        )
    # And it is blind to order: the induction score of the same head is 0 at each.
    assert all(scores(attention, stimulus)["induction", n] == 0 for n in range(LONGEST + 1))


def test_attention_in_chunks_is_the_same():
    stimulus = Stimulus(FEW)
    attention = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    parts = [
        attention_sums(attention[first : first + 3], stimulus.targets.of_sequences(first, 3))
        for first in (0, 3)
    ]
    torch.testing.assert_close(torch.cat(parts), attention_sums(attention, stimulus.targets))


def test_ratio_covers_what_it_should():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 9, (400, 30, 1), generator=generator)
    sums = (
        counts * 0.3
        + torch.randn(counts.shape, generator=generator, dtype=torch.float64) * counts.sqrt()
    )
    covered = [
        bool(low <= 0.3 <= high)
        for _, low, high in (ratio(s, c) for s, c in zip(sums, counts, strict=True))
    ]
    assert 0.92 < sum(covered) / 400 < 0.98
    value, low, high = ratio(torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[2, 0], [0, 0]]))
    assert value[0] == 1 and value[1].isnan() and low.isnan().all() and high.isnan().all()


def test_the_best_of_equal_heads_is_not_flattered():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 40, 100, generator=generator, dtype=torch.float64)
    count = torch.ones(40, dtype=torch.int64)
    best = [choose_and_score(sums, count) for sums in noise]
    assert abs(sum(float(value) for value, *_ in best)) / 200 < 0.03  # the plain maximum gives 0.4
    assert 0.9 < sum(bool(low < 0 < high) for _, low, high, _ in best) / 200 < 0.99
    value, _, _, chosen = choose_and_score(noise[0] + 2 * (torch.arange(100) == 7), count)
    assert chosen.tolist() == [7, 7] and abs(value - 2) < 0.6


def test_control_heads():
    chosen = [(3, 2), (1, 0), (3, 0)]
    drawn = {tuple(control_heads(chosen, 4, seed)) for seed in range(20)}
    assert drawn == {((1, head), (3, 1), (3, 3)) for head in (1, 2, 3)}
    with pytest.raises(ValueError, match="3 of the 4 heads of layer 0; choose at most half"):
        control_heads([(0, 0), (0, 1), (0, 2)], 4)


def test_gains():
    tokens = torch.tensor([[1, 2, 1, 2, 3, 1, 2], [1, 2, 3, 1, 2, 1, 2]])
    losses = torch.tensor([[5.0, 3.0, 2.0, 9.0, 9.0, 1.0], [4.0, 9.0, 9.0, 3.0, 9.0, 1.0]])
    total, count = in_context_gain(losses, Stimulus(tokens))
    assert total.tolist() == [3.0 + 4.0, 1.0 + 3.0] and count.tolist() == [2, 2]
    document = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [2, 2, 2, 3, 3, 3, 4]])
    total, count = in_context_gain(losses, Stimulus(tokens, document))
    assert total.tolist() == [1.0, 0.0] and count.tolist() == [1, 0]
    gain, count = second_copy_gain(torch.tensor([[7.0, 6.0, 99.0, 1.0, 2.0]]), 3)
    assert gain.tolist() == [6.0 + 4.0] and count.tolist() == [2]


def test_stimuli_of_every_process():
    grammar = GrammarProcess(make())
    for process in (
        grammar,
        Chain(grammar, order=1, sample_tokens=2000),
        HashedTables(vocabulary_size=30, tables=4),
    ):
        made = stimuli(process, 5, 20, seed=3)
        assert list(made) == ["natural", "legal repeat", "random repeat"]
        for name, stimulus in made.items():
            assert stimulus.tokens.shape == (5, 20)
            assert 0 <= stimulus.tokens.min() <= stimulus.tokens.max() < process.vocabulary_size
            assert (stimulus.document is None) == (stimulus.period == 10) == (name != "natural")
        assert torch.equal(made["legal repeat"].tokens, made["natural"].tokens[:, :10].repeat(1, 2))
        assert torch.equal(
            made["random repeat"].tokens[:, :10], made["random repeat"].tokens[:, 10:]
        )
        again, other = (stimuli(process, 5, 20, seed=s)["random repeat"].tokens for s in (3, 4))
        assert torch.equal(again, made["random repeat"].tokens) and not torch.equal(again, other)
    for sequences, context in ((5, 21), (5, 2), (1, 20)):
        with pytest.raises(ValueError, match=f"context = {context}, sequences = {sequences}"):
            stimuli(grammar, sequences, context)


def test_queries_before_a_bound_word():
    process = GrammarProcess(make(binding=1.0, habits={"verb": "noun"}))
    chain = Chain(process, order=2, sample_tokens=5000)
    for each in (process, chain):  # the chain's tokens tell their roles, for no role shares one
        natural = stimuli(each, 6, 20, grammar=process.grammar)["natural"]
        nouns, verbs = (
            set(process.grammar.words[process.grammar.roles.index(role)].tolist())
            for role in ("noun", "verb")
        )
        for row, marks in zip(natural.tokens.tolist(), natural.bound.tolist(), strict=True):
            assert marks == [
                a in nouns and b in verbs for a, b in zip(row, [*row[1:], -1], strict=True)
            ]
    assert stimuli(chain, 6, 20)["natural"].bound is None and natural.bound.any()
    # The score counts these queries only.
    attention = attending(natural, lambda s, q: [j + 1 for j in range(q) if natural.bound[s, q]])
    found, names = scores(attention, natural), natural.targets.names
    queries = dict(zip(names, natural.targets.queries.sum(0).tolist(), strict=True))
    assert queries[BOUND, 0] == (matched(natural) & natural.bound).sum() < queries["induction", 0]
    total = found["induction", 0] * queries["induction", 0]
    assert found[BOUND, 0] * queries[BOUND, 0] == pytest.approx(total) and total > 0
    assert sum(queries[BOUND, n] for n in range(1, 11)) >= queries[BOUND, 0]


def test_emergence_step():
    curve = pd.DataFrame(
        {"step": [9, 0, 1, 3, 27], "low": [0.5, 0.0, 0.5, 0.2, 0.4], "chance": 0.1}
    )
    assert emergence_step(curve, "chance", 0.1) == 9 and emergence_step(curve, 0.1, 0.05) == 1
    assert emergence_step(curve, "chance", 0.3) is None
    assert emergence_step(curve.assign(low=float("nan")), 0, 0) is None
    with pytest.raises(ValueError, match="10 rows for 5 steps"):
        emergence_step(pd.concat([curve, curve]), 0, 0)


# ---------------------------------------------------------------- models whose weights are set by hand


@pytest.fixture(scope="module")
def made():
    """Repeats and documents over the vocabulary of the hand-made models."""
    return stimuli(HashedTables(vocabulary_size=VOCABULARY, tables=8), 24, CONTEXT)


def measured(model, folder, made):
    """The table of a series of two checkpoints: an untrained model and `model`."""
    run = folder / "run"
    run.mkdir()
    (run / "training.json").write_text(
        json.dumps({"architecture": "gpt2", "vocabulary_size": VOCABULARY})
    )
    for step, each in enumerate((build_model("gpt2", VOCABULARY, **SIZES), model)):
        save_checkpoint(each, run, step)
    return sweep(
        LocalSeries(run), partial(measure, stimuli=made), folder / "scores.csv", progress=False
    )


def rows(table, **choice):
    for column, value in choice.items():
        table = table[table[column] == value]
    return table.set_index("stimulus") if "stimulus" not in choice else table


def test_pipeline_finds_a_working_induction_circuit(tmp_path, made):
    model = induction_model()
    table = measured(model, tmp_path, made)
    assert list(table) == ["step", *COLUMNS]
    best = rows(table, step=1, score="induction", order=0, variant="best")
    assert len(best) == 3 and set(zip(best["layer"], best["head"], strict=True)) == {(1, 1)}
    assert (best["value"].drop("natural") > 0.999).all() and (
        best["low"].drop("natural") > 0.999
    ).all()
    assert (
        best.loc["natural", "low"] > 0.85
    )  # the head also looks into other documents, where nothing counts as a match
    previous = rows(table, step=1, score="previous-token", variant="best")
    assert (
        set(zip(previous["layer"], previous["head"], strict=True)) == {(0, 0)}
        and (previous["value"] > 0.999).all()
    )
    others = table[
        (table.step == 1)
        & (table.score == "induction")
        & (table.variant == "head")
        & (table.order == 0)
    ]
    others = others[(others.layer != 1) | (others["head"] != 1)]
    assert (others.value < others.chance + 0.1).all()
    assert (
        rows(table, step=1, score=RELEASED, order=3, variant="as released").loc[
            "random repeat", "value"
        ]
        < 0.1
    )
    untrained = rows(table, step=0, score="induction", order=0, variant="best")
    assert (untrained["value"] - untrained["chance"]).abs().max() < 0.05
    copies = rows(table, step=1, score="copying", variant="head")
    assert (copies[(copies.layer == 1) & (copies["head"] == 1)]["value"] == 1).all()
    assert (copies[(copies.layer == 0) | (copies["head"] == 0)]["value"] == 0).all()
    curve = rows(table, stimulus="natural", score="induction", variant="best", order=0)
    assert emergence_step(curve, "chance", 0.1) == 1
    assert rows(table, step=1, score="second-copy gain").loc["random repeat", "low"] > 1

    # It predicts distinct tokens that come again, and does not without its head.
    with torch.no_grad():
        predicted = model(input_ids=DISTINCT).logits.argmax(-1)
    assert torch.equal(predicted[:, HALF:-1], DISTINCT[:, HALF + 1 :])
    assert ablated_losses(model, DISTINCT, [], "mean")[:, HALF:].max() < 0.1
    assert ablated_losses(model, DISTINCT, [(1, 1)], "mean")[:, HALF:].mean() > 1
    assert ablated_losses(model, DISTINCT, [(1, 0)], "mean")[:, HALF:].max() < 0.1

    # Its keys come from the previous-token head.
    fed = k_composition(model, (1, 1)).set_index(["layer", "head"])
    assert (
        fed["value"].idxmax() == (0, 0)
        and fed.loc[(0, 0), "value"] > fed.loc[(0, 0), "baseline_high"]
    )


def test_duplicate_token_head_is_high_as_released_only(tmp_path, made):
    table = measured(duplicate_model(), tmp_path, made)
    released = rows(table, step=1, score=RELEASED, variant="as released", stimulus="random repeat")
    assert (
        set(zip(released["layer"], released["head"], strict=True)) == {(0, 1)}
        and len(released) == 10
    )
    assert (released["value"] > 0.8).all() and released["value"].max() - released[
        "value"
    ].min() < 0.05
    head = rows(table, step=1, score="induction", variant="head", stimulus="random repeat")
    head = head[(head.layer == 0) & (head["head"] == 1)]
    assert len(head) == 1 + LONGEST and (head.value <= head.chance + 0.02).all()
    assert (
        rows(table, step=1, score="duplicate-token", variant="best").loc["random repeat", "value"]
        > 0.99
    )


# ---------------------------------------------------------------- weights


def test_copying_agrees_with_the_definition():
    model = build_model(
        "llama", 13, layers=2, width=16, heads=2, context=8, num_key_value_heads=1, seed=3
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += torch.rand(parameter.shape, generator=generator)
    tokens = torch.randint(13, (4, 8), generator=generator)
    found = copying(model, tokens)
    block = model.model.layers[1]
    v, o = (
        block.self_attn.v_proj.weight,
        block.self_attn.o_proj.weight[:, 8:],
    )  # the second head of the second layer
    with torch.no_grad():
        read = block.input_layernorm(model.model.embed_tokens.weight)
        logits = model.lm_head(model.model.norm(read @ v.T @ o.T))
    for s, row in enumerate(tokens.tolist()):
        pairs = [(a, b) for a in set(row) for b in set(row) if a != b]
        share = sum(bool(logits[a, a] > logits[a, b]) for a, b in pairs) / len(pairs)
        assert found[s, 3] == pytest.approx(2 * share - 1, abs=1e-6)


def test_copying_over_a_large_vocabulary_goes_sequence_by_sequence(monkeypatch):
    model, tokens = (
        build_model("olmo2", 13, layers=2, width=16, heads=2, context=8),
        torch.randint(13, (4, 8)),
    )
    together = copying(model, tokens)
    monkeypatch.setattr(circuits, "MOST_TOKENS", 2)
    assert torch.allclose(copying(model, tokens), together)


@pytest.mark.parametrize("architecture", ["llama", "olmo", "olmo2", "gpt_neox", "gpt2"])
def test_k_composition_of_random_weights_is_at_its_baseline(architecture):
    model = build_model(architecture, 13, layers=2, width=128, heads=4, context=8)
    found = k_composition(model, (1, 2))
    assert len(found) == 4 and (found["value"] / found["baseline"] - 1).abs().max() < 0.1
    for later in ((0, 1), (1, 4), (2, 0)):
        with pytest.raises(ValueError, match="later = "):
            k_composition(model, later)


def test_a_head_of_fixed_distance_scores_as_much_on_the_targets_of_another_sequence():
    """Sentences come in fours, so a head that always looks three tokens back meets what followed a match: by position."""
    stimulus = stimuli(load_corpus("bound"), 64, 64)["natural"]
    back = torch.zeros(64, 1, 64, 64)
    for q in range(64):
        back[:, 0, q, max(0, q - 3)] = 1
    number = stimulus.targets.names.index(("induction", 0))
    own, other = (
        attention_sums(back, t)[:, number, 0].sum() / t.queries[:, number].sum()
        for t in (stimulus.targets, stimulus.targets.of_another_sequence())
    )
    assert own > 0.15 and abs(own - other) < 0.03
