"""Probes on states that hold the tree or the latent exactly, and on states that do not."""

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
    structural_probe,
    structure,
    uuas,
    whole_sentences,
)

torch.set_num_threads(1)


def nested(sequences=200, context=32, longest=8):
    """Windows of a recursive grammar, their documents' shapes, and their sentences."""
    process = GrammarProcess(make(RECURSIVE))
    rows = held_out(process, sequences, context)
    shapes = process.documents([0]).shapes
    return rows, shapes, whole_sentences(rows, shapes, longest)


def tree_of(rows, shapes, sentences, number):
    """The tree of a sentence, and its words' ways from the root."""
    row, places = sentences.row[number], sentences.column[number]
    places = places[places >= 0]
    tree = shapes[int(rows["shape"][row, places[0]])].tree
    assert rows["place"][row, places].tolist() == list(range(len(tree.leaves()) - 1))
    return [tree.leaf_treeposition(word) for word in range(len(places))]


def embedded(rows, shapes, sentences, width=64):
    """States whose squared distances are the tree's: a coordinate for each edge, 1 below it."""
    states = torch.zeros(len(sentences.row), sentences.column.shape[1], width)
    for number in range(len(sentences.row)):
        edges = {}
        for word, way in enumerate(tree_of(rows, shapes, sentences, number)):
            for end in range(1, len(way) + 1):
                states[number, word, edges.setdefault(way[:end], len(edges))] = 1
    return states


def means(scores):
    return {name: values.nanmean(1).tolist() for name, values in scores.items()}


def test_distances_and_depths_are_those_of_the_derivation():
    rows, shapes, sentences = nested()
    for number in range(0, len(sentences.row), 7):
        ways = tree_of(rows, shapes, sentences, number)
        for a, way in enumerate(ways):
            assert sentences.depth[number, a] == len(way)
            for b, other in enumerate(ways):
                apart = 0
                while way[: len(way) - apart] != other[: len(way) - apart]:
                    apart += 1
                shared = len(way) - apart
                assert sentences.distance[number, a, b] == len(way) + len(other) - 2 * shared
    assert sentences.distance.nan_to_num(0).unique().numel() > 3


def test_shuffled_trees_are_those_of_other_sentences_as_long():
    _, _, sentences = nested()
    shuffled, length = sentences.shuffled(), (sentences.column >= 0).sum(1)
    assert torch.equal((~shuffled.depth.isnan()).sum(1), length)
    assert not torch.equal(shuffled.depth, sentences.depth)
    for n in length.unique():
        before, after = sentences.depth[length == n, :n], shuffled.depth[length == n, :n]
        assert sorted(before.tolist()) == sorted(after.tolist())


