"""The ideal reader: it begins each document knowing everything but the latents.

Given the words seen, the maps of different roles are independent. For a role that follows no habit
the posterior is exact. For one that does, each map is weighed by what followed what, with habits
summed out exactly: given the map, the habit of each parent word has its own posterior over the
child's words. Maps are enumerated where they are few, else a random sample of them is weighed
(importance sampling). A bank's latents are few and known: they are weighed by Bayes' rule.
"""

from functools import lru_cache
from itertools import permutations
from math import factorial

import numpy as np
import torch

from latentree.data.corpus import Documents
from latentree.data.grammar import open_binding
from latentree.exact.predictors import token_losses


def posterior_frequencies(counts, law) -> torch.Tensor:
    """E[frequency of each word | counts], (words,) float64: the exact law of the next draw.

    `counts` (words,) says how often each word was drawn; draws are independent from `law` (words,),
    the frequencies by rank, after a uniformly random assignment of words to ranks.

    The posterior is a sum over all permutations. Words seen equally often are interchangeable, so
    it is enough to count how many of each kind the ranks 1, 2, ... have used up: the number of ways
    is the coefficient of prod_k x_k^n_k in prod_r sum_k x_k law_r^c_k, for kinds k of n_k words
    seen c_k times. Tables before and after a rank say together which kind's word it has.
    """
    law, counts = np.asarray(law, dtype=float), np.asarray(counts)
    seen, kind, size = np.unique(counts, return_inverse=True, return_counts=True)
    order, place = np.argsort(-size, kind="stable"), np.argsort(-law, kind="stable")
    # Prices of ranks and kinds, under which the best assignment (most seen, most frequent) weighs 1
    # and no term more: the table stays in range however many words were seen.
    steps = np.sort(counts)[::-1][:-1] * np.diff(np.log(law[place]))
    price = np.zeros(len(law))
    price[place[1:]] = steps.cumsum()
    log_terms = seen[order][:, None] * np.log(law) - price
    terms = np.exp(log_terms - log_terms.max(1, keepdims=True)).T  # (rank, kind)
    # The largest kind needs no axis of the table: it takes the ranks that the others leave.
    full = size[order][1:]
    before = [np.zeros(full + 1)]
    before[0][(0,) * len(full)] = 1.0
    # Along each axis of a table: all places but the last, and all but the first, as indices.
    every = [np.s_[:]] * len(full)
    fewer = [(*every[:axis], np.s_[:-1]) for axis in range(len(full))]
    more = [(*every[:axis], np.s_[1:]) for axis in range(len(full))]
    for first, *others in terms:
        table = before[-1] * first
        for less, plus, term in zip(fewer, more, others):
            table[plus] += before[-1][less] * term
        before.append(table / table.max())
    after, has = np.zeros(full + 1), np.zeros((len(law), len(size)))
    after[tuple(full)] = 1.0
    for rank in reversed(range(len(law))):
        earlier = after * terms[rank, 0]
        has[rank, 0] = (before[rank] * earlier).sum()
        for axis, (less, plus) in enumerate(zip(fewer, more), start=1):
            taken = after[plus] * terms[rank, axis]
            has[rank, axis] = (before[rank][less] * taken).sum()
            earlier[less] += taken
        after = earlier / earlier.max()
    has /= has.sum(1, keepdims=True)  # chance that the rank has a word of the kind
    of_kind = np.empty(len(size))
    of_kind[order] = law @ has / size[order]
    return torch.from_numpy(of_kind[kind])


