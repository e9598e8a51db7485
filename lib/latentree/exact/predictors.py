"""Predictors run on given tokens: syntax-only and latent-aware (exact), and in-context counts.

The exact predictors mix over sentence shapes. Under one shape a word depends on the earlier words of its own clause,
along the habits that bind them (a tree), so its distribution follows from messages passed along that tree; each
shape's weight is its probability times that of the sentence's words so far.
"""

import numpy as np
import torch

from latentree.data.corpus import held_out, windows
from latentree.exact.parser import PrefixParser


def token_losses(grammar, documents, latent_aware=True):
    """Exact loss of each token in nats (tokens,): latent-aware or syntax-only.

    Raises ValueError for a recursive grammar with shared tokens, whose derivations cannot be told from its tokens.
    """
    if grammar.shapes is None:
        return _losses_by_own_shape(grammar, documents, latent_aware)
    return -predictive(grammar, documents, latent_aware, log_token=True)


def predictive(grammar, documents, latent_aware=True, log_token=False, trust=None):
    """Exact next-token distribution before each token: (tokens, vocabulary), or with `log_token` log p(token), (tokens,).

    `documents` are whole documents with their derivation (GrammarProcess.documents). `trust` {role: (map, habit)} says how
    likely their latents still hold: each word stands by its map with the first probability, else is any word of its role,
    and each use of a habit is the habit's with the second, else drawn afresh; every word and use anew (all 1 by default).
    """
    if grammar.shapes is None:
        raise ValueError(
            f"grammar {grammar.name}: whole distributions need shapes that can be enumerated; use token_losses"
        )
    sentences = _Sentences(grammar, documents, latent_aware, trust)
    shape = (sentences.count, sentences.longest) + (() if log_token else (grammar.vocabulary_size,))
    result = torch.zeros(shape, dtype=torch.float64)
    weight = torch.tensor([s.probability for s in grammar.shapes], dtype=torch.float64).repeat(
        sentences.count, 1
    )
    for place in range(sentences.longest):
        total = weight.sum(1)
        for number, candidate in enumerate(grammar.shapes):
            if place >= len(candidate.roles):
                weight[:, number] = 0
                continue
            rank_law, known = sentences.word_law(candidate, place)
            here = torch.where(
                known,
                rank_law.gather(1, sentences.ranks(candidate, place).clamp(min=0)[:, None])[:, 0],
                0,
            )
            if not log_token:
                share = (weight[:, number] / total)[:, None]
                result[:, place].scatter_add_(
                    1, sentences.words(candidate.roles[place]), rank_law * share
                )
            weight[:, number] = weight[:, number] * here
        if log_token:
            result[:, place] = (weight.sum(1) / total).log()
    return result[sentences.kept]


