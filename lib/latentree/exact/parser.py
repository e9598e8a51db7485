"""What may come next: exact prefix probabilities, by a probabilistic Earley parser.

The parser keeps, for every rule in progress, the probability of all derivations that agree with the
prefix (forward) and of the rule's own part (inner); left-corner and unit-production loops are
summed in closed form, so recursive grammars cost no more than others (Stolcke 1995, "An efficient
probabilistic context-free parsing algorithm").
"""

from collections import defaultdict

import numpy as np

from latentree.data.grammar import END, Production


class PrefixParser:
    """Next-role probabilities after any prefix of a sentence, a tuple of role names.

    Each prefix is parsed once and remembered.
    """

    def __init__(self, grammar):
        self._roles = grammar.roles
        root = len(grammar.nonterminals)  # one more symbol: sentence, then the end token
        self._rules = [*grammar.productions, Production(root, (0, END), 1.0)]
        left_corner, unit = np.zeros((root + 1, root + 1)), np.zeros((root + 1, root + 1))
        for rule in self._rules:
            if not isinstance(rule.right[0], str):
                left_corner[rule.left, rule.right[0]] += rule.probability
            if _is_unit(rule):
                unit[rule.left, rule.right[0]] += rule.probability
        self._left_corner = np.linalg.inv(np.eye(root + 1) - left_corner)
        self._unit = np.linalg.inv(np.eye(root + 1) - unit)
        # prefix -> (columns, probability); a column is {(rule, dot, start): (forward, inner)}
        self._parsed = {(): ([self._predicted({root: 1.0}, 0)], 1.0)}
        self._next = {}

    def next_roles(self, prefix):
        """Probability of each role (in the grammar's order) after `prefix`, the sentence so far.

        All zeros if the grammar cannot continue the prefix.
        """
        if prefix not in self._next:
            mass = np.zeros(len(self._roles))
            columns, _ = self._parse(prefix)
            for symbol, (forward, _) in self._expected(columns[-1]):
                if isinstance(symbol, str):
                    mass[self._roles.index(symbol)] += forward
            self._next[prefix] = mass / mass.sum() if mass.sum() > 0 else mass
        return self._next[prefix]

    def legal_roles(self, prefix):
        """Names of the roles that may follow `prefix`."""
        return {role for role, p in zip(self._roles, self.next_roles(prefix)) if p > 0}

    def probability(self, prefix):
        """Probability that a sentence begins with `prefix`."""
        return float(self._parse(prefix)[1])

    def _parse(self, prefix):
        if prefix not in self._parsed:
            columns, _ = self._parse(prefix[:-1])
            column, mass = self._scan(columns, prefix[-1])
            self._parsed[prefix] = ([*columns, column], mass)
        return self._parsed[prefix]

    def _expected(self, column):
        """The symbol after the dot of each unfinished rule, with the rule's (forward, inner)."""
        for (rule, dot, _), masses in column.items():
            right = self._rules[rule].right
            if dot < len(right):
                yield right[dot], masses

    def _predicted(self, wanted, position):
        """The rules that can begin here; `wanted` is the forward mass before each nonterminal."""
        need = np.zeros(len(self._left_corner))
        for symbol, forward in wanted.items():
            need += forward * self._left_corner[symbol]
        column = {}
        for number, rule in enumerate(self._rules):
            if need[rule.left] > 0:
                forward = need[rule.left] * rule.probability
                column[number, 0, position] = (forward, rule.probability)
        return column

    def _scan(self, columns, role):
        """The column after one more role, and the prefix's probability."""
        position = len(columns)
        column = defaultdict(lambda: (0.0, 0.0))
        for (rule, dot, start), masses in columns[-1].items():
            right = self._rules[rule].right
            if dot < len(right) and right[dot] == role:
                column[rule, dot + 1, start] = masses
        mass = sum(forward for forward, _ in column.values())
        # Inner spans first: completing one may complete a wider one.
        for start in range(position - 1, -1, -1):
            self._complete(columns, column, start)
        wanted = defaultdict(float)
        for symbol, (forward, _) in self._expected(column):
            if not isinstance(symbol, str):
                wanted[symbol] += forward
        return dict(column) | self._predicted(wanted, position), mass

    def _complete(self, columns, column, start):
        """Move the dot of rules that waited at `start` over what is finished here."""
        found = np.zeros(
            len(self._unit)
        )  # inner probability of each nonterminal from start to here
        for (number, dot, began), (_, inner) in column.items():
            rule = self._rules[number]
            finished = began == start and dot == len(rule.right)
            if finished and not _is_unit(rule):  # unit rules are in self._unit
                found += inner * self._unit[:, rule.left]
        for (number, dot, began), (forward, inner) in columns[start].items():
            right = self._rules[number].right
            if dot < len(right) and not isinstance(right[dot], str) and found[right[dot]] > 0:
                gain = found[right[dot]]
                old_forward, old_inner = column[number, dot + 1, began]
                moved = (old_forward + forward * gain, old_inner + inner * gain)
                column[number, dot + 1, began] = moved


def _is_unit(rule):
    return len(rule.right) == 1 and not isinstance(rule.right[0], str)


def legal_sentences(grammar, tokens):
    """Whether the grammar can produce each whole sentence in a row of tokens: a list of bools."""
    parser = PrefixParser(grammar)
    ends = (tokens == grammar.end).nonzero()[:, 0] + 1
    legal = []
    for sentence in tokens.tensor_split(ends)[:-1]:
        roles = tuple(grammar.roles[r] for r in grammar.role_of[sentence.tolist()])
        legal.append(parser.probability(roles) > 0)
    return legal
