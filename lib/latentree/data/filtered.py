"""Trees that a filter cuts: the same root and leaves, with more or less composition in between.

After Garnier-Brun, Mezard, Moscato and Saglietti 2025 (arXiv 2408.15138), here as text from left to
right. exact/filtered.py has the exact law of the next symbol.
"""

import torch
from nltk import Tree
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from latentree.data import counter
from latentree.data.corpus import Corpus, Documents, side_by_side, strictly


class FilteredTree(Corpus):
    """One binary tree a document: a mark that it begins (the last token), then 2**depth leaves.

    Each pair of symbols is what ONE parent can be replaced by: `symbols` pairs a parent, drawn at
    random, with log-normal weights exp(`spread` Normal(0, 1)): children (parent, left, right). The
    root is uniform. Filter k draws the 2**k nodes of level k independently given the root, each
    from its own marginal P(node | root), and whole trees grow below them: 0 is the whole hierarchy,
    and with `depth` the leaves share the root only. What the root says of each place is the same
    for all filters of a seed. ValueError for a filter deeper than the tree.
    """

    @strictly
    def __init__(
        self,
        name,
        filter: NonNegativeInt = 0,
        symbols: PositiveInt = 8,
        depth: PositiveInt = 4,
        spread: NonNegativeFloat = 2.0,
        seed=0,
        label: str = "",
    ):
        if not 0 <= filter <= depth:
            raise ValueError(f"filter = {filter}: give a level of the tree, from 0 to {depth}")
        content, length = [filter, symbols, depth, spread], 2**depth + 1
        super().__init__(name, "filtered tree", symbols + 1, None, length, content, seed, label)
        self.filter, self.symbols, self.depth = filter, symbols, depth
        draw = torch.Generator().manual_seed(seed)
        parent = torch.randperm(symbols**2, generator=draw) % symbols
        weight = (spread * torch.randn(symbols**2, dtype=torch.float64, generator=draw)).exp()
        own = weight * (parent == torch.arange(symbols)[:, None])
        self.children = (own / own.sum(1, keepdim=True)).view(symbols, symbols, symbols)
        self._pairs = counter.Laws(self.children.flatten(1))
        self._nodes = counter.Laws(self.marginals(filter).flatten(0, 1))

    def marginals(self, level):
        """P(node | root) of each node of a level: (2**level, root, node)."""
        of_child = torch.stack([self.children.sum(2), self.children.sum(1)])  # left, right
        found = torch.eye(self.symbols, dtype=torch.float64)[None]
        for _ in range(level):
            found = (found[:, None] @ of_child).flatten(0, 1)
        return found

    def documents(self, ids, device="cpu", detail=True) -> Documents:
        """Trees by number; fields level0, level1, ...: the node each token hangs below, or -1."""
        key = self._keys(ids, device)
        root = counter.below(self.symbols, counter.subkey(key, 0))[:, None]
        levels = {0: root}
        if self.filter:
            node = torch.arange(2**self.filter, device=device)
            drawn = counter.subkey(key[:, None], 1 + node)
            levels[self.filter] = self._nodes.draw(node * self.symbols + root, drawn)
        for level in range(self.filter, self.depth):
            node = 2 ** (level + 1) + torch.arange(2**level, device=device)
            drawn = counter.subkey(key[:, None], node)
            pair = self._pairs.draw(levels[level], drawn)
            below = torch.stack([pair // self.symbols, pair % self.symbols], -1)
            levels[level + 1] = below.flatten(1)
        begin = torch.full_like(root, self.symbols)
        none = torch.full_like(begin, -1)
        fields = {"tokens": torch.cat([begin, levels[self.depth]], 1)}
        for level in range(self.depth if detail else 0):
            above = levels.get(level, none)
            above = above.repeat_interleave(2**self.depth // above.shape[1], 1)
            fields[f"level{level}"] = torch.cat([none, above], 1)
        return side_by_side(fields)

    def tree(self, number) -> Tree:
        """The tree of a document, by its number, with letters for symbols."""
        fields = self.documents([number]).token
        fields[f"level{self.depth}"] = fields["tokens"]

        def grown(level, node):
            label = chr(65 + fields[f"level{level}"][1 + node * 2 ** (self.depth - level)])
            if level == self.depth:
                return label
            below = max(level + 1, self.filter)
            width = 2 ** (below - level)
            return Tree(label, [grown(below, node * width + child) for child in range(width)])

        return grown(0, 0)