class _Sentences:
    """The sentences of documents as rows, and the law of a word under a shape given the words before it."""

    def __init__(self, grammar, documents, latent_aware, trust=None):
        self.grammar, self.binding = grammar, grammar.file.binding if latent_aware else 0.0
        self.trust = {role: (1.0, 1.0) for role in grammar.roles} | (trust or {})
        begins = documents.token["place"] == 0
        row = begins.cumsum(0) - 1
        self.count, self.longest = int(row[-1]) + 1, int(documents.token["place"].max()) + 1
        self.kept = torch.zeros(self.count, self.longest, dtype=torch.bool)
        self.kept[row, documents.token["place"]] = True
        self.tokens = torch.zeros(self.count, self.longest, dtype=torch.int64)
        self.tokens[self.kept] = documents.tokens
        self.unit = documents.token["unit"][begins]
        self.habits = {child: table[self.unit] for child, table in documents.habits.items()}
        self.maps, self.laws, self._rank_of = {}, {}, {}
        for r, role in enumerate(grammar.roles):
            words = (
                documents.maps[role] if latent_aware else torch.as_tensor(grammar.words[r])[None]
            )
            law = (
                grammar.frequencies[r]
                if latent_aware
                else np.full(grammar.sizes[r], 1 / grammar.sizes[r])
            )
            self.maps[role], self.laws[role] = words, torch.tensor(law, dtype=torch.float64)
            inverse = torch.full((len(words), grammar.vocabulary_size), -1)
            self._rank_of[role] = inverse.scatter(
                1, words, torch.arange(words.shape[1]).expand_as(words)
            )

    def _rows(self, table):
        return table[self.unit] if len(table) > 1 else table.expand(self.count, -1)

    def words(self, role):
        """Token of each rank for each sentence: (sentences, size)."""
        return self._rows(self.maps[role])

    def ranks(self, shape, place):
        """Rank of each sentence's token at `place` if it serves the shape's role there, else -1: (sentences,)."""
        return self._rows(self._rank_of[shape.roles[place]]).gather(
            1, self.tokens[:, place : place + 1]
        )[:, 0]

    def word_law(self, shape, place):
        """Distribution of the rank at `place` given the earlier words (sentences, size); whether the token can serve."""
        law = self._down(shape, place, place)
        for child in self._children(shape, place):
            law = law * self._up(shape, child, place)
        return self._blurred(shape, place, law / law.sum(1, keepdim=True)), self.ranks(
            shape, place
        ) >= 0

    def _children(self, shape, place):
        return (
            [c for c, parent in enumerate(shape.binds_to) if parent == place]
            if self.binding > 0
            else []
        )

    def _seen(self, shape, at):
        """One-hot ranks of an earlier word: (sentences, size)."""
        ranks, size = self.ranks(shape, at), len(self.laws[shape.roles[at]])
        return self._blurred(
            shape, at, torch.nn.functional.one_hot(ranks.clamp(min=0), size).double()
        )

    def _blurred(self, shape, at, law):
        """A law over ranks (sentences, size) as one over words, which their map may have lost (and the reverse)."""
        kept = self.trust[shape.roles[at]][0]
        return kept * law + (1 - kept) / law.shape[1]

    def _down(self, shape, node, now):
        """What the words above and beside `node` say of its rank: (sentences, size)."""
        parent, law = shape.binds_to[node], self.laws[shape.roles[node]]
        if parent < 0 or self.binding == 0:
            return law.expand(self.count, -1)
        if parent < now and self.trust[shape.roles[parent]][0] == 1:
            above = self._seen(shape, parent)
        else:
            above = self._down(shape, parent, now) * (
                self._seen(shape, parent) if parent < now else 1
            )
            for sibling in self._children(shape, parent):
                if sibling != node:
                    above = above * self._up(shape, sibling, now)
        called = torch.zeros(self.count, len(law), dtype=torch.float64).scatter_add(
            1, self.habits[shape.roles[node]], above
        )
        binding = self.binding * self.trust[shape.roles[node]][1]
        return binding * called + (1 - binding) * law * above.sum(1, keepdim=True)

    def _up(self, shape, node, now):
        """What `node` and the words below it say of its parent's rank: (sentences, parent's size)."""
        law, habit = self.laws[shape.roles[node]], self.habits[shape.roles[node]]
        below = (
            self._seen(shape, node)
            if node < now
            else torch.ones(self.count, len(law), dtype=torch.float64)
        )
        if node >= now:
            for child in self._children(shape, node):
                below = below * self._up(shape, child, now)
        binding = self.binding * self.trust[shape.roles[node]][1]
        return binding * below.gather(1, habit) + (1 - binding) * (below @ law)[:, None]


def role_losses(grammar, documents):
    """-log P(role | earlier roles of the sentence) for each token, in nats (tokens,), by the prefix parser."""
    parser, roles = PrefixParser(grammar), documents.token["role"].tolist()
    prefix, losses = (), []
    for r in roles:
        losses.append(-np.log(parser.next_roles(prefix)[r]))
        role = grammar.roles[r]
        prefix = () if r == len(grammar.roles) - 1 else (*prefix, role)
    return torch.tensor(losses, dtype=torch.float64)


