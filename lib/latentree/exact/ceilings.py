"""Exact losses of predictors that know a part of the hierarchy, in nats per token.

syntax-only: knows the sentence grammar and each role's words, and nothing of the latents: within a role all words are
    equally likely.
latent-aware: also knows the maps and habits that hold where each token stands. No learner that must infer them from
    context can reach it.
in-sentence: the best predictor of a sentence whose latents are fresh: it infers them from the sentence's own words.
    This is the floor of a flat corpus.
`expected` gives values by enumeration, `token_losses` those of given tokens.
"""

from collections import defaultdict
from functools import lru_cache
from itertools import product

import numpy as np
import pandas as pd

SUBSETS = (
    16  # a habit's marginal is exact by enumerating which parents share it, up to this many parents
)


# ---------------------------------------------------------------------- expected values


def expected(grammar):
    """Exact expected losses by role: DataFrame (role, share, syntax_only, latent_aware), last row role 'all'.

    `share` is the role's share of tokens; losses are nats per token of that role. latent_aware is NaN by role where a
    word comes before the word it follows and the roles are large (its average over habits has no short form); the
    last row is always exact. ValueError for grammars whose shapes cannot be enumerated.
    """
    shapes = _enumerated(grammar)
    syntax, latent, counts = (np.zeros(len(grammar.roles)) for _ in range(3))
    class_of = _token_classes(grammar)
    prefix_mass = _prefix_masses(grammar, shapes, class_of)
    role_mass = _prefix_masses(grammar, shapes, [[((r,), 1.0)] for r in range(len(grammar.roles))])
    for shape in shapes:
        numbers = [grammar.roles.index(role) for role in shape.roles]
        for classes in product(*(class_of[r] for r in numbers)):
            weight, prefix = shape.probability, ()
            for _, share in classes:
                weight *= share
            for r, (members, _) in zip(numbers, classes):
                longer = (*prefix, members)
                syntax[r] -= weight * np.log(
                    prefix_mass[longer] / prefix_mass[prefix] / _class_size(grammar, members)
                )
                prefix = longer
        prefix = ()
        for place, r in enumerate(numbers):
            longer = (*prefix, (r,))
            counts[r] += shape.probability
            latent[r] -= shape.probability * np.log(role_mass[longer] / role_mass[prefix])
            latent[r] += shape.probability * _word_entropy(grammar, shape, place)
            prefix = longer
    total = latent.sum()
    if np.isnan(total):
        total = _total_latent_aware(grammar, shapes, role_mass)
    if grammar.file.shared > 0:
        latent[:], total = (
            np.nan,
            np.nan,
        )  # which role a shared token serves depends on the maps drawn
    table = pd.DataFrame(
        {
            "role": grammar.roles,
            "share": counts / counts.sum(),
            "syntax_only": syntax / counts,
            "latent_aware": latent / counts,
        }
    )
    table.loc[len(table)] = ["all", 1.0, syntax.sum() / counts.sum(), total / counts.sum()]
    return table


def syntax_entropy(grammar):
    """Entropy of a sentence's derivation in nats, exact for recursive grammars too: visits times entropy of each choice."""
    return float(-sum(grammar.visits[left] * p * np.log(p) for left, _, p in grammar.productions))


def in_sentence(grammar):
    """Exact loss per token of the best predictor when every sentence has fresh latents (a flat corpus), in nats.

    A fresh map makes words exchangeable: only which of a sentence's words are equal is informative. The entropy of a
    sentence is that of its shape, of the pattern of equal words, and of the distinct words that fill the pattern. A
    verb's ranks depend on its subjects' pattern alone, because habits are drawn independently for each subject.
    """
    shapes = _enumerated(grammar)
    if grammar.file.shared > 0:
        raise ValueError(
            f"grammar {grammar.name}: the in-sentence loss is exact only without shared tokens; set shared to 0"
        )
    entropy = -sum(s.probability * np.log(s.probability) for s in shapes)
    for shape in shapes:
        entropy += shape.probability * _words_entropy(grammar, shape)
    return entropy / grammar.mean_length


