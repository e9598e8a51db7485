"""A grammar, and what it says exactly: sentence shapes, lengths, frequencies.

A probabilistic context-free grammar yields a string of ROLES (subject, verb, ...). Each role draws
a rank from its Zipf law, and the map of the place where it stands turns the rank into a token.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import prod
from typing import NamedTuple

import nltk
import numpy as np
from scipy.sparse.csgraph import connected_components

from latentree.data.counter import MOST
from latentree.data.grammar_file import END, Role, checked

_SHAPE_LIMIT = 20_000  # more sentence shapes than this are not enumerated


class Production(NamedTuple):
    """A way to rewrite nonterminal number `left`: as nonterminals (numbers) and roles (names)."""

    left: int
    right: tuple
    probability: float

    @property
    def nonterminals(self):
        """The nonterminals on the right, in order."""
        return [symbol for symbol in self.right if not isinstance(symbol, str)]

    @property
    def roles(self):
        """The roles on the right, in order."""
        return [symbol for symbol in self.right if isinstance(symbol, str)]


@dataclass(frozen=True)
class Shape:
    """A derivation of a sentence; binds_to: the place of the word that each one follows, or -1."""

    roles: tuple
    binds_to: tuple
    tree: nltk.Tree
    probability: float


class Grammar:
    """A checked grammar and its exact quantities. Raises ValueError for one that cannot be sampled.

    - file: the fields of its file; roles: their names, `end` last. Elsewhere roles are numbers.
    - sizes (roles,), frequencies[role] (size,) by rank, and words[role] (size,), the token of each
      rank before any map. role_of (vocabulary,) is each token's role, and end the last token.
    - nonterminals: their names, the start symbol first; productions: all Productions.
    """

    def __init__(self, content):
        self.file = checked(content)
        self.name = self.file.name
        self.roles = (*self.file.roles, END)
        self.role_specs = (*self.file.roles.values(), Role(size=1))
        self.sizes = np.array([role.size for role in self.role_specs])
        self.frequencies = [role.frequencies for role in self.role_specs]
        self.role_of = np.arange(len(self.roles)).repeat(self.sizes)
        self.words = np.split(np.arange(self.sizes.sum()), self.sizes.cumsum()[:-1])
        self.vocabulary_size = int(self.sizes.sum())
        self.end = self.vocabulary_size - 1
        self.nonterminals, self.productions = self._read_sentence_grammar()
        roles, symbols = len(self.roles), len(self.nonterminals)
        if max(roles, symbols) > MOST:
            told = f"{roles} roles and {symbols} nonterminals; use at most {MOST} of each"
            raise self._fault(told)
        self._check_expected_length()
        for child, parent in self.file.habits.items():
            if not any({child, parent} <= set(rule.right) for rule in self.productions):
                raise self._fault(
                    f"habits: {child} follows {parent}, but no production has both, so that this "
                    "does nothing; put both into one production, or remove the habit"
                )
        used = {f"role {role!r}": count for role, count in zip(self.roles, self.role_counts)}
        used |= {f"symbol {name}": count for name, count in zip(self.nonterminals, self.visits)}
        for symbol, count in used.items():
            if count == 0:
                raise self._fault(f"{symbol} is in no sentence; use it or remove it")

    def _fault(self, told):
        return ValueError(f"grammar {self.name}: {told}")

    def _read_sentence_grammar(self):
        try:
            pcfg = nltk.PCFG.fromstring(self.file.sentence)
        except ValueError as error:
            raise self._fault(
                f"sentence is not a PCFG: {' '.join(str(error).split())}; "
                "write lines like S -> A 'role' [0.5] | B [0.5], and 0.00003 for 3e-05"
            ) from None
        symbols = dict.fromkeys([pcfg.start(), *(rule.lhs() for rule in pcfg.productions())])
        number = {symbol: i for i, symbol in enumerate(symbols)}
        known = {role: role for role in self.file.roles} | number
        productions, totals = [], np.zeros(len(number))
        for rule in pcfg.productions():
            if not rule.rhs() or rule.prob() <= 0:
                raise self._fault(f"'{rule}' yields nothing or has probability 0; remove it")
            for symbol in rule.rhs():
                if symbol not in known:
                    raise self._fault(
                        f"'{rule}' uses {symbol!r}, which is neither a role "
                        f"({', '.join(self.file.roles)}) nor a symbol with a production"
                    )
            left, right = number[rule.lhs()], tuple(known[symbol] for symbol in rule.rhs())
            productions.append(Production(left, right, rule.prob()))
            totals[left] += rule.prob()
        # nltk accepts sums within 0.01 of 1 (decimals of 1/3): here they are made exact.
        for i, (left, right, share) in enumerate(productions):
            productions[i] = Production(left, right, share / totals[left])
        return list(number), productions

    def _check_expected_length(self):
        values, vectors = np.linalg.eig(self._offspring)
        worst = np.argmax(abs(values))
        if abs(values[worst]) >= 1 - 1e-9:
            culprit = self.nonterminals[int(np.argmax(abs(vectors[:, worst])))]
            raise self._fault(
                f"the expected sentence length is infinite: {culprit} yields on average "
                f"{abs(values[worst]):.3g} symbols of its own kind (must be below 1); "
                "lower its recursive productions"
            )

    @property
    def content(self):
        """All that decides what is drawn, in lists and dicts: neither names nor comments."""
        unsaid = {"name", "kind", "label", "about", "sentence"}
        if not self.file.bank:
            unsaid.add("bank")
        said = self.file.model_dump(exclude=unsaid)
        if self.shapes is None:
            said["derivations"] = "by level"  # as they are drawn
        return said | {"redraw": sorted(self.file.redraw.items()), "productions": self.productions}

    @property
    def parents_first(self):
        """Roles with a habit, each after the role whose words it follows."""

        def depth(role):
            return 0 if role not in self.file.habits else 1 + depth(self.file.habits[role])

        return sorted(self.file.habits, key=depth)

    # ------------------------------------------------------------------ exact quantities

    @cached_property
    def _offspring(self):
        """Expected number of each nonterminal (column) in an expansion of each one (row)."""
        matrix = np.zeros((len(self.nonterminals), len(self.nonterminals)))
        for production in self.productions:
            for symbol in production.nonterminals:
                matrix[production.left, symbol] += production.probability
        return matrix

    @cached_property
    def visits(self):
        """Expected number of expansions of each nonterminal in a sentence."""
        start = np.eye(len(self.nonterminals))[0]
        return np.linalg.solve(np.eye(len(start)) - self._offspring.T, start)

    @cached_property
    def role_counts(self):
        """Expected number of tokens of each role in a sentence, the end token included."""
        counts = np.zeros(len(self.roles))
        for rule in self.productions:
            for role in rule.roles:
                counts[self.roles.index(role)] += self.visits[rule.left] * rule.probability
        counts[-1] = 1.0
        return counts

    @property
    def role_frequencies(self):
        """Share of each role among tokens."""
        return self.role_counts / self.role_counts.sum()

    @property
    def mean_length(self):
        """Expected tokens in a sentence, the end token included."""
        return float(self.role_counts.sum())

    @property
    def mean_document_length(self):
        """Expected tokens in a document."""
        return self.mean_length * self.file.document.per_document("sentence")

    @cached_property
    def shapes(self):
        """Every derivation, most probable first; None for a recursive grammar or too many."""
        groups, _ = connected_components(self._offspring > 0, connection="strong")
        if groups < len(self.nonterminals) or self._offspring.diagonal().any():  # it is recursive
            return None
        derivations = list(islice(self._expansions(), _SHAPE_LIMIT + 1))
        if len(derivations) > _SHAPE_LIMIT:
            return None
        shapes = []
        for choices in derivations:
            chances = [self.productions[number].probability for number in reversed(choices)]
            shapes.append(self.shape(choices, prod(chances)))
        return sorted(shapes, key=lambda shape: (-shape.probability, shape.roles))

    def _expansions(self):
        """Yield the production choices of every leftmost derivation of a sentence."""
        rules = [[] for _ in self.nonterminals]
        for number, production in enumerate(self.productions):
            rules[production.left].append(number)
        waiting = [((), (0,))]  # choices so far, and the nonterminals that are left
        while waiting:
            choices, symbols = waiting.pop()
            if not symbols:
                yield choices
                continue
            for number in reversed(rules[symbols[0]]):
                below = tuple(self.productions[number].nonterminals)
                waiting.append(((*choices, number), below + symbols[1:]))

    def shape(self, choices, probability=None):
        """The Shape that a sequence of production choices (leftmost derivation) spells out.

        A word binds to the sibling of the role it has a habit for, in the same production; without
        one it is free.
        """
        choices = iter(choices)
        roles, binds_to, tree = [], [], nltk.Tree("sentence", [])
        growing = [(tree, iter((0, END)), [])]  # a node, what is left of its production, its roles
        while growing:
            node, left, places = growing[-1]
            symbol = next(left, None)
            if symbol is None:
                growing.pop()
                first_of = {roles[place]: place for place in reversed(places)}
                for place in places:
                    followed = self.file.habits.get(roles[place])
                    binds_to[place] = first_of.get(followed, -1) if self.file.binding > 0 else -1
            elif isinstance(symbol, str):
                node.append(symbol)
                places.append(len(roles))
                roles.append(symbol)
                binds_to.append(-1)
            else:
                production = self.productions[next(choices)]
                node.append(nltk.Tree(str(self.nonterminals[symbol]), []))
                growing.append((node[-1], iter(production.right), []))
        return Shape(tuple(roles), tuple(binds_to), tree, probability)


def open_binding(shapes):
    """The first roles of a sentence that leave open whom their last word follows; None: no such.

    Whom a word follows is told by the places of its parent, of that one's parent, and so on.
    """
    node_of, followed = {}, {}
    for shape in shapes:
        node = 0
        for place, role in enumerate(shape.roles):
            node = node_of.setdefault((node, role), len(node_of) + 1)  # of the roles so far
            line = [place]
            while line[-1] >= 0:
                line.append(shape.binds_to[line[-1]])
            if followed.setdefault(node, line) != line:
                return shape.roles[: place + 1]
    return None
