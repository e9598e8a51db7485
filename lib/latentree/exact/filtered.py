"""The exact law of the next symbol in filtered trees, for every filter."""

import torch

from latentree.data.filtered import FilteredTree


def next_symbol_laws(process: FilteredTree, leaves: torch.Tensor, filter: int) -> torch.Tensor:
    """P(leaf | the leaves before it) under a filter: (sequence, leaf, symbol), float64.

    `leaves` (sequence, 2**depth) may come from any filter: all strings are possible under each. The
    blocks below the filter's level are read one after the other; each tells of its node, and so of
    the root.
    """
    children, found = process.children, []
    root = torch.full((len(leaves), process.symbols), 1 / process.symbols, dtype=torch.float64)
    for marginal, block in zip(process.marginals(filter), leaves.chunk(2**filter, 1)):
        found.append(_laws(children, root @ marginal, block))
        root = _normalised(root * (_likelihood(children, block) @ marginal.T))
    return torch.cat(found, 1)


def _laws(children, prior, leaves):
    """The same within one whole tree, whose top has the law `prior` (sequence, symbol)."""
    if leaves.shape[1] == 1:
        return prior[:, None]
    left, right = leaves.chunk(2, 1)
    told = _likelihood(children, left)
    of_right = _normalised(torch.einsum("na,abc,nb->nc", prior, children, told))
    of_left = prior @ children.sum(2)
    return torch.cat([_laws(children, of_left, left), _laws(children, of_right, right)], 1)


def _likelihood(children, leaves):
    """P(leaves | the top of their tree) (sequence, symbol), up to a factor for each sequence."""
    if leaves.shape[1] == 1:
        return torch.nn.functional.one_hot(leaves[:, 0], len(children)).double()
    left, right = (_likelihood(children, half) for half in leaves.chunk(2, 1))
    return _normalised(torch.einsum("abc,nb,nc->na", children, left, right))


def _normalised(weights):
    return weights / weights.sum(-1, keepdim=True)