def _enumerated(grammar):
    if grammar.shapes is None:
        raise ValueError(
            f"grammar {grammar.name}: its sentence shapes cannot be enumerated (recursive, or too many); use "
            "token_losses on sampled documents, or syntax_entropy"
        )
    return grammar.shapes


def _token_classes(grammar):
    """For each role, the classes of its tokens: [(roles that share the class, share of the role's words), ...]."""
    serves = defaultdict(list)
    for r, words in enumerate(grammar.words):
        for word in words.tolist():
            serves[word].append(r)
    classes = []
    for words in grammar.words:
        members = [tuple(serves[word]) for word in words.tolist()]
        classes.append([(m, members.count(m) / len(members)) for m in dict.fromkeys(members)])
    return classes


def _class_size(grammar, members):
    """How many tokens serve exactly the roles `members`."""
    words = [set(words.tolist()) for words in grammar.words]
    inside = set.intersection(*(words[r] for r in members))
    return len(inside.difference(*(words[r] for r in range(len(words)) if r not in members)))


def _prefix_masses(grammar, shapes, class_of):
    """Probability of every string of classes that begins a sentence."""
    mass = defaultdict(float)
    for shape in shapes:
        for classes in product(*(class_of[grammar.roles.index(role)] for role in shape.roles)):
            weight = shape.probability * np.prod([share for _, share in classes])
            for end in range(len(classes) + 1):
                mass[tuple(members for members, _ in classes[:end])] += weight
    return mass


def _entropy(p):
    p = np.asarray(p)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def _word_entropy(grammar, shape, place):
    """Expected entropy of the word at `place`, given the latents and the sentence's earlier words."""
    r, parent = grammar.roles.index(shape.roles[place]), shape.binds_to[place]
    earlier_children = [c for c in range(place) if shape.binds_to[c] == place]
    law = grammar.frequencies[r]
    if parent < 0 and not earlier_children:
        return _entropy(law)
    if (
        parent < 0
        and len(earlier_children) == 1
        and not any(shape.binds_to[c] == earlier_children[0] for c in range(place))
    ):
        child = grammar.roles.index(
            shape.roles[earlier_children[0]]
        )  # H(parent | child) = H(parent) + H(child | .) - H(child)
        return _entropy(law) + _bound_entropy(grammar, child) - _marginal_entropy(grammar, r, child)
    if parent >= 0 and parent < place and not earlier_children:
        return _bound_entropy(grammar, r)
    if (
        parent > place
        and shape.binds_to[parent] < 0
        and not earlier_children
        and not any(shape.binds_to[c] == parent for c in range(place))
    ):
        return _marginal_entropy(grammar, grammar.roles.index(shape.roles[parent]), r)
    return np.nan


def _bound_entropy(grammar, child):
    """Entropy of a word given the word it follows, averaged over habits: the habit's word gets `binding` more."""
    binding, law = grammar.file.binding, grammar.frequencies[child]
    spread = (1 - binding) * law
    called = binding + spread
    others = -np.where(spread > 0, spread * np.log(np.where(spread > 0, spread, 1)), 0)
    return float((law * (-called * np.log(called) + others.sum() - others)).sum())


def _marginal_entropy(grammar, parent, child):
    """Entropy of a word before the word it follows is seen, averaged over habits, by enumerating each word's callers."""
    above, law, binding = (
        grammar.frequencies[parent],
        grammar.frequencies[child],
        grammar.file.binding,
    )
    if len(above) > SUBSETS:
        return np.nan
    callers = np.array(list(product((0, 1), repeat=len(above))))
    mass, size = callers @ above, callers.sum(1)
    total = 0.0
    for p in law:
        chance = p**size * (1 - p) ** (len(above) - size)
        q = (1 - binding) * p + binding * mass
        total -= (chance * q * np.log(np.where(q > 0, q, 1))).sum()
    return float(total)


def _total_latent_aware(grammar, shapes, role_mass):
    """Latent-aware nats per sentence by the chain rule in the order of the habits, whatever the order of the words."""
    total = -sum(s.probability * np.log(s.probability) for s in shapes)
    for shape in shapes:
        for role, parent in zip(shape.roles, shape.binds_to):
            r = grammar.roles.index(role)
            total += shape.probability * (
                _entropy(grammar.frequencies[r]) if parent < 0 else _bound_entropy(grammar, r)
            )
    return total


