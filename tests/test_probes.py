"""Probes on states that hold the tree or the latent exactly, and on states that do not hold it at all."""

from itertools import permutations

import numpy as np
import pytest
import torch
from grammars import RECURSIVE, make
from hypothesis import given, settings
from hypothesis import strategies as st
from latentree.data.corpus import held_out
from latentree.data.sampler import GrammarProcess
from latentree.exact.reader import ideal_decoder, top_word
from latentree.measure.probes import (
    latent_probe,
    residual_streams,
    spanning_tree,
    structural_probe,
    structure,
    uuas,
    whole_sentences,
    word_states,
)
from latentree.train.model import build_model
from scipy.sparse.csgraph import minimum_spanning_tree

torch.set_num_threads(1)
CHAINS = "Sentence -> 'noun' 'verb' 'and' Clause [0.5] | Clause 'and' 'noun' 'verb' [0.5]\nClause -> 'verb' 'noun' [1.0]"


def nested(sentences=200, context=32, longest=8):
    process = GrammarProcess(make(RECURSIVE))
    rows = held_out(process, sentences, context)
    shapes = process.documents([0]).shapes
    return process, rows, shapes, whole_sentences(rows, shapes, longest)


def test_distances_and_depths_are_those_of_the_derivation():
    _, rows, shapes, sentences = nested()
    for i in range(0, len(sentences.row), 7):
        places = sentences.column[i][sentences.column[i] >= 0]
        tree = shapes[int(rows["shape"][sentences.row[i], places[0]])].tree
        assert rows["place"][sentences.row[i], places].tolist() == list(
            range(len(tree.leaves()) - 1)
        )
        for a in range(len(places)):
            path_a = tree.leaf_treeposition(a)
            assert sentences.depth[i, a] == len(path_a)
            for b in range(len(places)):
                path_b = tree.leaf_treeposition(b)
                above = [
                    n for n in range(min(len(path_a), len(path_b)) + 1) if path_a[:n] == path_b[:n]
                ][-1]
                assert sentences.distance[i, a, b] == len(path_a) + len(path_b) - 2 * above
    assert sentences.distance.nan_to_num(0).unique().numel() > 3
    shuffled, length = sentences.shuffled(), (sentences.column >= 0).sum(1)
    assert torch.equal((~shuffled.depth.isnan()).sum(1), length) and not torch.equal(
        shuffled.depth, sentences.depth
    )
    for n in length.unique():
        before, after = (
            sorted(x[length == n, :n].tolist()) for x in (sentences.depth, shuffled.depth)
        )
        assert before == after


def embedded(shapes, rows, sentences, width=64):
    """States whose squared distances are the tree's: a coordinate for each edge, 1 below it."""
    states = torch.zeros(len(sentences.row), sentences.column.shape[1], width)
    for i, (row, column) in enumerate(zip(sentences.row, sentences.column)):
        tree, edges = shapes[int(rows["shape"][row, column[0]])].tree, {}
        for word in range(int((column >= 0).sum())):
            path = tree.leaf_treeposition(word)
            for end in range(1, len(path) + 1):
                states[i, word, edges.setdefault(path[:end], len(edges))] = 1
    return states


def means(scores):
    return {name: values.nanmean(1).tolist() for name, values in scores.items()}


