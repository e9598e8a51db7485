"""Exact losses of predictors that know a part of the hierarchy, in nats per token.

syntax-only: knows the sentence grammar and each role's words; of the latents nothing, so that
    within a role all words are equally likely.
latent-aware: also knows the maps and habits that hold where each token stands. No learner that must
    infer them from context can reach it.
in-sentence: infers latents that are fresh in each sentence from its own words. This is the floor of
    a flat corpus.

Here are expected values, by enumeration of the grammar's shapes (ValueError if that cannot be);
`predictors.token_losses` has those of given tokens. A predictor sees words, never a derivation:
where several derivations yield the same roles, it weighs them.
"""

from collections import Counter, defaultdict
from functools import lru_cache
from itertools import product

import numpy as np
import pandas as pd

from latentree.data.grammar import open_binding

_MOST_PARENTS = 16  # of which all subsets are enumerated, for a habit's marginal


def expected(grammar):
    """Exact expected losses: DataFrame (role, share, syntax_only, latent_aware).

    The last row has role "all". `share` is the role's share of tokens; losses are nats per token of
    that role. latent_aware is NaN by role where it has no short form: where a word comes before the
    word it follows and the roles are large, or where the roles so far leave open whom a word
    follows; the last row is always exact. ValueError where a whole sentence leaves that open.
    """
    shapes, mass = enumerated(grammar), defaultdict(float)
    for shape in shapes:
        for end in range(len(shape.roles) + 1):
            mass[shape.roles[:end]] += shape.probability
    counts, syntax, latent = np.zeros((3, len(grammar.roles)))
    for shape in shapes:
        for place, role in enumerate(shape.roles):
            r = grammar.roles.index(role)
            of_role = -np.log(mass[shape.roles[: place + 1]] / mass[shape.roles[:place]])
            counts[r] += shape.probability
            syntax[r] += shape.probability * (of_role + np.log(grammar.sizes[r]))
            latent[r] += shape.probability * (of_role + _word_entropy(grammar, shape, place))
    if open_binding(shapes):
        latent[:] = np.nan
    total = latent.sum()
    if np.isnan(total):
        total = _latent_aware_in_order_of_habits(grammar)
    table = pd.DataFrame({"role": grammar.roles, "share": counts / counts.sum()})
    table["syntax_only"], table["latent_aware"] = syntax / counts, latent / counts
    table.loc[len(table)] = ["all", 1.0, syntax.sum() / counts.sum(), total / counts.sum()]
    return table


def in_sentence(grammar):
    """Exact loss per token, in nats, of the best predictor if every sentence has fresh latents.

    A fresh map makes words exchangeable: the entropy of a sentence is that of its roles, of the
    pattern of equal words, and of the distinct words that fill the pattern. A verb's ranks depend
    on its subjects' pattern alone, because habits are drawn independently for each subject. Raises
    ValueError for a bank, whose habits are not.
    """
    if grammar.file.bank:
        raise ValueError(
            f"grammar {grammar.name}: bank = {grammar.file.bank}: its habits are no independent "
            "draws; use reader.bank_losses"
        )
    entropy = 0.0
    for shapes in _by_roles(grammar):
        p = sum(shape.probability for shape in shapes)
        entropy += p * (_words_entropy(grammar, shapes) - np.log(p))
    return entropy / grammar.mean_length


def enumerated(grammar):
    """The grammar's shapes; ValueError if they cannot be enumerated."""
    if grammar.shapes is None:
        raise ValueError(
            f"grammar {grammar.name}: its sentence shapes cannot be enumerated (recursive, or too "
            "many); use predictors.token_losses on sampled documents"
        )
    return grammar.shapes


def _by_roles(grammar):
    """The shapes, those that have the same roles together: a list of lists."""
    groups = defaultdict(list)
    for shape in enumerated(grammar):
        groups[shape.roles].append(shape)
    return list(groups.values())


def _entropy(p):
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


# ---------------------------------------------------------------------- latent-aware


def _word_entropy(grammar, shape, place):
    """Expected entropy of a word given the latents and the earlier words; NaN if unknown."""
    r, parent = grammar.roles.index(shape.roles[place]), shape.binds_to[place]
    earlier = shape.binds_to[:place]  # whom the words before this one follow
    law = grammar.frequencies[r]
    if parent < 0 and place not in earlier:
        return _entropy(law)
    if 0 <= parent < place and place not in earlier:
        return _bound_entropy(grammar, r)
    if parent < 0 and earlier.count(place) == 1 and earlier.index(place) not in earlier:
        # H(parent | child) = H(parent) + H(child | parent) - H(child)
        child = grammar.roles.index(shape.roles[earlier.index(place)])
        return _entropy(law) + _bound_entropy(grammar, child) - _marginal_entropy(grammar, r, child)
    if parent > place and shape.binds_to[parent] < 0 and not {place, parent} & set(earlier):
        return _marginal_entropy(grammar, grammar.roles.index(shape.roles[parent]), r)
    return np.nan


def _bound_entropy(grammar, child):
    """Entropy of a word given the one it follows, over habits: theirs gets `binding` more."""
    binding, law = grammar.file.binding, grammar.frequencies[child]
    spread = (1 - binding) * law
    called = binding + spread
    others = -np.where(spread > 0, spread * np.log(np.where(spread > 0, spread, 1)), 0)
    return float((law * (-called * np.log(called) + others.sum() - others)).sum())


