"""Predictors run on given tokens: syntax-only and latent-aware, exact.

They mix over sentence shapes, each with the weight of its probability times that of the sentence's
words so far. Under one shape a word depends on the earlier words of its own clause along the habits
that bind them (a tree): its distribution follows from messages passed along that tree.
"""

import numpy as np
import torch
from torch.nn.functional import one_hot

from latentree.data.corpus import held_out
from latentree.data.grammar import open_binding
from latentree.exact.ceilings import enumerated
from latentree.exact.parser import PrefixParser


def token_losses(grammar, documents, latent_aware=True):
    """Exact loss of each token in nats (tokens,): latent-aware or syntax-only.

    Where shapes cannot be enumerated, the roles of a sentence so far must say whom each word
    follows: ValueError where these documents show that they do not.
    """
    if grammar.shapes is not None:
        return -predictive(grammar, documents, latent_aware, log_token=True)
    sentences = _Sentences(grammar, documents, latent_aware)
    losses = role_losses(grammar, documents)
    if not latent_aware or grammar.file.binding == 0:
        return losses - sentences.log_frequencies()
    if roles := open_binding(documents.shapes):
        raise ValueError(
            f"grammar {grammar.name}: '{' '.join(roles)}' leaves open whom its last word follows, "
            "and its sentence shapes cannot be enumerated; set binding to 0, or ask for syntax-only"
        )
    of_word = torch.zeros(sentences.kept.shape, dtype=torch.float64)
    shape_of = documents.token["shape"][documents.token["place"] == 0]
    for number in shape_of.unique().tolist():
        rows, shape = shape_of == number, documents.shapes[number]
        for place in range(len(shape.roles)):
            law = sentences.word_law(shape, place)
            of_word[rows, place] = -sentences.chance(law, shape, place)[rows].log()
    return losses + of_word[sentences.kept]


def predictive(grammar, documents, latent_aware=True, log_token=False):
    """Exact next-token distribution before each token: (tokens, vocabulary).

    With `log_token` only log p(token), (tokens,). `documents` are whole ones, of a GrammarProcess.
    Raises ValueError for a grammar whose shapes cannot be enumerated.
    """
    shapes = enumerated(grammar)
    sentences = _Sentences(grammar, documents, latent_aware)
    size = () if log_token else (grammar.vocabulary_size,)
    result = torch.zeros((*sentences.kept.shape, *size), dtype=torch.float64)
    prior = torch.tensor([shape.probability for shape in shapes], dtype=torch.float64)
    weight = prior.repeat(len(result), 1)  # of each shape and the words so far
    for place in range(result.shape[1]):
        total = weight.sum(1)
        for number, shape in enumerate(shapes):
            if place >= len(shape.roles):
                weight[:, number] = 0
                continue
            law = sentences.word_law(shape, place)
            if not log_token:
                share = (weight[:, number] / total)[:, None]
                words = sentences.words(shape.roles[place])
                result[:, place].scatter_add_(1, words, law * share)
            weight[:, number] *= sentences.chance(law, shape, place)
        if log_token:
            result[:, place] = (weight.sum(1) / total).log()
    return result[sentences.kept]