def test_a_tree_in_the_states_is_found_and_none_is_not():
    _, rows, shapes, sentences = nested()
    states = torch.stack(
        [embedded(shapes, rows, sentences), torch.randn(*sentences.column.shape, 64)]
    )
    row, scores = structural_probe(states, sentences, rank=64, steps=400)
    assert torch.equal(row, sentences.row[sentences.row > sentences.row.max() // 2])
    found = means(scores)
    assert found["uuas"][0] > 0.99 and found["spearman"][0] > 0.98 and found["depth"][0] > 0.97
    assert abs(found["spearman"][1]) < 0.15 and abs(found["depth"][1]) < 0.15
    there = sentences.column >= 0
    chance = uuas(torch.rand(50, *sentences.distance.shape), sentences.distance, there).nanmean()
    assert abs(found["uuas"][1] - chance) < 0.04
    _, shuffled = structural_probe(states, sentences.shuffled(), rank=64, steps=400)
    shuffled = means(shuffled)
    assert (
        found["uuas"][0] > shuffled["uuas"][0] + 0.03
        and abs(found["uuas"][1] - shuffled["uuas"][1]) < 0.05
    )
    _, whitened = structural_probe(
        states @ torch.diag(torch.logspace(-1.5, 1.5, 64)), sentences, rank=64, steps=400
    )
    assert means(whitened)["uuas"][0] > 0.97  # a linear map of the states is no obstacle


def test_where_place_gives_the_tree_place_alone_scores_one_and_shuffled_trees_are_the_trees():
    process = GrammarProcess(
        make("Sentence -> Clause 'and' Clause [1.0]\nClause -> 'noun' 'verb' [1.0]")
    )
    rows = held_out(process, 64, 32)
    sentences = whole_sentences(rows, process.documents([0]).shapes)
    states, inputs = word_states(torch.randn(2, 64, 32, 3), sentences)
    assert inputs == [
        ("place", 0),
        ("state", 0),
        ("state", 1),
        ("place and state", 0),
        ("place and state", 1),
    ]
    assert (
        states.shape[0] == 5
        and states.shape[-1] == 3 + 5
        and (states[0, 0, :, 3:] == torch.eye(5)).all()
    )
    assert (states[1, ..., 3:] == 0).all() and torch.equal(states[3], states[0] + states[1])
    _, scores = structural_probe(states, sentences)
    found = means(scores)
    assert (
        found["uuas"][0] == 1
        and found["spearman"][0] > 0.99
        and found["uuas"][1] < 0.9 < found["uuas"][3]
    )
    assert torch.equal(sentences.shuffled().distance, sentences.distance)


def test_scores_of_a_model_are_summed_by_window():
    process, rows, shapes, sentences = nested(40)
    model = build_model("llama", process.vocabulary_size, 2, 16, 2, 32).eval()
    table = structure(model, rows["tokens"], sentences)
    row, scores = structural_probe(
        word_states(residual_streams(model, rows["tokens"]), sentences)[0], sentences
    )
    here = table[(table["input"] == "state") & (table["layer"] == 2) & (table["name"] == "uuas")]
    assert len(here) == len(row.unique()) and here["sum"].sum() == pytest.approx(
        float(scores["uuas"][3].nansum())
    )
    assert here["count"].tolist() == row.bincount()[row.unique()].tolist()
    assert set(zip(table["input"], table["layer"])) == {("place", 0)} | {
        (i, n) for i in ("state", "place and state") for n in range(3)
    }


def test_layers_are_trained_apart():
    _, rows, shapes, sentences = nested(60)
    states = torch.stack(
        [embedded(shapes, rows, sentences), torch.randn(*sentences.column.shape, 64)]
    )
    _, together = structural_probe(states, sentences, steps=20)
    _, again = structural_probe(torch.stack([states[0], states[0] * 5]), sentences, steps=20)
    assert torch.equal(together["uuas"][0], again["uuas"][0])


@given(st.integers(2, 9), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_spanning_trees_are_minimal_and_uuas_counts_ties_for_the_prediction(nodes, seed):
    draw = torch.Generator().manual_seed(seed)
    distance = torch.rand(3, nodes, nodes, generator=draw)
    distance = distance + distance.transpose(1, 2)
    edges = spanning_tree(distance)
    assert (edges.sum((1, 2)) == 2 * (nodes - 1)).all() and torch.equal(
        edges, edges.transpose(1, 2)
    )
    for d, e in zip(distance.numpy(), edges.numpy()):
        assert (d * e).sum() / 2 == pytest.approx(
            minimum_spanning_tree(np.triu(d, 1)).sum(), rel=1e-5
        )
    gold, there = torch.full((1, nodes, nodes), 2.0), torch.ones(1, nodes, dtype=torch.bool)
    assert (uuas(distance[:, None], gold, there) == 1).all()  # any tree joins sisters
    assert (uuas(distance[:, None], distance[:1].argsort(-1).argsort(-1).float(), there) <= 1).all()
    there[0, nodes // 2 + 1 :] = False
    part = uuas(distance[:, None], distance[:1] * 1e6, there)
    assert part[0] == 1 or nodes // 2 == 0


def test_flat_trees_are_refused():
    process = GrammarProcess(make("Sentence -> 'noun' 'verb' 'and' [1.0]"))
    with pytest.raises(ValueError, match="deeper"):
        whole_sentences(held_out(process, 4, 16), process.documents([0]).shapes)


def test_streams_are_those_of_the_model():
    for architecture in ("llama", "gpt_neox"):
        model = build_model(architecture, 12, 3, 16, 2, 16).eval()
        tokens = torch.randint(12, (5, 9))
        streams = residual_streams(model, tokens, rows=2)
        hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states
        assert streams.shape == (4, 5, 9, 16) and not streams.requires_grad
        for here, there in zip(streams[:-1], hidden):
            assert torch.allclose(
                here, there, atol=1e-5
            )  # the last of transformers' has passed the final norm


def test_a_latent_in_the_states_is_read_and_none_is_at_chance():
    process = GrammarProcess(make())
    rows = held_out(process, 400, 12, annotate=top_word(process, "noun"))
    words = process.grammar.words[0]
    told = torch.nn.functional.one_hot(
        rows["top"], process.vocabulary_size
    ).float() + 0.1 * torch.randn(400, 12, process.vocabulary_size)
    at = torch.zeros(400, 12, dtype=torch.bool)
    at[:, [5, 11]] = True
    right = latent_probe(torch.stack([told, torch.randn_like(told)]), rows["top"], at, words)
    assert right[:, :200].isnan().all() and right[:, 200:][:, ~at[200:]].isnan().all()
    assert right[0].nanmean() == 1 and abs(right[1].nanmean() - 1 / 5) < 4 * (0.16 / 400) ** 0.5


def test_the_ideal_decoder_names_the_most_frequent_word_and_no_other_rule_does_better():
    process = GrammarProcess(make(redraw={"sentence": 1.0}))
    rows = held_out(process, 50, 20, annotate=top_word(process, "noun"))
    found = ideal_decoder(process.grammar, rows, "noun")
    nouns = process.grammar.words[0].tolist()
    for row in range(0, 50, 9):
        seen, unit = [], None
        for at in range(20):
            if rows["unit"][row, at] != unit:
                seen, unit = [], rows["unit"][row, at]
            seen += [t for t in [int(rows["tokens"][row, at])] if t in nouns]
            counts = [seen.count(noun) for noun in nouns]
            best = [noun for noun, count in zip(nouns, counts) if count == max(counts)]
            assert found[row, at] == pytest.approx((int(rows["top"][row, at]) in best) / len(best))
    process = GrammarProcess(make())  # calibrated: on average as often right as its posterior says
    rows = held_out(process, 3000, 8, annotate=top_word(process, "noun"))
    law, at = process.grammar.frequencies[0], 7
    says = []
    for tokens in rows["tokens"][:300, : at + 1]:
        counts = np.array([(tokens == noun).sum() for noun in nouns])
        weight = np.zeros(5)
        for ranks in permutations(range(5)):
            weight[ranks.index(0)] += np.prod(law[list(ranks)] ** counts)
        assert weight[counts.argmax()] == pytest.approx(weight.max())
        says.append(weight.max() / weight.sum())
    right = ideal_decoder(process.grammar, rows, "noun")[:, at]
    assert abs(right.mean() - np.mean(says)) < 4 * (0.25 / 3000 + np.var(says) / 300) ** 0.5


@pytest.mark.parametrize(
    "fields, role",
    [
        ({}, "and"),
        ({}, "none"),
        ({"redraw": {"document": 0.5}}, "noun"),
        ({"shared": 0.5}, "noun"),
        ({"binding": 0.5, "habits": {"verb": "noun"}}, "verb"),
    ],
)
def test_latents_without_an_ideal_decoder_are_refused(fields, role):
    with pytest.raises(ValueError, match="choose another"):
        top_word(GrammarProcess(make(**fields)), role)