# ---------------------------------------------------------------------- patterns of equal words


def _words_entropy(grammar, shape):
    """Entropy of a sentence's words given its shape, all latents fresh and unknown."""
    places = {
        role: [i for i, name in enumerate(shape.roles) if name == role]
        for role in dict.fromkeys(shape.roles)
    }
    order = sorted(
        places,
        key=lambda role: (
            role in grammar.parents_first,
            grammar.parents_first.index(role) if role in grammar.parents_first else 0,
        ),
    )
    states = {(): 1.0}  # joint probability of the patterns of the roles so far
    patterns_of, entropy = {}, 0.0
    for number, role in enumerate(order):
        law, spots = grammar.frequencies[grammar.roles.index(role)], places[role]
        if (
            law.max() == law.min()
        ):  # a uniform role without a map: its words are independent, unless they follow habits
            if all(shape.binds_to[i] < 0 for i in spots):
                entropy += len(spots) * np.log(len(law))
                states = {(*seen, ()): p for seen, p in states.items()}
                patterns_of[role] = number
                continue
        fresh = defaultdict(float)
        for seen, p in states.items():
            for pattern, q in _patterns(
                grammar, shape, role, spots, seen, patterns_of, places
            ).items():
                fresh[(*seen, pattern)] += p * q
        states, patterns_of[role] = fresh, number
    for state, p in states.items():
        entropy -= p * np.log(p)
        for role in order:
            distinct = len(set(state[patterns_of[role]]))
            size = len(grammar.frequencies[grammar.roles.index(role)])
            entropy += p * sum(np.log(size - k) for k in range(distinct))
    return entropy


def _patterns(grammar, shape, role, spots, seen, patterns_of, places):
    """Probability of each pattern of equal words of `role`, given the patterns of the roles it follows."""
    law = tuple(grammar.frequencies[grammar.roles.index(role)])
    binding = grammar.file.binding
    caller = []  # for each word, which of its parent's distinct words it follows, or None
    for i in spots:
        parent = shape.binds_to[i]
        name = shape.roles[parent] if parent >= 0 else None
        caller.append(None if parent < 0 else seen[patterns_of[name]][places[name].index(parent)])
    table = defaultdict(float)
    bound = [i for i, c in enumerate(caller) if c is not None]
    for copies in product((True, False), repeat=len(bound)):
        copied = {i for i, copy in zip(bound, copies) if copy}
        weight = np.prod([binding if copy else 1 - binding for copy in copies]) if bound else 1.0
        if weight == 0:
            continue
        sources = [("habit", caller[i]) if i in copied else ("own", i) for i in range(len(spots))]
        distinct = list(dict.fromkeys(sources))
        for blocks in _partitions(len(distinct)):  # which independent draws turned out equal
            sizes = tuple(sorted(blocks.count(b) for b in set(blocks)))
            block_of = dict(zip(distinct, blocks))
            table[_canonical([block_of[source] for source in sources])] += weight * _distinct_mass(
                law, sizes
            )
    return table


def _partitions(n):
    """Every partition of n things, as tuples of block numbers in order of appearance."""
    if n == 0:
        return [()]
    return [(*p, b) for p in _partitions(n - 1) for b in range(max(p, default=-1) + 2)]


def _canonical(labels):
    first = {}
    return tuple(first.setdefault(label, len(first)) for label in labels)


@lru_cache(maxsize=None)
def _distinct_mass(law, sizes):
    """Sum over distinct ranks r1, r2, ... of law[r1]**sizes[0] * law[r2]**sizes[1] * ... (inclusion and exclusion)."""
    if not sizes:
        return 1.0
    last, rest = sizes[-1], sizes[:-1]
    total = float((np.array(law) ** last).sum()) * _distinct_mass(law, rest)
    for i in range(len(rest)):
        total -= _distinct_mass(law, tuple(sorted((*rest[:i], rest[i] + last, *rest[i + 1 :]))))
    return total