def _marginal_entropy(grammar, parent, child):
    """Entropy of a word before the word it follows is seen, averaged over habits.

    Enumerates which ranks of the parent call for a word; NaN for more than _MOST_PARENTS of them.
    """
    above, law = grammar.frequencies[parent], grammar.frequencies[child]
    if grammar.file.bank:  # one to one habits leave an even law even
        return _entropy(law)
    if len(above) > _MOST_PARENTS:
        return np.nan
    callers = np.array(list(product((0, 1), repeat=len(above))))
    mass, size = callers @ above, callers.sum(1)
    total = 0.0
    for p in law:
        chance = p**size * (1 - p) ** (len(above) - size)
        q = (1 - grammar.file.binding) * p + grammar.file.binding * mass
        total -= (chance * q * np.log(np.where(q > 0, q, 1))).sum()
    return float(total)


def _latent_aware_in_order_of_habits(grammar):
    """Latent-aware nats per sentence, by the chain rule in the order of the habits."""
    total = 0.0
    for shapes in _by_roles(grammar):
        roles, binds_to = shapes[0].roles, shapes[0].binds_to
        if any(shape.binds_to != binds_to for shape in shapes):
            raise ValueError(
                f"grammar {grammar.name}: '{' '.join(roles[:-1])}' has derivations in which "
                "different words follow each other, so that its latent-aware loss has no short "
                "form; use predictors.token_losses on sampled documents (in_sentence is exact)"
            )
        p = sum(shape.probability for shape in shapes)
        total -= p * np.log(p)
        for role, parent in zip(roles, binds_to):
            r = grammar.roles.index(role)
            law = grammar.frequencies[r]
            total += p * (_entropy(law) if parent < 0 else _bound_entropy(grammar, r))
    return total


# ---------------------------------------------------------------------- patterns of equal words


def _words_entropy(grammar, shapes):
    """Entropy of a sentence's words given its roles, all latents fresh and unknown.

    `shapes` are all that have these roles: a pattern is as likely as they make it together.
    """
    roles, followers = shapes[0].roles, grammar.parents_first
    order = [role for role in dict.fromkeys(roles) if role not in followers]
    order += [role for role in followers if role in roles]
    entropy, mixed = 0.0, []  # roles that have neither map nor habit: independent words
    for role in order:
        law = grammar.frequencies[grammar.roles.index(role)]
        spots = [place for place, name in enumerate(roles) if name == role]
        bound = any(shape.binds_to[place] >= 0 for shape in shapes for place in spots)
        if bound or role in grammar.file.habits.values() or law.max() > law.min():
            mixed.append(role)
        else:
            entropy += len(spots) * np.log(len(law))
    table, total = defaultdict(float), sum(shape.probability for shape in shapes)
    for shape in shapes:
        for patterns, p in _patterns(grammar, shape, mixed).items():
            table[patterns] += p * shape.probability / total
    for patterns, p in table.items():
        entropy -= p * np.log(p)
        for role, pattern in zip(mixed, patterns):
            left = grammar.sizes[grammar.roles.index(role)] - np.arange(len(set(pattern)))
            entropy += p * np.log(left).sum()
    return entropy


def _patterns(grammar, shape, order):
    """Probability of the patterns of equal words of the roles in `order`, parents first."""
    states = {(): 1.0}
    for role in order:
        law = tuple(grammar.frequencies[grammar.roles.index(role)])
        spots = [place for place, name in enumerate(shape.roles) if name == role]
        longer = defaultdict(float)
        for patterns, p in states.items():
            callers = [_caller(shape, place, dict(zip(order, patterns))) for place in spots]
            for pattern, q in _pattern_law(law, grammar.file.binding, callers).items():
                longer[(*patterns, pattern)] += p * q
        states = longer
    return states


def _caller(shape, place, pattern_of):
    """Which of the distinct words of its parent's role the word at `place` follows, or None."""
    parent = shape.binds_to[place]
    if parent < 0:
        return None
    role = shape.roles[parent]
    return pattern_of[role][shape.roles[:parent].count(role)]


def _pattern_law(law, binding, callers):
    """Probability of each pattern of equal words of a role.

    `callers` says which word each one follows, or None. A word that follows another copies that
    one's habit, or is drawn on its own: then it may still turn out equal to others.
    """
    table = defaultdict(float)
    bound = [i for i, caller in enumerate(callers) if caller is not None]
    for copies in product((True, False), repeat=len(bound)):
        weight = binding ** sum(copies) * (1 - binding) ** (len(bound) - sum(copies))
        if weight == 0:
            continue
        sources = [("own", i) for i in range(len(callers))]
        for i, copy in zip(bound, copies):
            if copy:
                sources[i] = ("habit", callers[i])
        draws = list(dict.fromkeys(sources))
        for blocks in _partitions(len(draws)):  # which independent draws turned out equal
            sizes = tuple(sorted(Counter(blocks).values()))
            pattern = tuple(blocks[draws.index(source)] for source in sources)
            table[pattern] += weight * _distinct_mass(law, sizes)
    return table


def _partitions(n):
    """Every partition of n things, as tuples of block numbers in order of appearance."""
    found = [()]
    for _ in range(n):
        found = [(*some, new) for some in found for new in range(max(some, default=-1) + 2)]
    return found


@lru_cache(maxsize=None)
def _distinct_mass(law, sizes):
    """Sum over distinct ranks r1, r2, ... of law[r1]**sizes[0] * law[r2]**sizes[1] * ..."""
    if not sizes:
        return 1.0
    last, rest = sizes[-1], sizes[:-1]
    total = float((np.array(law) ** last).sum()) * _distinct_mass(law, rest)
    for i in range(len(rest)):
        merged = (*rest[:i], rest[i] + last, *rest[i + 1 :])
        total -= _distinct_mass(law, tuple(sorted(merged)))
    return total
