"""Sentences of a grammar, all trees level by level: no recursion, and nothing is kept."""

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from latentree.data import counter
from latentree.data.corpus import position_within


class Derivations:
    """Draws derivations of a grammar that may be recursive.

    All nonterminals of a level of all trees are rewritten at once. A node's key follows from its
    parent's and from which of its nonterminals it is, so that a tree depends on its own key alone.
    """

    def __init__(self, grammar):
        self._grammar, self._on = grammar, {}
        rules = sorted(enumerate(grammar.productions), key=lambda rule: rule[1].left)
        self._choices = torch.tensor([i for i, _ in rules])  # the production of each rule
        rules = [rule for _, rule in rules]
        laws = [[] for _ in grammar.nonterminals]
        for rule in rules:
            laws[rule.left].append(rule.probability)
        limits = [counter.thresholds(law) + (s << counter.BITS) for s, law in enumerate(laws)]
        below = [torch.tensor(rule.nonterminals, dtype=torch.int64) for rule in rules]
        roles = torch.tensor([len(rule.roles) for rule in rules])
        nodes = torch.tensor([len(row) for row in below])
        spots, before = self._spots(rules)
        self._tables = [torch.cat(limits), roles, roles.cumsum(0) - roles, nodes]
        self._tables += [pad_sequence(below, True), pad_sequence(before, True), torch.tensor(spots)]

    def _spots(self, rules):
        """Of each role in a production: (role, nonterminals before it, whom it follows or -1).

        Whom it follows is a number among the production's roles. And for each production how many
        roles stand before its start, its first nonterminal, its second one, ...
        """
        number, habits = (
            {r: i for i, r in enumerate(self._grammar.roles)},
            self._grammar.file.habits,
        )
        spots, before = [], []
        for rule in rules:
            begins, seen = [0], 0
            for symbol in rule.right:
                if not isinstance(symbol, str):
                    begins.append(seen)
                    continue
                followed, seen = habits.get(symbol), seen + 1
                parent = rule.roles.index(followed) if followed in rule.roles else -1
                spots.append((number[symbol], len(begins) - 1, parent))
            before.append(torch.tensor(begins))
        return spots, before

    def _grow(self, key):
        """The levels of the trees, the roots first: a list of (rule, parent, child, first).

        Of each node: its rule, its parent (index into the level above), which of that one's
        nonterminals it is, and where its own children begin in the level below.
        """
        limits, _, _, nodes, below, *_ = self._to(key.device)
        symbol, parent, levels = torch.zeros_like(key), torch.zeros_like(key), []
        child = parent
        while len(symbol):
            drawn = counter.uniform(key) + (symbol << counter.BITS)
            rule = torch.searchsorted(limits, drawn, right=True)
            count = nodes[rule]
            levels.append((rule, parent, child, count.cumsum(0) - count))
            parent = torch.arange(len(rule), device=key.device).repeat_interleave(count)
            child = position_within(parent)
            key, symbol = counter.subkey(key[parent], child), below[rule[parent], child]
        return levels

    def _laid_out(self, levels):
        """Rule, first and last token (and one) of all nodes, and where a node's children begin.

        Nodes go by levels; each sentence has one more token, its end.
        """
        _, roles, _, nodes, _, before, _ = self._to(levels[0][0].device)
        lengths, sums = [], []  # of a level's nodes, and what they sum to before each
        for rule, _, _, first in reversed(levels):
            length = roles[rule]
            if lengths:
                length = length + sums[-1][first + nodes[rule]] - sums[-1][first]
            lengths.append(length)
            sums.append(pad(length.cumsum(0), (1, 0)))
        lengths, sums = lengths[::-1], sums[::-1]
        begins = [sums[0][:-1] + torch.arange(len(lengths[0]), device=lengths[0].device)]
        for (above, _, _, first), (_, parent, child, _), total in zip(levels, levels[1:], sums[1:]):
            beside = before[above[parent], child + 1] + total[:-1] - total[first[parent]]
            begins.append(begins[-1][parent] + beside)
        offset, children = 0, []
        for rule, _, _, first in levels:
            offset += len(rule)
            children.append(first + offset)
        begin = torch.cat(begins)
        rule = torch.cat([rule for rule, *_ in levels])
        return rule, begin, begin + torch.cat(lengths), torch.cat(children)

    def draw(self, key) -> dict:
        """Fields role, place, binds_to (-1: no word), sentence (tokens,) of a sentence a key."""
        _, roles, first_spot, _, _, before, spots = self._to(key.device)
        rule, begin, end, children = self._laid_out(self._grow(key))
        node = torch.arange(len(rule), device=key.device).repeat_interleave(roles[rule])
        number = position_within(node)  # among the roles of its production
        role, nodes, parent = spots[first_spot[rule[node]] + number].T
        edge = end[(children[node] + nodes - 1).clamp(max=len(end) - 1)]  # of the child before
        at = edge.where(nodes > 0, begin[node]) + number - before[rule[node], nodes]
        lengths = end[: len(key)] - begin[: len(key)] + 1
        sentence = torch.arange(len(key), device=key.device).repeat_interleave(lengths)
        place = position_within(sentence)
        of_token = torch.full_like(place, len(self._grammar.roles) - 1)
        of_token[at] = role
        binds_to = torch.full_like(place, -1)
        if self._grammar.file.binding > 0:
            token = torch.arange(len(node), device=key.device)
            followed = place[at[token - number + parent.clamp(min=0)]]
            binds_to[at] = followed.where(parent >= 0, -1)
        return {"role": of_token, "place": place, "binds_to": binds_to, "sentence": sentence}

    def shapes(self, key) -> tuple[list, torch.Tensor]:
        """The Shapes of the sentences, and which of them each key has: (sentence,)."""
        levels = self._grow(key)
        rule, begin, _, _ = self._laid_out(levels)
        sizes = torch.tensor([len(rule) for rule, *_ in levels], device=key.device)
        depth = torch.arange(len(levels), device=key.device).repeat_interleave(sizes)
        # Leftmost: by where they begin, and of those that begin together the highest first.
        order = (begin * len(levels) + depth).argsort()
        sentence = torch.searchsorted(begin[: len(key)], begin[order], right=True) - 1
        chosen = self._choices.to(key.device)[rule[order]].cpu()
        found, numbers = {}, []
        for choices in chosen.split(torch.bincount(sentence).tolist()):
            numbers.append(found.setdefault(tuple(choices.tolist()), len(found)))
        shapes = [self._grammar.shape(choices) for choices in found]
        return shapes, torch.tensor(numbers, device=key.device)

    def _to(self, device):
        if device not in self._on:
            self._on[device] = [table.to(device) for table in self._tables]
        return self._on[device]
