"""What may come next: exact prefix probabilities of a sentence grammar, by a probabilistic Earley parser.

The parser keeps, for every rule in progress, the probability of all derivations that agree with the prefix (forward)
and of the rule's own part (inner); left-corner and unit-production loops are summed in closed form, so recursive
grammars cost no more than others (Stolcke 1995, "An efficient probabilistic context-free parsing algorithm").
"""

from collections import defaultdict

import numpy as np

from latentree.data.grammar import END


class PrefixParser:
    """Next-role probabilities after any prefix of a sentence. Each prefix is parsed once and remembered."""

    def __init__(self, grammar):
        self.grammar, self.roles = grammar, grammar.roles
        size = (
            len(grammar.nonterminals) + 1
        )  # the last symbol is the root: sentence, then the end token
        root = size - 1
        self.rules = [*grammar.productions, (root, (0, END), 1.0)]
        left_corner, unit = np.zeros((size, size)), np.zeros((size, size))
        for left, right, probability in self.rules:
            if not isinstance(right[0], str):
                left_corner[left, right[0]] += probability
                if len(right) == 1:
                    unit[left, right[0]] += probability
        self.left_corner = np.linalg.inv(np.eye(size) - left_corner)
        self.unit = np.linalg.inv(np.eye(size) - unit)
        start = [self._predict({}, {root: 1.0}, 0)]
        self._nodes = {(): (start, 1.0, self._next_roles(start[0]))}

    def next_roles(self, prefix):
        """Probability of each role (in the grammar's order) after `prefix`, roles of the current sentence so far.

        `prefix` is a tuple of role names, or of tuples ((role, weight), ...) where a token could serve several roles,
        weight being the probability of the token given the role. All zeros if the grammar cannot continue the prefix.
        """
        return self._node(prefix)[2]

    def legal_roles(self, prefix):
        """Names of the roles that may follow `prefix`."""
        return {role for role, p in zip(self.roles, self.next_roles(prefix)) if p > 0}

    def probability(self, prefix):
        """Probability that a sentence begins with `prefix`."""
        return float(self._node(prefix)[1])

    def prefix_of(self, tokens):
        """The prefix that `tokens` (a list of ids) are: each with the roles it can serve, all words of a role alike."""
        serves = {
            token: tuple(
                (role, 1 / len(words))
                for role, words in zip(self.roles, self.grammar.words)
                if token in words
            )
            for token in set(tokens)
        }
        return tuple(serves[token] for token in tokens)

    def next_tokens(self, tokens):
        """Probability of each token (vocabulary,) after `tokens` of the current sentence, by the syntax alone.

        The tokens above 0 are the legal ones.
        """
        p = np.zeros(self.grammar.vocabulary_size)
        for share, words in zip(self.next_roles(self.prefix_of(tokens)), self.grammar.words):
            p[words] += share / len(words)
        return p

    def _node(self, prefix):
        if prefix not in self._nodes:
            columns, _, _ = self._node(prefix[:-1])
            column, mass = self._scan(columns, prefix[-1])
            columns = [*columns, column]
            self._nodes[prefix] = (columns, mass, self._next_roles(column))
        return self._nodes[prefix]

    def _next_roles(self, column):
        mass = np.zeros(len(self.roles))
        for (rule, dot, _), (forward, _) in column.items():
            right = self.rules[rule][1]
            if dot < len(right) and isinstance(right[dot], str):
                mass[self.roles.index(right[dot])] += forward
        return mass / mass.sum() if mass.sum() > 0 else mass

    def _predict(self, column, wanted, position):
        """Add the rules that can begin here, `wanted` being the forward mass before each nonterminal."""
        need = np.zeros(len(self.left_corner))
        for symbol, forward in wanted.items():
            need += forward * self.left_corner[symbol]
        for rule, (left, _, probability) in enumerate(self.rules):
            if need[left] > 0:
                column[rule, 0, position] = (need[left] * probability, probability)
        return column

    def _scan(self, columns, symbol):
        """The column after one more token, and the prefix's probability."""
        position = len(columns)
        weights = {symbol: 1.0} if isinstance(symbol, str) else dict(symbol)
        column = defaultdict(lambda: (0.0, 0.0))
        for (rule, dot, start), (forward, inner) in columns[-1].items():
            right = self.rules[rule][1]
            weight = weights.get(right[dot], 0.0) if dot < len(right) else 0.0
            if weight > 0:
                column[rule, dot + 1, start] = (forward * weight, inner * weight)
        mass = sum(forward for forward, _ in column.values())
        for start in range(
            position - 1, -1, -1
        ):  # inner spans first: completing one may complete a wider one
            self._complete(columns, column, start)
        wanted = defaultdict(float)
        for (rule, dot, _), (forward, _) in column.items():
            right = self.rules[rule][1]
            if dot < len(right) and not isinstance(right[dot], str):
                wanted[right[dot]] += forward
        return self._predict(dict(column), wanted, position), mass

    def _complete(self, columns, column, start):
        found = np.zeros(
            len(self.unit)
        )  # inner probability of each nonterminal over (start, here), unit rules summed in
        for (rule, dot, began), (_, inner) in column.items():
            left, right, _ = self.rules[rule]
            if (
                began == start
                and dot == len(right)
                and not (dot == 1 and not isinstance(right[0], str))
            ):
                found += inner * self.unit[:, left]
        for (rule, dot, began), (forward, inner) in columns[start].items():
            right = self.rules[rule][1]
            if dot < len(right) and not isinstance(right[dot], str) and found[right[dot]] > 0:
                gain = found[right[dot]]
                old_forward, old_inner = column[rule, dot + 1, began]
                column[rule, dot + 1, began] = (
                    old_forward + forward * gain,
                    old_inner + inner * gain,
                )


def legal_sentences(grammar, tokens):
    """For each whole sentence in a row of tokens (tokens,), whether the grammar can produce it (a list of bools).

    Shared tokens are taken in every role they can serve.
    """
    parser = PrefixParser(grammar)
    ends = (tokens == grammar.end).nonzero()[:, 0] + 1
    return [
        parser.probability(parser.prefix_of(part.tolist())) > 0
        for part in tokens.tensor_split(ends)[:-1]
    ]
