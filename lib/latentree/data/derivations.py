"""Sentences of a grammar, all trees level by level: no recursion, and nothing is kept.

A tree may be thousands of small levels deep, on which NumPy is several times faster than torch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from latentree.data import counter


class Derivations:
    """Draws derivations of a grammar that may be recursive.

    All nonterminals of a level of all trees are rewritten at once. A node's key follows from its
    parent's and from which of its nonterminals it is, so that a tree depends on its own key alone.
    """

    def __init__(self, grammar):
        self._grammar = grammar
        lefts = [rule.left for rule in grammar.productions]
        self._choices = np.argsort(lefts, stable=True)  # the production of each rule
        rules = [grammar.productions[i] for i in self._choices]
        laws = [[] for _ in grammar.nonterminals]
        for rule in rules:
            laws[rule.left].append(rule.probability)
        self._limits = counter.Laws(laws).limits.numpy()
        self._below = _padded([rule.nonterminals for rule in rules])
        self._nodes = np.array([len(rule.nonterminals) for rule in rules])
        self._roles = np.array([len(rule.roles) for rule in rules])
        self._first_spot = self._roles.cumsum() - self._roles
        # Of each role in a rule: (role, nonterminals before it, whom it follows), the last a number
        # among the rule's roles or -1; of each rule: the roles before its start, its first
        # nonterminal, its second one, ...
        spots, before = [], []
        for rule in rules:
            begins, seen = [0], 0
            for symbol in rule.right:
                if not isinstance(symbol, str):
                    begins.append(seen)
                    continue
                followed, seen = grammar.file.habits.get(symbol), seen + 1
                parent = rule.roles.index(followed) if followed in rule.roles else -1
                spots.append((grammar.roles.index(symbol), len(begins) - 1, parent))
            before.append(begins)
        self._spots, self._before = np.array(spots), _padded(before)

    def _grow(self, key):
        """The levels of the trees, the roots first: a list of (rule, parent, child, first).

        Of each node: its rule, its parent (index into the level above), which of that one's
        nonterminals it is, and where its own children begin in the level below.
        """
        key, levels = key.cpu().numpy(), []
        symbol = parent = child = np.zeros_like(key)
        while len(symbol):
            drawn = counter.uniform(key) + (symbol << counter.BITS)
            rule = self._limits.searchsorted(drawn, "right")
            count = self._nodes[rule]
            first = count.cumsum() - count
            levels.append((rule, parent, child, first))
            parent = np.arange(len(rule)).repeat(count)
            child = np.arange(len(parent)) - first[parent]
            key = counter.mix(key[parent] + (child + 1) * counter.GOLDEN)  # its subkey
            symbol = self._below[rule[parent], child]
        return levels

    def _laid_out(self, levels):
        """Of all nodes, by levels: rule, first token, last token (and one), where children begin.

        Each sentence has one more token, its end.
        """
        ends = []  # of a level's nodes, if they stood side by side
        for rule, _, _, first in reversed(levels):
            length = self._roles[rule]
            if ends:
                below = np.append(0, ends[-1])
                length = length + below[first + self._nodes[rule]] - below[first]
            ends.append(length.cumsum())
        lengths = [np.diff(end, prepend=0) for end in reversed(ends)]
        begins = [lengths[0].cumsum() - lengths[0] + np.arange(len(lengths[0]))]
        for here, below, length in zip(levels, levels[1:], lengths[1:]):
            (above, _, _, first), (_, parent, child, _) = here, below
            side = length.cumsum() - length
            side -= side[first[parent]]
            begins.append(begins[-1][parent] + self._before[above[parent], child + 1] + side)
        sizes = np.array([len(rule) for rule, *_ in levels])
        children = np.concatenate([first for *_, first in levels]) + sizes.cumsum().repeat(sizes)
        rule, begin = np.concatenate([rule for rule, *_ in levels]), np.concatenate(begins)
        return rule, begin, begin + np.concatenate(lengths), children

    def draw(self, key) -> dict:
        """Fields role, place, binds_to (-1: no word), sentence (tokens,) of a sentence a key."""
        rule, begin, end, children = self._laid_out(self._grow(key))
        node = np.arange(len(rule)).repeat(self._roles[rule])
        before = self._roles[rule].cumsum() - self._roles[rule]
        number = np.arange(len(node)) - before[node]  # among the roles of its production
        role, nodes, parent = self._spots[self._first_spot[rule[node]] + number].T
        edge = end[(children[node] + nodes - 1).clip(max=len(end) - 1)]  # of the child before
        at = np.where(nodes > 0, edge, begin[node]) + number - self._before[rule[node], nodes]
        lengths = end[: len(key)] - begin[: len(key)] + 1
        sentence = np.arange(len(key)).repeat(lengths)
        place = np.arange(len(sentence)) - begin[sentence]
        of_token = np.full_like(place, len(self._grammar.roles) - 1)
        of_token[at] = role
        binds_to = np.full_like(place, -1)
        if self._grammar.file.binding > 0:
            followed = place[at[np.arange(len(node)) - number + parent.clip(min=0)]]
            binds_to[at] = np.where(parent >= 0, followed, -1)
        fields = {"role": of_token, "place": place, "binds_to": binds_to, "sentence": sentence}
        return {name: torch.from_numpy(field).to(key.device) for name, field in fields.items()}

    def shapes(self, key) -> tuple[Sequence, torch.Tensor]:
        """The Shapes of the sentences, and which of them each key has: (sentence,)."""
        levels = self._grow(key)
        rule, begin, _, _ = self._laid_out(levels)
        depth = np.arange(len(levels)).repeat([len(rule) for rule, *_ in levels])
        # Leftmost: by where they begin, and of those that begin together the highest first.
        order = (begin * len(levels) + depth).argsort()
        sentence = begin[: len(key)].searchsorted(begin[order], "right") - 1
        last = np.bincount(sentence).cumsum()[:-1]
        found, numbers = {}, []
        for choices in np.split(self._choices[rule[order]], last):
            numbers.append(found.setdefault(tuple(choices.tolist()), len(found)))
        return _Shapes(self._grammar, list(found)), torch.tensor(numbers, device=key.device)


class _Shapes(Sequence):
    """The Shapes of derivations, each spelt out when it is asked for: most are not."""

    def __init__(self, grammar, derivations):
        self._grammar, self._derivations = grammar, derivations

    def __len__(self):
        return len(self._derivations)

    def __getitem__(self, number):
        return self._grammar.shape(self._derivations[number])


def _padded(rows):
    """Lists of numbers as an array (row, longest), 0 past their ends."""
    rows = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(rows, batch_first=True).numpy()