def reader_losses(process, rows: dict, role_loss, maps=1024, seed=0) -> torch.Tensor:
    """Loss of the ideal reader for each token of windows `rows` (sequence, position), in nats.

    It knows the syntax (`role_loss`, -log P(role | sentence so far)), the laws of ranks and habits,
    and which word follows which in a sentence; of latents, what the tokens since the field `unit`
    last changed tell (put the sentence's number there for a reader that forgets). Exact where no
    habits bind words or a role has at most `maps` maps, as long as a clause has each role once and
    is finished before the next begins. Else the Monte Carlo error is that between two seeds; on
    average the loss is too high, by about a quarter of the mean squared difference between them.
    Raises ValueError for a grammar whose ideal reader is not known (`check_known`).
    """
    grammar = process.grammar
    check_known(grammar)
    shapes, choices = grammar.shapes, _maps_of(grammar, maps, seed)
    begins = np.array([words[0] for words in grammar.words])
    fields = ["tokens", "role", "place", "unit"]
    fields.append("shape" if grammar.file.binding else "place")  # which nothing asks for then
    losses = torch.zeros(rows["tokens"].shape, dtype=torch.float64)
    for row, columns in enumerate(zip(*(rows[name].tolist() for name in fields))):
        last_unit, known, words = None, {}, []
        for at, (token, role, place, unit, shape) in enumerate(zip(*columns)):
            if unit != last_unit:
                last_unit, known = unit, _nothing_known(grammar, choices)
            words, word = words[:place], int(token - begins[role])
            if grammar.file.binding == 0:
                of_role = known[grammar.roles[role]]
                losses[row, at] = -np.log(of_role.law()[word])
                of_role.learn(word)
                continue
            losses[row, at] = -np.log(_predicted(shapes[shape], words, known)[word])
            _learn(shapes[shape], words, word, known)
            words.append(word)
    return losses + role_loss


def bank_losses(process, rows: dict) -> torch.Tensor:
    """Loss of the ideal reader of a bank for each token of windows `rows`, in nats.

    (sequence, position) float64. It knows the grammar and every latent of the bank, and weighs them
    by what the tokens so far say, since the latent was last drawn (the field unit). Exact.
    """
    fields = {name: rows[name].flatten() for name in ("tokens", "place", "shape")}
    grammar, count, words, told = process.grammar, process.grammar.file.bank, {}, []
    for role, tokens in zip(grammar.roles, grammar.words):
        words[role] = torch.as_tensor(tokens).expand(count, -1)
    for latent in range(count):
        unit = torch.full_like(fields["place"], latent)
        given = Documents(fields | {"unit": unit}, count, grammar.shapes, words, process.bank)
        told.append(-token_losses(grammar, given))
    told = torch.stack(told).view(count, *rows["unit"].shape)
    before = told.cumsum(2) - told
    begins = torch.searchsorted(rows["unit"], rows["unit"])  # units are numbered as they come
    before = before - before.gather(2, begins.expand_as(before))
    return before.logsumexp(0) - (before + told).logsumexp(0)


def check_known(grammar):
    """ValueError, a line, if `reader_losses` does not know the reader of a grammar (None: none).

    It knows latents that one level redraws as a whole, and sentences whose roles so far say which
    word follows which.
    """
    if grammar is None:
        raise ValueError(
            "the first corpus follows no grammar, so that it has no ideal reader; name one first "
            "whose file has a `sentence`, as bound has"
        )
    if grammar.file.bank:
        raise ValueError(
            f"{grammar.name}: bank = {grammar.file.bank}: its reader is `bank_losses`; use that"
        )
    if [share for share in grammar.file.redraw.values() if share > 0] != [1.0]:
        raise ValueError(
            f"{grammar.name}: redraw is {grammar.file.redraw}: the ideal reader is known where one "
            "level redraws all latents; choose another grammar"
        )
    if grammar.file.binding and (grammar.shapes is None or open_binding(grammar.shapes)):
        raise ValueError(
            f"{grammar.name}: its roles do not say, as they come, which word follows which, so "
            "that the ideal reader is not known; set binding to 0, or choose another grammar"
        )


# ---------------------------------------------------------------------- one sentence


def _predicted(shape, words, known) -> np.ndarray:
    """P(next word of its role), (size,), in a sentence of this Shape after the words so far.

    Words are numbers in their roles. Messages pass along the habits, as in `predictors`.
    """
    now = len(words)

    def told_by(node, but=None):
        """Children that were seen, or have seen words below them."""
        children = [c for c, parent in enumerate(shape.binds_to) if parent == node and c != but]
        return [child for child in children if child < now or told_by(child)]

    def from_above(node):
        parent, here = shape.binds_to[node], known[shape.roles[node]]
        if parent < now:
            return here.law(words[parent] if parent >= 0 else None)
        above = from_above(parent)
        for sibling in told_by(parent, but=node):
            above = above * from_below(sibling, len(above))
        return above @ np.stack([here.law(word) for word in range(len(above))])

    def from_below(node, size):
        here = known[shape.roles[node]]
        laws = np.stack([here.law(word) for word in range(size)])  # by the parent's word
        if node < now:
            return laws[:, words[node]]
        below = np.ones(laws.shape[1])
        for child in told_by(node):
            below = below * from_below(child, len(below))
        return laws @ below

    law = from_above(now)
    for child in told_by(now):
        law = law * from_below(child, len(law))
    return law / law.sum()


