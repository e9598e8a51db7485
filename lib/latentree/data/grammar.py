"""A grammar, and what it says exactly: sentence shapes, lengths, frequencies.

A grammar file gives a probabilistic context-free grammar over ROLES (subject, verb, ...), the words of each role, and
the latents that decide which word a role's rank means in which part of the corpus. Tokens come from roles in two
steps: the sentence grammar yields a string of roles, and a role draws a rank from its Zipf law, which the map of the
place where it stands turns into a token.
"""

from dataclasses import dataclass
from functools import cached_property

import nltk
import numpy as np

from latentree.data.files import read_yaml
from latentree.data.grammar_file import LEVELS, GrammarFile, Role, checked

END = "end"  # the role that closes every sentence: one token, the last of the vocabulary
SHAPE_LIMIT = 20_000  # more sentence shapes than this are not enumerated


@dataclass(frozen=True)
class Shape:
    """One derivation of a sentence: its roles, whom each word binds to (position, or -1), its tree, its probability."""

    roles: tuple
    binds_to: tuple
    tree: nltk.Tree
    probability: float


class Grammar:
    """A checked grammar and its exact quantities. Raises ValueError for any grammar that cannot be sampled.

    Attributes: `roles` (names, `end` last), `sizes` and `frequencies` per role, `words[role]` (size,) the token of each
    rank under the identity map, `productions` as (left, right, probability) with integers for nonterminals and role
    names for terminals, `vocabulary_size`, `end` (a token id).
    """

    def __init__(self, content):
        file = checked(GrammarFile, content, content.get("name", "without a name"))
        self.file, self.name = file, file.name
        if END in file.roles:
            raise ValueError(
                f"grammar {self.name}: role '{END}' is added to every sentence; remove it from roles"
            )
        self.roles = (*file.roles, END)
        self.role_specs = (*file.roles.values(), Role(size=1))
        self.sizes = np.array([role.size for role in self.role_specs])
        self.frequencies = [role.frequencies for role in self.role_specs]
        self._check_latents()
        self._lay_out_vocabulary()
        self._read_sentence_grammar()

    @classmethod
    def load(cls, path):
        """Grammar from a YAML file."""
        return cls(read_yaml(path))

    # ------------------------------------------------------------------ checks

    def _check_latents(self):
        file = self.file
        for level, fraction in file.redraw.items():
            if level not in LEVELS:
                raise ValueError(
                    f"grammar {self.name}: redraw level {level!r} is unknown; levels: {', '.join(LEVELS)}"
                )
            if not 0 <= fraction <= 1:
                raise ValueError(
                    f"grammar {self.name}: redraw.{level} is {fraction}; it is a share, write a number in 0..1"
                )
        for child, parent in file.habits.items():
            for role in (child, parent):
                if role not in file.roles:
                    raise ValueError(
                        f"grammar {self.name}: habits name role {role!r}; roles: {', '.join(file.roles)}"
                    )
            seen, ancestor = {child}, parent
            while ancestor is not None:
                if ancestor in seen:
                    raise ValueError(
                        f"grammar {self.name}: habits of {child!r} lead back to {ancestor!r}; remove one of them"
                    )
                seen.add(ancestor)
                ancestor = file.habits.get(ancestor)
        if file.binding > 0 and not file.habits:
            raise ValueError(
                f"grammar {self.name}: binding is {file.binding} but no habits say who follows whom; "
                "add 'habits: {verb: subject}' or set binding to 0"
            )

    def _lay_out_vocabulary(self):
        """Each role's own tokens in the order of the file, then the shared pool, then the end token."""
        open_roles = [r for r, role in enumerate(self.role_specs) if role.has_map]
        pool = round(self.file.shared * min((self.sizes[r] for r in open_roles), default=0))
        if self.file.shared > 0 and (len(open_roles) < 2 or pool == 0):
            raise ValueError(
                f"grammar {self.name}: shared is {self.file.shared} but no token can serve two roles; "
                "give two roles a Zipf exponent above 0 and enough words, or set shared to 0"
            )
        own = [size - (pool if r in open_roles else 0) for r, size in enumerate(self.sizes[:-1])]
        starts = np.concatenate([[0], np.cumsum(own)])
        shared = np.arange(starts[-1], starts[-1] + pool)
        self.words = [
            np.concatenate([np.arange(start, start + n), shared if r in open_roles else []]).astype(
                int
            )
            for r, (start, n) in enumerate(zip(starts, own))
        ]
        self.end = int(starts[-1] + pool)
        self.words.append(np.array([self.end]))
        self.vocabulary_size = self.end + 1

    def _read_sentence_grammar(self):
        try:
            pcfg = nltk.PCFG.fromstring(self.file.sentence)
        except ValueError as error:
            raise ValueError(
                f"grammar {self.name}: sentence is not a PCFG: {str(error).splitlines()[0]}; "
                "write lines like S -> A 'role' [0.5] | B [0.5]"
            ) from None
        self.nonterminals = list(
            dict.fromkeys([pcfg.start(), *(rule.lhs() for rule in pcfg.productions())])
        )
        index = {symbol: i for i, symbol in enumerate(self.nonterminals)}
        totals = np.zeros(len(index))
        for rule in pcfg.productions():
            totals[index[rule.lhs()]] += rule.prob()
            if not rule.rhs():
                raise ValueError(
                    f"grammar {self.name}: '{rule}' is empty; write the sentence grammar without empty productions"
                )
            if rule.prob() <= 0:
                raise ValueError(f"grammar {self.name}: '{rule}' has probability 0; remove it")
            for symbol in rule.rhs():
                if isinstance(symbol, str) and (symbol not in self.roles or symbol == END):
                    raise ValueError(
                        f"grammar {self.name}: '{rule}' uses role '{symbol}'; roles: {', '.join(self.file.roles)}"
                    )
                if not isinstance(symbol, str) and symbol not in index:
                    raise ValueError(
                        f"grammar {self.name}: '{rule}' uses {symbol}, which has no production; add one"
                    )
        # nltk accepts sums within 0.01 of 1 (decimals of 1/3): here they are made exact.
        self.productions = [
            (
                index[rule.lhs()],
                tuple(s if isinstance(s, str) else index[s] for s in rule.rhs()),
                rule.prob() / totals[index[rule.lhs()]],
            )
            for rule in pcfg.productions()
        ]
        self._check_expected_length()
        used = {
            symbol
            for left, right, _ in self.productions
            for symbol in right
            if isinstance(symbol, str)
        }
        for role in self.file.roles:
            if role not in used:
                raise ValueError(
                    f"grammar {self.name}: role '{role}' appears in no production; use it or remove it"
                )

    def _check_expected_length(self):
        """Refuse unreachable symbols and sentences of infinite expected length."""
        offspring = self._offspring
        reached, frontier = {0}, [0]
        while frontier:
            for symbol in np.flatnonzero(offspring[frontier.pop()]):
                if symbol not in reached:
                    reached.add(symbol)
                    frontier.append(symbol)
        for i, symbol in enumerate(self.nonterminals):
            if i not in reached:
                raise ValueError(
                    f"grammar {self.name}: {symbol} is never reached from {self.nonterminals[0]}; remove it"
                )
        values, vectors = np.linalg.eig(offspring)
        worst = np.argmax(abs(values))
        if abs(values[worst]) >= 1 - 1e-9:
            culprit = self.nonterminals[int(np.argmax(abs(vectors[:, worst])))]
            raise ValueError(
                f"grammar {self.name}: the expected sentence length is infinite: {culprit} yields on average "
                f"{abs(values[worst]):.3g} symbols of its own kind (must be below 1); lower its recursive productions"
            )

    @property
    def content(self):
        """All that decides what is drawn, in lists and dicts: neither names nor how the file is written."""
        said = self.file.model_dump(exclude={"name", "kind", "label", "about", "sentence"})
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
        """Expected number of each nonterminal (column) in one expansion of each nonterminal (row)."""
        matrix = np.zeros((len(self.nonterminals),) * 2)
        for left, right, probability in self.productions:
            for symbol in right:
                if not isinstance(symbol, str):
                    matrix[left, symbol] += probability
        return matrix

    @cached_property
    def recursive(self):
        """Whether some nonterminal can contain itself (its language is then infinite)."""
        reach = np.linalg.matrix_power(
            np.eye(len(self.nonterminals)) + (self._offspring > 0), len(self.nonterminals)
        )
        return bool(np.trace(((self._offspring > 0) @ (reach > 0)).astype(float)) > 0)

    @cached_property
    def visits(self):
        """Expected number of expansions of each nonterminal in a sentence."""
        start = np.eye(len(self.nonterminals))[0]
        return np.linalg.solve(np.eye(len(start)) - self._offspring.T, start)

    @cached_property
    def role_counts(self):
        """Expected number of tokens of each role in a sentence (the end token included), in the order of `roles`."""
        counts = np.zeros(len(self.roles))
        for left, right, probability in self.productions:
            for symbol in right:
                if isinstance(symbol, str):
                    counts[self.roles.index(symbol)] += self.visits[left] * probability
        counts[-1] = 1.0
        return counts

    @cached_property
    def role_frequencies(self):
        """Share of each role among tokens."""
        return self.role_counts / self.role_counts.sum()

    @cached_property
    def role_of(self):
        """The role of each token (vocabulary,), the last one named for a shared token."""
        table = np.zeros(self.vocabulary_size, dtype=int)
        for r, words in enumerate(self.words):
            table[words] = r
        return table

    @cached_property
    def mean_length(self):
        """Expected tokens in a sentence, the end token included."""
        return float(self.role_counts.sum())

    @cached_property
    def mean_document_length(self):
        """Expected tokens in a document."""
        return self.mean_length * self.file.document.per_document("sentence")

    def length_moments(self):
        """Mean and variance of a sentence's length in tokens, exact, for recursive grammars too.

        Second moments solve m2 = c + Offspring m2, where c collects each production's squares and products of means.
        """
        identity = np.eye(len(self.nonterminals))
        own = np.zeros(len(self.nonterminals))
        for left, right, probability in self.productions:
            own[left] += probability * sum(isinstance(symbol, str) for symbol in right)
        mean = np.linalg.solve(identity - self._offspring, own)
        constant = np.zeros(len(own))
        for left, right, probability in self.productions:
            means = np.array([1.0 if isinstance(s, str) else mean[s] for s in right])
            words = sum(isinstance(s, str) for s in right)
            constant[left] += probability * (means.sum() ** 2 - (means**2).sum() + words)
        second = np.linalg.solve(identity - self._offspring, constant)
        return float(mean[0] + 1), float(second[0] - mean[0] ** 2)

    def length_distribution(self, longest):
        """P(a sentence has n tokens) for n = 0..longest, the end token included; exact, the tail beyond is left out.

        Every symbol yields at least one token, so lengths are found in increasing order; productions of a single
        nonterminal keep the length and are solved for together.
        """
        count = len(self.nonterminals)
        table = np.zeros((count, longest + 1))
        unit = np.zeros((count, count))
        for left, right, probability in self.productions:
            if len(right) == 1 and not isinstance(right[0], str):
                unit[left, right[0]] += probability
        word = np.eye(longest + 1)[1] if longest else np.zeros(1)
        for n in range(1, longest):
            fresh = np.zeros(count)
            for left, right, probability in self.productions:
                if len(right) == 1:
                    fresh[left] += probability * (n == 1) * isinstance(right[0], str)
                    continue
                total = np.eye(longest + 1)[0]
                for symbol in right:
                    total = np.convolve(total, word if isinstance(symbol, str) else table[symbol])[
                        : longest + 1
                    ]
                fresh[left] += probability * total[n]
            table[:, n] = np.linalg.solve(np.eye(count) - unit, fresh)
        return np.concatenate([[0], table[0]])[: longest + 1]

    @cached_property
    def shapes(self):
        """Every derivation as a Shape, most probable first; None for a recursive grammar or one with too many."""
        if self.recursive:
            return None
        derivations = []
        for choices, probability in self._expand((0,)):
            derivations.append((choices, probability))
            if len(derivations) > SHAPE_LIMIT:
                return None
        return sorted(
            (self.shape(choices, p) for choices, p in derivations),
            key=lambda s: (-s.probability, s.roles),
        )

    def _expand(self, symbols):
        """Yield (production choices in leftmost order, probability) for every way to expand `symbols`."""
        while symbols and isinstance(symbols[0], str):
            symbols = symbols[1:]
        if not symbols:
            yield (), 1.0
            return
        for number, (left, right, probability) in enumerate(self.productions):
            if left == symbols[0]:
                for rest, p in self._expand(right + symbols[1:]):
                    yield (number, *rest), probability * p

    def shape(self, choices, probability=None):
        """The Shape that a sequence of production choices (leftmost derivation) spells out.

        A word binds to the sibling of the role it has a habit for, in the same production; without one it is free.
        """
        choices = iter(choices)
        roles, binds_to = [], []

        def grow(symbol):
            left, right, _ = self.productions[next(choices)]
            here, children = {}, []
            for part in right:
                if isinstance(part, str):
                    here.setdefault(part, len(roles))
                    children.append((part, len(roles)))
                    roles.append(part)
                    binds_to.append(-1)
                else:
                    children.append(grow(part))
            if self.file.binding > 0:
                for child in children:
                    if isinstance(child, tuple):
                        binds_to[child[1]] = here.get(self.file.habits.get(child[0]), -1)
            return nltk.Tree(
                str(self.nonterminals[left]),
                [c[0] if isinstance(c, tuple) else c for c in children],
            )

        tree = nltk.Tree("sentence", [grow(0), END])
        return Shape((*roles, END), (*binds_to, -1), tree, probability)
