"""The ideal reader: the best predictor of a corpus that begins each document knowing everything but its latents.

Given the words seen, the maps of different roles are independent. For a role that follows no habit the posterior is
exact (bayes.py). For one that does, each map is weighed by what followed what, with habits summed out exactly: given
the map, the habit of each parent word has its own posterior over the child's words. Maps are enumerated where they are
few; else a sample of uniformly random ones is weighed (importance sampling).
"""

from functools import cache, partial
from itertools import permutations
from math import factorial

import numpy as np
import torch

from latentree.data.grammar import LEVELS
from latentree.data.sampler import GrammarProcess
from latentree.exact.bayes import posterior_frequencies


def reader_losses(
    process: GrammarProcess, rows: dict, role_loss: torch.Tensor, maps: int = 1024, seed: int = 0
) -> torch.Tensor:
    """Loss of the ideal reader for each token of windows `rows` (sequence, position), in nats; role_loss of the same shape.

    It knows the syntax (`role_loss`, -log P(role | sentence so far)), the laws of ranks and habits, and which word
    follows which in a sentence; of latents, what the tokens since the field `unit` last changed tell (put the
    sentence's number there for a reader that forgets). Exact where no habits bind words or a role has at most `maps`
    maps, as long as the roles so far say which word follows which (it is told), and a clause has each role once and is
    finished before the next begins. Else the Monte Carlo error is that between two seeds; on average the loss is too
    high, by about a quarter of the mean squared difference between two seeds' losses.

    ValueError if latents are redrawn in part or at several levels, or for shared tokens: this reader has no such
    latents.
    """
    file = process.grammar.file
    if [file.redraw.get(level, 0.0) for level in LEVELS if file.redraw.get(level)] != [
        1.0
    ] or file.shared > 0:
        raise ValueError(
            f"{process.name}: redraw is {file.redraw}, shared {file.shared}: the ideal reader is known where one "
            "level redraws all latents and no token is shared; choose such a grammar"
        )
    grammar, shapes = process.grammar, process.documents([0]).shapes
    begin, fields = _beginners(grammar, maps, seed), ("tokens", "role", "place", "shape", "unit")
    losses = torch.zeros(rows["tokens"].shape, dtype=torch.float64)
    number = np.zeros(
        (len(grammar.roles), grammar.vocabulary_size), dtype=int
    )  # of each token among its role's words
    for r, tokens in enumerate(grammar.words):
        number[r, tokens] = np.arange(len(tokens))
    for row, columns in enumerate(zip(*(rows[name].tolist() for name in fields))):
        unit, known, words = None, {}, []
        for at, (token, role, place, shape, here) in enumerate(zip(*columns)):
            if here != unit:
                unit, known = here, {name: new() for name, new in begin.items()}
            words, word = words[:place], int(number[role, token])
            losses[row, at] = -np.log(predicted(shapes[shape], words, known)[word])
            learn(shapes[shape], words, word, known)
            words.append(word)
    return losses + role_loss


def top_word(process, role: str):
    """A function for `annotate` of `corpus.windows`: the field top, the token of the role's first rank where a token stands.

    ValueError unless one level redraws all maps, the role has one, and it follows no habit: the decoder is ideal there
    only.
    """
    file = process.grammar.file
    known = (
        role in file.roles
        and file.roles[role].has_map
        and not (file.binding > 0 and role in file.habits)
    )
    if not known or [share for share in file.redraw.values() if share] != [1.0] or file.shared > 0:
        raise ValueError(
            f"role = {role!r}: needs frequencies that differ, are redrawn as a whole at one level {file.redraw}, and "
            f"no habit {file.habits}; choose another role or grammar"
        )
    return lambda documents: {
        "top": documents.maps[role][documents.token["unit"] % len(documents.maps[role]), 0]
    }


def ideal_decoder(grammar, rows: dict, role: str) -> torch.Tensor:
    """Chance that the best reader of the tokens so far names the field `top` of windows `rows` rightly: (sequence, position).

    It names the word of the role seen most often since the latents were drawn (the field unit), one at random of
    several: swapping two words' ranks, the word seen more often is the more probable first rank. Ideal for independent
    draws; where other roles' words follow this one's, at the ends of sentences.
    """
    words = torch.as_tensor(grammar.words[grammar.roles.index(role)])
    found = torch.zeros(rows["tokens"].shape)
    for number, (tokens, unit, top) in enumerate(zip(rows["tokens"], rows["unit"], rows["top"])):
        seen = (tokens[:, None] == words).int().cumsum(0)
        begin = torch.searchsorted(unit, unit)  # units are numbered as they come
        seen = seen - torch.nn.functional.pad(seen, (0, 0, 1, 0))[begin]
        best = seen == seen.max(1, keepdim=True).values
        found[number] = (best & (words == top[:, None])).any(1) / best.sum(1)
    return found