def test_a_tree_in_the_states_is_found_and_none_is_not():
    rows, shapes, sentences = nested()
    tree, noise = embedded(rows, shapes, sentences), torch.randn(*sentences.column.shape, 64)
    scaled = tree @ torch.diag(torch.logspace(-1.5, 1.5, 64))  # a linear map is no obstacle
    states = torch.stack([tree, noise, scaled])
    row, scores = structural_probe(states, sentences, rank=64, steps=400)
    assert torch.equal(row, sentences.row[sentences.row > sentences.row.max() // 2])
    found = means(scores)
    assert found["uuas"][0] > 0.99 and found["spearman"][0] > 0.98 and found["depth"][0] > 0.97
    assert abs(found["spearman"][1]) < 0.15 and abs(found["depth"][1]) < 0.15
    assert found["uuas"][2] > 0.97
    draw = torch.rand(50, *sentences.distance.shape)
    chance = uuas(draw + draw.mT, sentences.distance, sentences.column >= 0).nanmean()
    assert abs(found["uuas"][1] - chance) < 0.04
    _, scores = structural_probe(states[:1], sentences.shuffled(), rank=64, steps=400)
    assert found["uuas"][0] > means(scores)["uuas"][0] + 0.03


def test_inputs_are_trained_apart():
    rows, shapes, sentences = nested(60)
    tree, noise = embedded(rows, shapes, sentences), torch.randn(*sentences.column.shape, 64)
    _, one = structural_probe(torch.stack([tree, noise]), sentences, steps=20)
    _, other = structural_probe(torch.stack([tree, tree * 5]), sentences, steps=20)
    assert torch.equal(one["uuas"][0], other["uuas"][0])


def test_where_place_gives_the_tree_place_alone_scores_one():
    clauses = "Sentence -> Clause 'and' Clause [1.0]\nClause -> 'noun' 'verb' [1.0]"
    process = GrammarProcess(make(clauses))
    sentences = whole_sentences(held_out(process, 64, 32), process.documents([0]).shapes)
    table = structure(torch.randn(2, 64, 32, 3), sentences)
    assert len(table) == 3 * 5 * len(sentences.row[sentences.row > 31].unique())
    totals = table.groupby(["name", "input", "layer"])[["sum", "count"]].sum()
    score = totals["sum"] / totals["count"]
    assert score["uuas", "place", 0] == 1 and score["spearman", "place", 0] > 0.99
    for layer in (0, 1):
        assert score["uuas", "state", layer] < 0.9 < score["uuas", "place and state", layer]
    alone = structure(torch.randn(2, 64, 32, 3), sentences, inputs=("place",))
    assert set(alone["input"]) == {"place"} and alone["sum"].sum() > 0.99 * alone["count"].sum()
    assert torch.equal(sentences.shuffled().distance, sentences.distance)


def test_scores_are_summed_by_window():
    rows, shapes, sentences = nested(40)
    streams = torch.zeros(1, *rows["tokens"].shape, 64)
    states = embedded(rows, shapes, sentences)
    for row, column, state in zip(sentences.row, sentences.column, states):
        streams[0, row, column[column >= 0]] = state[column >= 0]
    table = structure(streams, sentences, inputs=("state",))
    row, scores = structural_probe(torch.nn.functional.pad(states, (0, 8))[None], sentences)
    here = table[table["name"] == "depth"]
    assert here["sequence"].tolist() == row.unique().tolist()
    for window, total, count in here[["sequence", "sum", "count"]].itertuples(index=False):
        kept = scores["depth"][0, row == window]
        assert total == pytest.approx(float(kept.nansum()), abs=0.05)
        assert count == (~kept.isnan()).sum()


@given(st.integers(2, 6), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_uuas_is_the_share_of_the_shortest_tree_for_the_gold_tree_that_is_nearest(nodes, seed):
    draw = torch.Generator().manual_seed(seed)
    predicted = torch.rand(1, 1, nodes, nodes, generator=draw)
    predicted = predicted + predicted.mT - 1  # also below 0
    gold = torch.randint(1, 4, (1, nodes, nodes), generator=draw).float()
    gold = torch.maximum(gold, gold.mT)
    there = torch.ones(1, nodes, dtype=torch.bool)
    shortest, _ = shortest_trees(predicted[0, 0])
    _, golden = shortest_trees(gold[0])
    best = max(len(shortest & tree) for tree in golden)
    assert uuas(predicted, gold, there) == pytest.approx(best / (nodes - 1))
    assert uuas(predicted, torch.full_like(gold, 2), there) == 1  # any tree joins sisters
    if nodes > 2:  # words that are not there do not count
        there[0, -1] = False
        whole = uuas(predicted[..., :-1, :-1], gold[:, :-1, :-1], there[:, :-1])
        assert uuas(predicted, gold, there) == whole


def shortest_trees(distance):
    """By brute force: one shortest spanning tree, a set of edges, and all that are as short."""
    nodes = len(distance)
    edges = [(a, b) for a in range(nodes) for b in range(a + 1, nodes)]
    found = {}
    for tree in spanning(edges, nodes):
        length = round(sum(float(distance[edge]) for edge in tree), 5)
        found.setdefault(length, []).append(frozenset(tree))
    least = found[min(found)]
    return least[0], least


def spanning(edges, nodes, tree=(), group=None):
    """All sets of `edges` that join all nodes without a loop."""
    group = group or list(range(nodes))  # of each node, its part
    if len(tree) == nodes - 1:
        yield tree
    for number, (a, b) in enumerate(edges):
        if group[a] != group[b]:
            joined = [group[a] if part == group[b] else part for part in group]
            yield from spanning(edges[number + 1 :], nodes, (*tree, (a, b)), joined)


def test_flat_trees_are_refused():
    process = GrammarProcess(make("Sentence -> 'noun' 'verb' 'and' [1.0]"))
    with pytest.raises(ValueError, match="shapes: none of 1 .* deeper"):
        whole_sentences(held_out(process, 4, 16), process.documents([0]).shapes)


# ---------------------------------------------------------------------- latents


def test_a_latent_in_the_states_is_read_and_none_is_at_chance():
    process = GrammarProcess(make())
    rows = held_out(process, 400, 12, annotate=top_word(process, "noun"))
    words = process.grammar.words[0]
    noise = torch.randn(400, 12, process.vocabulary_size)
    told = torch.nn.functional.one_hot(rows["top"], process.vocabulary_size) + 0.1 * noise
    at = torch.zeros(400, 12, dtype=torch.bool)
    at[:, [5, 11]] = True
    table = latent_probe(torch.stack([told, noise]), rows["top"], at, words)
    totals = table.groupby("layer")[["sum", "count"]].sum()
    assert totals["count"].tolist() == [400, 400]  # two places in 200 sequences
    share = totals["sum"] / totals["count"]
    assert share[0] == 1 and abs(share[1] - 1 / 5) < 4 * (0.16 / 400) ** 0.5


def test_the_ideal_decoder_names_the_word_seen_most_often_since_latents_were_drawn():
    process = GrammarProcess(make(redraw={"sentence": 1.0}))
    rows = held_out(process, 50, 20, annotate=top_word(process, "noun"))
    found = ideal_decoder(process.grammar, rows, "noun")
    nouns = process.grammar.words[0].tolist()
    for row in range(0, 50, 9):
        seen, unit = [], None
        for at in range(20):
            if rows["unit"][row, at] != unit:
                seen, unit = [], rows["unit"][row, at]
            seen.append(int(rows["tokens"][row, at]))
            counts = [seen.count(noun) for noun in nouns]
            best = [noun for noun, count in zip(nouns, counts) if count == max(counts)]
            assert found[row, at] == pytest.approx((int(rows["top"][row, at]) in best) / len(best))


def test_the_ideal_decoder_is_as_often_right_as_its_posterior_says():
    process = GrammarProcess(make())
    rows = held_out(process, 3000, 8, annotate=top_word(process, "noun"))
    nouns, law = process.grammar.words[0].tolist(), process.grammar.frequencies[0]
    says = []
    for tokens in rows["tokens"][:300]:
        counts = np.array([(tokens == noun).sum() for noun in nouns])
        weight = np.zeros(5)
        for ranks in permutations(range(5)):
            weight[ranks.index(0)] += np.prod(law[list(ranks)] ** counts)
        assert weight[counts.argmax()] == pytest.approx(weight.max())
        says.append(weight.max() / weight.sum())
    right = ideal_decoder(process.grammar, rows, "noun")[:, 7]
    assert abs(right.mean() - np.mean(says)) < 4 * (0.25 / 3000 + np.var(says) / 300) ** 0.5


def test_latents_without_an_ideal_decoder_are_refused():
    followed = {"binding": 0.5, "habits": {"verb": "noun"}}
    for fields, role in (({}, "and"), ({"redraw": {"document": 0.5}}, "noun"), (followed, "verb")):
        with pytest.raises(ValueError, match="choose another"):
            top_word(GrammarProcess(make(**fields)), role)