def _losses_by_own_shape(grammar, documents, latent_aware):
    if grammar.file.shared > 0:
        raise ValueError(
            f"grammar {grammar.name}: recursive and with shared tokens, its derivations cannot be told from its "
            "tokens; set shared to 0"
        )
    sentences = _Sentences(grammar, documents, latent_aware)
    losses = torch.zeros(sentences.count, sentences.longest, dtype=torch.float64)
    shape_of = documents.token["shape"][documents.token["place"] == 0]
    for number in shape_of.unique().tolist():
        rows = (shape_of == number).nonzero()[:, 0]
        shape = documents.shapes[number]
        for place in range(len(shape.roles)):
            law, _ = sentences.word_law(shape, place)
            losses[rows, place] = -law[rows, sentences.ranks(shape, place)[rows]].log()
    return losses[sentences.kept] + role_losses(grammar, documents)


def held_out_with_references(process, sequences, context):
    """Held-out windows (corpus.held_out) of a grammar process with the losses of the reference predictors, in nats.

    Fields syntax_only, latent_aware, role_loss and counts beside the documents' own: (sequences, context) float32 each. The counts
    predictor's smoothing is fitted on the first training documents.
    """
    grammar = process.grammar

    def annotate(documents):
        losses = {
            name: token_losses(grammar, documents, name == "latent_aware")
            for name in ("syntax_only", "latent_aware")
        }
        return {
            name: value.float()
            for name, value in (losses | {"role_loss": role_losses(grammar, documents)}).items()
        }

    smoothing = fit_smoothing(windows(process, min(sequences, 128), context), grammar.sizes)
    kept = held_out(process, sequences, context, annotate=annotate)
    kept["counts"] = counts_losses(kept, grammar.sizes, smoothing, kept["role_loss"])
    return kept


# ---------------------------------------------------------------------- in-context counts


def counts_losses(rows, role_sizes, smoothing, role_loss):
    """Loss of the in-context counts predictor for each token of windows `rows` (sequences, context), in nats.

    It knows the syntax (`role_loss`, -log P(role | sentence so far), same shape) and predicts a word of role r by what
    followed the same word earlier in this document, backing off to the document's counts of r, then to uniform:
        p_role = (c(w) + b / n) / (c(r) + b),   p = (c(v, w) + a p_role) / (c(v, r) + a),
    with v the word before, n the words of the role (`role_sizes`), and smoothing = (a, b).
    """
    a, b = smoothing
    follows_same, role_same, word_same, pair_same = _matches(rows)
    size = torch.as_tensor(role_sizes, dtype=torch.float32)[rows["role"]]
    by_role = (word_same + b / size) / (role_same + b)
    return role_loss - ((pair_same + a * by_role) / (follows_same + a)).log()


def fit_smoothing(rows, role_sizes):
    """The (a, b) of least loss on windows `rows`, by a coarse-to-fine search over their logarithms."""
    best, centre, radius = None, np.zeros(2), 4.0
    zero = torch.zeros(rows["tokens"].shape)
    for _ in range(6):
        for da in (-1, 0, 1):
            for db in (-1, 0, 1):
                point = centre + radius * np.array([da, db])
                loss = float(counts_losses(rows, role_sizes, tuple(np.exp(point)), zero).mean())
                if best is None or loss < best[0]:
                    best = (loss, point)
        centre, radius = best[1], radius / 2
    return tuple(float(x) for x in np.exp(best[1]))


def _matches(rows, chunk=64):
    """Counts, over earlier tokens of the same document, that the predictor needs: four (sequences, context) tensors."""
    parts = []
    for start in range(0, len(rows["tokens"]), chunk):
        token, role, document = (
            rows[name][start : start + chunk] for name in ("tokens", "role", "document")
        )
        before = torch.nn.functional.pad(token[:, :-1], (1, 0), value=-1)
        before = torch.where(rows["position"][start : start + chunk] == 0, -1, before)
        earlier = torch.ones(token.shape[1], token.shape[1], dtype=torch.bool).tril(-1)
        same_document = (document[:, :, None] == document[:, None, :]) & earlier
        same_role = same_document & (role[:, :, None] == role[:, None, :])
        same_word = same_role & (token[:, :, None] == token[:, None, :])
        same_before = before[:, :, None] == before[:, None, :]
        parts.append(
            [
                m.sum(-1).float()
                for m in (same_role & same_before, same_role, same_word, same_word & same_before)
            ]
        )
    return [torch.cat(part) for part in zip(*parts)]
