"""What may come next: exact prefix probabilities, by a probabilistic Earley parser.

For every rule in progress it keeps the probability of all derivations that agree with the prefix
(forward) and of the rule's own part (inner), both given the roles so far, so that none is too small
for a float. Left-corner and unit-production loops are summed in closed form, so recursive grammars
cost no more than others (Stolcke 1995, "An efficient probabilistic context-free parsing
algorithm").
"""

from collections import defaultdict
from heapq import heappop, heappush

import numpy as np

from latentree.data.grammar import END, Production

_MOST_PREFIXES = 20_000  # that are remembered at once


class _Prefix:
    """What the parser knows after some roles.

    need (symbol,): forward mass with which each nonterminal may begin here. waiting {symbol after
    the dot: [(rule, dot, where it began, forward, inner)]} are the rules in progress, longer {role:
    the prefix with one more}. law: P(next role), log_p: that of the prefix.
    """

    def __init__(self, length, log_p):
        self.length, self.log_p, self.waiting, self.longer = length, log_p, defaultdict(list), {}


class PrefixParser:
    """Next-role probabilities after any prefix of a sentence, a tuple of role names."""

    def __init__(self, grammar):
        self._number = {role: r for r, role in enumerate(grammar.roles)}
        root = len(grammar.nonterminals)  # one more symbol: sentence, then the end token
        self._rules = [*grammar.productions, Production(root, (0, END), 1.0)]
        left_corner, unit = np.zeros((2, root + 1, root + 1))
        self._first_role = np.zeros((root + 1, len(grammar.roles)))
        self._beginning = defaultdict(list)  # rules by their first symbol, but for unit rules
        for number, rule in enumerate(self._rules):
            first = rule.right[0]
            if isinstance(first, str):
                self._first_role[rule.left, self._number[first]] += rule.probability
            else:
                left_corner[rule.left, first] += rule.probability
            if len(rule.right) == 1 and not isinstance(first, str):
                unit[rule.left, first] += rule.probability
            else:
                self._beginning[first].append(number)
        self._left_corner = np.linalg.inv(np.eye(root + 1) - left_corner)
        unit = np.linalg.inv(np.eye(root + 1) - unit)
        # What is finished with a symbol: {that and those it alone makes up: probability}.
        self._finished = [{s: row[s] for s in row.nonzero()[0]} for row in unit.T]
        self._empty, self._count = _Prefix(0, 0.0), 0
        self._predict(self._empty, {root: 1.0})

    def next_roles(self, prefix):
        """P(each role | `prefix`, the sentence so far) (roles,); zeros if nothing can follow it."""
        return self._parse(prefix).law

    def log_probability(self, prefix):
        """Log of the probability that a sentence begins with `prefix`; -inf if none does."""
        return self._parse(prefix).log_p

    def _parse(self, prefix):
        """What is known after a prefix: each is parsed once, and remembered for a while."""
        if self._count > _MOST_PREFIXES:
            self._empty.longer, self._count = {}, 0
        known = self._empty
        for role in prefix:
            if role not in known.longer:
                known.longer[role] = self._scan(known, role)
                self._count += 1
            known = known.longer[role]
        return known

    def _in_progress(self, known, symbol):
        """Rules in progress, or that may begin, whose next symbol this is."""
        yield from known.waiting.get(symbol, ())
        for number in self._beginning[symbol]:
            rule = self._rules[number]
            if known.need[rule.left] > 0:
                forward = known.need[rule.left] * rule.probability
                yield number, 0, known, forward, rule.probability

    def _scan(self, known, role):
        """The prefix with one more role."""
        items = list(self._in_progress(known, role))
        mass = sum(forward for *_, forward, _ in items)
        here = _Prefix(known.length + 1, known.log_p + np.log(mass) if mass > 0 else -np.inf)
        # finished {length: (the prefix where they began, {symbol: inner})}, the longest first.
        moved, finished, lengths = {}, {}, []

        def move(rule, dot, began, forward, inner):
            if dot + 1 < len(self._rules[rule].right):
                before = moved.get((rule, dot + 1, began), (0.0, 0.0))
                moved[rule, dot + 1, began] = before[0] + forward, before[1] + inner
                return
            if began.length not in finished:
                finished[began.length] = began, defaultdict(float)
                heappush(lengths, -began.length)
            for symbol, p in self._finished[self._rules[rule].left].items():
                finished[began.length][1][symbol] += inner * p

        for rule, dot, began, forward, inner in items:
            move(rule, dot, began, forward / mass, inner / mass)
        while lengths:  # inner spans first: completing one may complete a wider one
            start, symbols = finished.pop(-heappop(lengths))
            for symbol, gain in symbols.items():
                for rule, dot, began, forward, inner in self._in_progress(start, symbol):
                    move(rule, dot, began, forward * gain, inner * gain)
        wanted = defaultdict(float)
        for (rule, dot, began), (forward, inner) in moved.items():
            symbol = self._rules[rule].right[dot]
            here.waiting[symbol].append((rule, dot, began, forward, inner))
            wanted[symbol] += forward
        self._predict(here, wanted)
        return here

    def _predict(self, known, wanted):
        """Fill in what may begin after a prefix, and what is next; `wanted` {symbol: forward}."""
        known.need, law = np.zeros(len(self._left_corner)), np.zeros(len(self._number))
        for symbol, forward in wanted.items():
            if isinstance(symbol, str):
                law[self._number[symbol]] += forward
            else:
                known.need += forward * self._left_corner[symbol]
        law += known.need @ self._first_role
        known.law = law / law.sum() if law.sum() > 0 else law


def legal_sentences(grammar, tokens):
    """Whether the grammar can produce each whole sentence in a row of tokens: a list of bools."""
    parser = PrefixParser(grammar)
    ends = (tokens == grammar.end).nonzero()[:, 0] + 1
    legal = []
    for sentence in tokens.tensor_split(ends)[:-1]:
        roles = tuple(grammar.roles[r] for r in grammar.role_of[sentence.tolist()])
        legal.append(bool(np.isfinite(parser.log_probability(roles))))
    return legal
