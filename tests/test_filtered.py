"""Filtered trees: the sampler and the exact law against enumeration of all trees."""

from itertools import product

import pytest
import torch
from latentree.data.corpus import HELD_OUT, Stream, held_out, load_corpus
from latentree.data.filtered import FilteredTree
from latentree.exact.filtered import next_symbol_laws

FILTERS = range(5)


def tree(filter, **sizes):
    return FilteredTree("tree", filter, **{"symbols": 2, "depth": 2, "seed": 3} | sizes)


def leaves_of(process, count):
    return held_out(process, count, 2**process.depth + 1)["tokens"][:, 1:]


def below(children, top, depth):
    """{leaves: probability} of a whole tree below a symbol, by enumeration."""
    if depth == 0:
        return {(top,): 1.0}
    found = {}
    for left, right in product(range(len(children)), repeat=2):
        ends = [below(children, child, depth - 1).items() for child in (left, right)]
        for (one, p), (other, q) in product(*ends):
            chance = float(children[top, left, right]) * p * q
            found[one + other] = found.get(one + other, 0.0) + chance
    return found


def enumerated(process):
    """P(leaves) of every string (symbol, ...) of a filtered tree: nodes drawn one by one."""
    size, level = process.symbols, process.filter
    joint = torch.zeros((size,) * 2**process.depth, dtype=torch.float64)
    for root in range(size):
        blocks = []
        for node in range(2**level):
            place = node * 2 ** (process.depth - level)
            block = {}
            for symbol in range(size):
                chance = node_marginal(process.children, root, level, node)[symbol]
                for ends, p in below(process.children, symbol, process.depth - level).items():
                    block[ends] = block.get(ends, 0.0) + float(chance) * p
            assert place + len(next(iter(block))) <= 2**process.depth
            blocks.append(block.items())
        for parts in product(*blocks):
            chance = 1 / size
            for _, p in parts:
                chance *= p
            joint[sum((ends for ends, _ in parts), ())] += chance
    return joint


def node_marginal(children, root, level, node):
    """P(node | root), walking down its path: a bit of the node's number for each level."""
    at = torch.zeros(len(children), dtype=torch.float64)
    at[root] = 1.0
    for step in reversed(range(level)):
        at = at @ children.sum(1 if node >> step & 1 else 2)
    return at


@pytest.mark.parametrize("symbols, depth", [(2, 2), (3, 2), (2, 3)])
def test_the_law_is_that_of_all_trees_enumerated(symbols, depth):
    for filter in range(depth + 1):
        process = tree(filter, symbols=symbols, depth=depth)
        joint = enumerated(process)
        assert float(joint.sum()) == pytest.approx(1)
        every = torch.tensor(list(product(range(symbols), repeat=2**depth)))
        laws = next_symbol_laws(process, every, filter)
        for at in range(2**depth):
            rest = joint.sum(tuple(range(at + 1, 2**depth))) if at + 1 < 2**depth else joint
            expected = (rest / rest.sum(-1, keepdim=True))[tuple(every[:, :at].T)]
            torch.testing.assert_close(laws[:, at], expected.expand_as(laws[:, at]))


def test_the_sampler_draws_what_is_enumerated():
    for filter in range(3):
        process = tree(filter)
        drawn = leaves_of(process, 20_000)
        number = (drawn * torch.tensor([8, 4, 2, 1])).sum(1)
        share = torch.bincount(number, minlength=16) / len(drawn)
        assert (share - enumerated(process).flatten()).abs().max() < 0.015


def test_laws_sum_to_one_and_nothing_is_impossible():
    shown = leaves_of(load_corpus("filtered-4"), 50)
    for filter in FILTERS:
        laws = next_symbol_laws(load_corpus("filtered-0"), shown, filter)
        torch.testing.assert_close(laws.sum(-1), torch.ones(50, 16, dtype=torch.float64))
        assert laws.min() > 0


def test_filters_share_productions_roots_and_what_the_root_says_of_each_place():
    corpora = [load_corpus(f"filtered-{filter}", seed=5) for filter in FILTERS]
    ids = HELD_OUT + torch.arange(20_000)
    found = []
    for corpus in corpora:
        assert torch.equal(corpus.children, corpora[0].children)
        fields = corpus.documents(ids).token
        rows = torch.stack([fields["tokens"], fields["level0"]], 1).view(-1, 17, 2)[:, 1:]
        joint = rows[..., 1] * 8 + rows[..., 0] + 64 * torch.arange(16)
        found.append(torch.bincount(joint.flatten(), minlength=1024) / len(ids))
        assert torch.equal(rows[:, 0, 1], rows[:, -1, 1])  # one root
    exact = (corpora[0].marginals(4) / 8).flatten()  # (leaf, root, symbol)
    for share in found:
        assert (share - exact).abs().max() < 0.01


def test_each_filter_less_knows_more():
    shown = leaves_of(load_corpus("filtered-0"), 1000)
    losses = []
    for filter in FILTERS:
        laws = next_symbol_laws(load_corpus("filtered-0"), shown, filter)
        losses.append(float(-laws.gather(-1, shown[..., None]).log().mean()))
    assert losses == sorted(losses) and losses[4] - losses[0] > 0.3


def test_each_law_is_best_on_its_own_text():
    for filter in FILTERS:
        corpus = load_corpus(f"filtered-{filter}")
        shown = leaves_of(corpus, 1000)
        losses = []
        for other in FILTERS:
            laws = next_symbol_laws(corpus, shown, other)
            losses.append(float(-laws.gather(-1, shown[..., None]).log().mean()))
        assert min(losses) == losses[filter]


def test_nodes_have_the_children_that_the_tree_says():
    corpus = load_corpus("filtered-2")
    rows = held_out(corpus, 200, 17)
    assert (rows["level1"] == -1).all() and (rows["tokens"][:, 0] == corpus.symbols).all()
    above = rows["level2"][:, 1:].view(-1, 4, 4)
    middle = rows["level3"][:, 1:].view(-1, 8, 2)
    last = rows["tokens"][:, 1:].view(-1, 8, 2)
    assert (corpus.children[above[..., 0], middle[:, ::2, 0], middle[:, 1::2, 0]] > 0).all()
    assert (corpus.children[middle[..., 0], last[..., 0], last[..., 1]] > 0).all()
    parents = (corpus.children > 0).sum(0)
    assert (parents == 1).all()  # each pair has one


def test_a_training_window_is_one_tree():
    corpus = load_corpus("filtered-1")
    batch = Stream(corpus, 4, 17).next_batch()
    assert torch.equal(batch.flatten(), corpus.documents(torch.arange(4)).tokens)


def test_a_filter_deeper_than_the_tree_is_refused():
    with pytest.raises(ValueError, match="filter = 5: give a level of the tree, from 0 to 4"):
        FilteredTree("tree", 5)