class _Sentences:
    """The sentences of documents as rows, and the law of a word given a shape and earlier words.

    kept (sentences, longest) is True where a sentence has a word.
    """

    def __init__(self, grammar, documents, latent_aware):
        token, place = documents.token, documents.token["place"]
        row = (place == 0).cumsum(0) - 1
        self.kept = torch.zeros(int(row[-1]) + 1, int(place.max()) + 1, dtype=torch.bool)
        self.kept[row, place] = True
        self._unit = token["unit"][place == 0]
        if latent_aware:
            self._binding, laws = grammar.file.binding, grammar.frequencies
            self._maps = documents.maps
        else:
            self._binding, laws = 0.0, [np.full(size, 1 / size) for size in grammar.sizes]
            words = [torch.as_tensor(words)[None] for words in grammar.words]
            self._maps, self._unit = dict(zip(grammar.roles, words)), torch.zeros_like(self._unit)
        self._habits = {child: rows[self._unit] for child, rows in documents.habits.items()}
        self._laws = {role: torch.tensor(law) for role, law in zip(grammar.roles, laws)}
        units = len(self._maps[grammar.roles[0]])
        rank_of = torch.empty(units, grammar.vocabulary_size, dtype=torch.int64)
        for words in self._maps.values():
            rank_of.scatter_(1, words, torch.arange(words.shape[1]).expand_as(words))
        self._number = {role: r for r, role in enumerate(grammar.roles)}
        self._roles, self._ranks = torch.zeros((2, *self.kept.shape), dtype=torch.int64)
        self._roles[self.kept] = torch.as_tensor(grammar.role_of)[documents.tokens]
        self._ranks[self.kept] = rank_of[self._unit[row], documents.tokens]

    def log_frequencies(self):
        """Log of the share of each token among its role's words, by its rank: (tokens,)."""
        begins = torch.tensor([0, *map(len, self._laws.values())]).cumsum(0)
        cell = begins[self._roles[self.kept]] + self._ranks[self.kept]
        return torch.cat(list(self._laws.values()))[cell].log()

    def words(self, role):
        """Token of each rank for each sentence: (sentences, size)."""
        return self._maps[role][self._unit]

    def word_law(self, shape, place):
        """Distribution of the rank at `place` given the earlier words: (sentences, size)."""
        law = self._from_above(shape, place, place)
        for child in self._children(shape, place):
            law = law * self._from_below(shape, child, place)
        return law / law.sum(1, keepdim=True)

    def chance(self, law, shape, place):
        """P(word at `place`) by `law`, 0 where its role is not the shape's: (sentences,)."""
        rank, right = self._rank(shape, place)
        return law.gather(1, rank[:, None])[:, 0].where(right, 0.0)

    def _rank(self, shape, place):
        """Rank of the word at `place`, 0 where its role is not the shape's, and where it is."""
        right = self._roles[:, place] == self._number[shape.roles[place]]
        return self._ranks[:, place].where(right, 0), right

    def _children(self, shape, place):
        if self._binding == 0:
            return []
        return [child for child, parent in enumerate(shape.binds_to) if parent == place]

    def _seen(self, shape, place):
        """One-hot ranks of an earlier word: (sentences, size)."""
        return one_hot(self._rank(shape, place)[0], len(self._laws[shape.roles[place]])).double()

    def _from_above(self, shape, node, now):
        """What the words above and beside `node` say of its rank: (sentences, size)."""
        role, law = shape.roles[node], self._laws[shape.roles[node]]
        parent = shape.binds_to[node]
        if parent < 0 or self._binding == 0:
            return law.expand(len(self.kept), -1)
        if parent < now:
            above = self._seen(shape, parent)  # known for sure: nothing else tells of it
        else:
            above = self._from_above(shape, parent, now)
            for sibling in self._children(shape, parent):
                if sibling != node:
                    above = above * self._from_below(shape, sibling, now)
        called = torch.zeros(len(self.kept), len(law), dtype=torch.float64)
        called.scatter_add_(1, self._habits[role], above)
        free = law * above.sum(1, keepdim=True)
        return self._binding * called + (1 - self._binding) * free

    def _from_below(self, shape, node, now):
        """What `node` and words below it say of its parent's rank: (sentences, parent's size)."""
        role, law = shape.roles[node], self._laws[shape.roles[node]]
        if node < now:
            below = self._seen(shape, node)
        else:
            below = torch.ones(len(self.kept), len(law), dtype=torch.float64)
            for child in self._children(shape, node):
                below = below * self._from_below(shape, child, now)
        called = below.gather(1, self._habits[role])
        return self._binding * called + (1 - self._binding) * (below @ law)[:, None]


def role_losses(grammar, documents):
    """-log P(role | earlier roles of the sentence) of each token, in nats (tokens,)."""
    parser, prefix, losses = PrefixParser(grammar), (), []
    for place, r in zip(documents.token["place"].tolist(), documents.token["role"].tolist()):
        prefix = prefix[:place]
        losses.append(-np.log(parser.next_roles(prefix)[r]))
        prefix = (*prefix, grammar.roles[r])
    return torch.tensor(losses, dtype=torch.float64)


def held_out_with_references(process, sequences, context):
    """Held-out windows of a grammar process with the losses of reference predictors, in nats.

    Fields syntax_only, latent_aware and role_loss beside the documents' own: (sequences, context)
    float32 each.
    """
    grammar = process.grammar

    def annotate(documents):
        return {
            "syntax_only": token_losses(grammar, documents, latent_aware=False).float(),
            "latent_aware": token_losses(grammar, documents).float(),
            "role_loss": role_losses(grammar, documents).float(),
        }

    return held_out(process, sequences, context, annotate=annotate)