def _learn(shape, words, word, known) -> None:
    """Take in the next `word` of a sentence: what it follows, and what followed it already."""
    now, parent = len(words), shape.binds_to[len(words)]
    if parent < now:
        known[shape.roles[now]].learn(word, words[parent] if parent >= 0 else None)
    for child in range(now):
        if shape.binds_to[child] == now:
            known[shape.roles[child]].learn(words[child], word)


# ---------------------------------------------------------------------- a role's words


@lru_cache(maxsize=4096)
def _frequency_of_count(counts: tuple, law: tuple) -> dict:
    """{count: expected frequency of a word seen so often}, from all words' sorted counts."""
    return dict(zip(counts, posterior_frequencies(counts, law).tolist()))


class _Free:
    """What is known of the words of a role that follows no habit: how often each was seen."""

    def __init__(self, law_of_ranks):
        self.law_of_ranks, self.counts = law_of_ranks, [0] * len(law_of_ranks)

    def law(self, parent=None):
        """P(word), exact: (size,)."""
        believed = _frequency_of_count(tuple(sorted(self.counts)), self.law_of_ranks)
        return np.array([believed[count] for count in self.counts])

    def learn(self, word, parent=None):
        """Count a word."""
        self.counts[word] += 1


class _Bound:
    """What is known of the words of a role that follows habits.

    maps (map, size) are frequencies, each with its weight (map,); habit[parent] (map, size) is
    P(the word it calls for | map).
    """

    def __init__(self, maps, binding):
        self.maps, self.binding, self.habit = maps, binding, {}
        self.weight = np.full(len(maps), 1 / len(maps))
        self.own = self.weight @ maps

    def law(self, parent=None):
        """P(word | the word it follows, None: no word): (size,)."""
        if parent not in self.habit:
            return self.own
        return self.binding * (self.weight @ self.habit[parent]) + (1 - self.binding) * self.own

    def learn(self, word, parent=None):
        """Bayes' rule for the maps, and for the habit of the word that was followed."""
        likelihood = self.maps[:, word]
        if parent is not None:
            habit = self.habit.get(parent, self.maps)
            drawn = (1 - self.binding) * self.maps[:, word]
            called = self.binding * habit[:, word]
            likelihood = drawn + called
            evidence = np.maximum(likelihood, 1e-300)
            self.habit[parent] = habit * (drawn / evidence)[:, None]
            self.habit[parent][:, word] += called / evidence
        self.weight = self.weight * likelihood
        self.weight /= self.weight.sum()
        self.own = self.weight @ self.maps


def _maps_of(grammar, count, seed):
    """Maps, as frequencies (map, size), of each bound role: all, or about `count` at random."""
    draw, maps = np.random.default_rng(seed), {}
    for role, law in zip(grammar.roles, grammar.frequencies):
        if grammar.file.binding == 0 or role not in grammar.file.habits:
            continue
        if law.max() == law.min():
            maps[role] = law[None]
        elif factorial(len(law)) <= count:
            maps[role] = np.array(list(permutations(law)))
        else:
            some = draw.permuted(np.tile(law, (-(-count // len(law)), 1)), axis=1)
            # With all turns of each, no word is favoured.
            maps[role] = np.concatenate([np.roll(some, turn, 1) for turn in range(len(law))])
    return maps


def _nothing_known(grammar, maps):
    """What is known of each role's words before any was seen."""
    known = {}
    for role, law in zip(grammar.roles, grammar.frequencies):
        if role in maps:
            known[role] = _Bound(maps[role], grammar.file.binding)
        else:
            known[role] = _Free(tuple(law.tolist()))
    return known