def predicted(shape, words, known) -> np.ndarray:
    """P(next word of its role) (size,) in a sentence of this Shape, after the words (numbers in their roles).

    `known` {role: what is known of its words}. Messages pass along the habits, as in `predictors.predictive`.
    """
    now = len(words)

    def told_by(node, but=None):  # children that were seen, or have seen words below them
        return [
            c
            for c, parent in enumerate(shape.binds_to)
            if parent == node and c != but and (c < now or told_by(c))
        ]

    def down(node):
        parent, here = shape.binds_to[node], known[shape.roles[node]]
        if parent < now:
            return here.law(words[parent] if parent >= 0 else None)
        above = down(parent)
        for sibling in told_by(parent, node):
            above = above * up(sibling, len(above))
        return above @ np.stack([here.law(word) for word in range(len(above))])

    def up(node, size):
        below = known[shape.roles[node]].law()
        below = np.arange(len(below)) == words[node] if node < now else np.ones(len(below))
        for child in told_by(node) if node >= now else ():
            below = below * up(child, len(below))
        return np.stack([known[shape.roles[node]].law(word) for word in range(size)]) @ below

    law = down(now)
    for child in told_by(now):
        law = law * up(child, len(law))
    return law / law.sum()


def learn(shape, words, word, known) -> None:
    """Take in the next `word` of a sentence: what it follows, and which of the words before it follow it."""
    now = len(words)
    parent = shape.binds_to[now]
    if parent < now:
        known[shape.roles[now]].learn(word, words[parent] if parent >= 0 else None)
    for child in (c for c in range(now) if shape.binds_to[c] == now):
        known[shape.roles[child]].learn(words[child], word)


@cache
def frequency_of_count(counts: tuple, law: tuple) -> dict:
    """{count: expected frequency of a word seen so often} under an unknown map, from all words' counts (sorted)."""
    return dict(zip(counts, posterior_frequencies(counts, law).tolist()))


class Free:
    """What is known of the words of a role that follows no habit: how often each was seen."""

    def __init__(self, law_of_ranks):
        self.law_of_ranks, self.counts = law_of_ranks, np.zeros(len(law_of_ranks), dtype=int)

    def law(self, parent=None):
        """P(word), exact: (size,)."""
        counts = self.counts.tolist()
        believed = frequency_of_count(tuple(sorted(counts)), self.law_of_ranks)
        return np.array([believed[count] for count in counts])

    def learn(self, word, parent=None):
        """Count a word."""
        self.counts[word] += 1


class Bound:
    """What is known of the words of a role that follows habits: maps as frequencies (map, size), and their weights."""

    def __init__(self, maps, binding):
        self.maps, self.binding, self.weight = maps, binding, np.full(len(maps), 1 / len(maps))
        self.habit, self.own = (
            {},
            self.weight @ maps,
        )  # habit[parent]: P(the word it calls for | map), (map, size)

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
            likelihood = drawn + self.binding * habit[:, word]
            self.habit[parent] = habit * (drawn / np.maximum(likelihood, 1e-300))[:, None]
            self.habit[parent][:, word] += (
                self.binding * habit[:, word] / np.maximum(likelihood, 1e-300)
            )
        self.weight = self.weight * likelihood
        self.weight /= self.weight.sum()
        self.own = self.weight @ self.maps


def _beginners(grammar, maps, seed):
    """For each role a function that gives what is known of its words before any was seen."""
    draw, begin = np.random.default_rng(seed), {}
    for role, law in zip(grammar.roles, grammar.frequencies):
        if role not in grammar.file.habits or grammar.file.binding == 0:
            begin[role] = partial(Free, tuple(law.tolist()))
            continue
        if law.max() == law.min():
            frequencies = law[None]
        elif factorial(len(law)) <= maps:
            frequencies = np.array(list(permutations(law)))
        else:
            some = draw.permuted(
                np.tile(law, (-(-maps // len(law)), 1)), axis=1
            )  # all turns of them: no word is favoured
            frequencies = np.concatenate([np.roll(some, turn, axis=1) for turn in range(len(law))])
        begin[role] = partial(Bound, frequencies, grammar.file.binding)
    return begin
