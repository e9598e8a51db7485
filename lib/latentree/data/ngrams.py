"""Text without a tree: the release's hashed tables, a chain estimated from a corpus, successors.

All draw their documents side by side, a token of each at a time.
"""

import math
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from latentree.data import counter
from latentree.data.corpus import Corpus, side_by_side, strictly


class HashedTables(Corpus):
    """The released n-gram corpus: the last tokens, hashed, choose one of many Zipf laws.

    Each token draws an order from `orders` with weight i**-1.5 (i = 1, 2, ...), that many last
    tokens (fewer at the start of a document) are hashed to one of `tables`, and table j is a Zipf
    law over token index with exponent max(Normal(2.0, 1.2), 1.2): probabilities (tables, vocabulary
    - 1). A document has 10 + U{0..99} tokens and then the end token.
    """

    orders = (1, 2, 4, 8, 16, 32, 64, 128)
    shortest, spread = 10, 100

    @strictly
    def __init__(
        self,
        name="released-ngram",
        vocabulary_size: Annotated[int, Field(gt=1)] = 1000,
        tables: PositiveInt = 1000,
        seed=0,
        label: str = "",
    ):
        content = {"vocabulary_size": vocabulary_size, "tables": tables}
        end, length = vocabulary_size - 1, self.shortest + (self.spread - 1) / 2 + 1
        super().__init__(name, "hashed n-gram", vocabulary_size, end, length, content, seed, label)
        self.tables = tables
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(tables, generator=generator, dtype=torch.float64)
        exponent = (2.0 + 1.2 * normal).clamp(min=1.2)
        weight = torch.arange(1, vocabulary_size, dtype=torch.float64) ** -exponent[:, None]
        self.probabilities = weight / weight.sum(1, keepdim=True)
        self._order_weights = torch.arange(1, len(self.orders) + 1, dtype=torch.float64) ** -1.5
        self._of_order = counter.Laws([self._order_weights])
        self._of_table = counter.Laws(self.probabilities)
        powers = [1] + [counter.GOLDEN] * (self.shortest + self.spread)
        self._powers = torch.tensor(powers).cumprod(0)  # which wraps, as the hash does

    def documents(self, ids, device="cpu", detail=True):
        key, longest = self._keys(ids, device), self.shortest + self.spread
        length = self.shortest + counter.below(self.spread, counter.subkey(key, 0))
        place = torch.arange(longest, device=device)
        number = self._of_order.draw(0, counter.subkey(key[:, None], 1 + place))
        order = torch.tensor(self.orders, device=device)[number]
        word_key = counter.subkey(key[:, None], 1 + longest + place)

        tokens = torch.full((len(key), longest + 1), -1, device=device)
        prefix = torch.zeros_like(tokens)
        for t in range(int(length.max())):
            table = self._table(prefix, t, order[:, t])
            tokens[:, t] = self._of_table.draw(table, word_key[:, t])
            prefix[:, t + 1] = prefix[:, t] * counter.GOLDEN + tokens[:, t] + 1
        place = torch.arange(longest + 1, device=device)
        tokens = tokens.masked_fill(place > length[:, None], -1)
        return side_by_side({"tokens": tokens.masked_fill(place == length[:, None], self.end)})

    def _table(self, prefix, t, order):
        """Number of the table (documents,) that `order` (documents,) last tokens before t choose.

        A polynomial hash of each prefix gives that of any last tokens in one subtraction.
        """
        context = order.clamp(max=t)
        start = prefix.gather(1, (t - context)[:, None])[:, 0]
        hashed = counter.mix(prefix[:, t] - start * self._powers.to(prefix.device)[context])
        return (hashed >> 1 & 0x3FFFFFFFFFFFFFFF) % self.tables

    def token_losses(self, documents, knows_tables=True):
        """Exact loss of each token of whole documents, in nats (tokens,).

        With `knows_tables` of who knows the hash and all tables, and mixes those of all orders, for
        the order is hidden; else the tables' average only. Both know how lengths are spread.
        """
        document, place = documents.token["document"], documents.token["position"]
        tokens = torch.zeros(documents.count, int(place.max()) + 1, dtype=torch.int64)
        tokens[document, place] = documents.tokens
        prefix = torch.zeros(tokens.shape[0], tokens.shape[1] + 1, dtype=torch.int64)
        p, average = torch.zeros_like(tokens).double(), self.probabilities.mean(0)
        shares = self._order_weights / self._order_weights.sum()
        for t in range(tokens.shape[1]):
            token = tokens[:, t].clamp(max=self.vocabulary_size - 2)
            if not knows_tables:
                p[:, t] = average[token]
            else:
                for share, order in zip(shares, self.orders):
                    table = self._table(prefix, t, torch.full_like(token, order))
                    p[:, t] += share * self.probabilities[table, token]
            ending = 1 / (self.shortest + self.spread - t) if t >= self.shortest else 0.0
            p[:, t] = torch.where(tokens[:, t] == self.end, ending, (1 - ending) * p[:, t])
            prefix[:, t + 1] = prefix[:, t] * counter.GOLDEN + tokens[:, t] + 1
        return -p[document, place].log()


class Successors(Corpus):
    """Text with a latent and no tree: what follows a word is drawn anew for each document.

    Each of the `words` has `choices` words that may follow it, the same in all documents. A
    document draws one of them for each of the first `callers` words (0: all); that one follows with
    probability `binding`, else any of the choices does, all alike. Documents have `length` tokens
    and no end token. With a `bank` a document has one of so many rings of all words instead, in
    which a word calls for the next one: none is called for more than others. The field latent is
    the number of a document's ring.
    """

    @strictly
    def __init__(
        self,
        name="treeless",
        words: PositiveInt = 36,
        choices: PositiveInt = 12,
        binding: Annotated[float, Field(ge=0, le=1)] = 0.7,
        length: PositiveInt = 128,
        callers: NonNegativeInt = 0,
        bank: NonNegativeInt = 0,
        seed=0,
    ):
        if max(choices + 1, callers) > words:
            raise ValueError(
                f"{name}: words = {words}: give more than choices = {choices}, and at least "
                f"callers = {callers}"
            )
        content = {"words": words, "choices": choices, "binding": binding, "length": length}
        if callers:
            content["callers"] = callers
        if bank:
            content["bank"] = bank
        super().__init__(name, "treeless", words, None, length, content, seed)
        self.binding, self.length, self.callers = binding, length, callers or words
        word = torch.arange(words)
        others = counter.shuffled(counter.subkey(self._key, word), words - 1)[:, :choices]
        self.choices = others + (others >= word[:, None])  # a word never follows itself
        latents = counter.subkey(counter.subkey(self._key, -3), torch.arange(bank))
        ring = counter.shuffled(latents, words)
        self.bank = torch.empty_like(ring).scatter(1, ring, ring.roll(-1, 1))  # (latent, word)

    def documents(self, ids, device="cpu", detail=True):
        choices, (words, count) = self.choices.to(device), self.choices.shape
        key = self._keys(ids, device)[:, None]

        def keys(number, many):  # (documents, many)
            return counter.subkey(counter.subkey(key, number), torch.arange(many, device=device))

        fields = {}
        calls = choices.gather(1, counter.below(count, keys(1, words)).T).T
        if len(self.bank):
            latent = counter.below(len(self.bank), keys(5, 1))
            calls = self.bank.to(device)[latent[:, 0]]
            fields["latent"] = latent.expand(-1, self.length)
        other = counter.below(count, keys(2, self.length))
        bound = counter.happens(self.binding, keys(3, self.length))
        tokens = torch.empty_like(other)
        tokens[:, :1] = counter.below(words, keys(4, 1))
        for t in range(1, self.length):
            before = tokens[:, t - 1]
            called = calls.gather(1, before[:, None])[:, 0]
            follows = bound[:, t] & (before < self.callers)
            tokens[:, t] = torch.where(follows, called, choices[before, other[:, t]])
        return side_by_side(fields | {"tokens": tokens})

    def losses(self) -> tuple[float, float]:
        """Exact losses in nats after a caller: without knowing the document, and knowing it."""
        count = self.choices.shape[1]
        rest = (1 - self.binding) / count
        called = self.binding + rest
        aware = -called * math.log(called) - (count - 1) * rest * math.log(rest)
        return math.log(count), aware


class Chain(Corpus):
    """An order-n Markov chain with the n+1-gram counts of a sample of a corpus, read as a ring.

    In a ring no context lacks a successor, and its contexts are the chain's stationary law: the
    chain's loss is the sample's conditional entropy, exactly. A document starts after an end token
    and lasts as many end tokens as the documents it was estimated from. grams (sample,) are the
    ring's contexts with their next token, sorted, each one number in base vocabulary_size.
    """

    @strictly
    def __init__(
        self,
        parent: Corpus,
        order: PositiveInt = 3,
        sample_tokens: PositiveInt = 1_000_000,
        seed=0,
        name="",
        label: str = "",
    ):
        if parent.grammar is None or parent.vocabulary_size ** (order + 1) >= 2**62:
            raise ValueError(
                f"chain of order {order} of {parent.name}: has no grammar, or {order + 1} of its "
                f"{parent.vocabulary_size} words do not fit an integer; use another parent or order"
            )
        name = name or f"{parent.name}-order{order}"
        size, length = parent.vocabulary_size, parent.mean_document_length
        content = {"order": order, "sample_tokens": sample_tokens, "parent": parent.digest}
        super().__init__(name, "n-gram", size, parent.end, length, content, seed, label)
        self.order, self.words = order, parent.words
        self._sentences = parent.grammar.file.document.per_document("sentence")
        sampled = torch.arange(int(sample_tokens / length) + 1)
        sample = parent.documents(sampled, detail=False).tokens
        gram = torch.zeros_like(sample)
        for back in range(order, -1, -1):
            gram = gram * size + sample.roll(back)
        self.grams = gram.sort().values
        contexts = self.grams // size
        self._openings = contexts[contexts % size == self.end]

    def documents(self, ids, device="cpu", detail=True):
        grams, openings = self.grams.to(device), self._openings.to(device)
        size, keep = self.vocabulary_size, self.vocabulary_size ** (self.order - 1)
        key, tokens = self._keys(ids, device), []
        context = openings[_below(len(openings), counter.subkey(key, 0))]
        left = torch.full_like(key, self._sentences)
        while bool((left > 0).any()):
            low = torch.searchsorted(grams, context * size)
            high = torch.searchsorted(grams, (context + 1) * size)
            chosen = low + _below(high - low, counter.subkey(key, 1 + len(tokens)))
            token = grams[chosen] % size
            tokens.append(torch.where(left > 0, token, -1))
            context = context % keep * size + token
            left = left - (token == self.end).long()
        return side_by_side({"tokens": torch.stack(tokens, 1)})

    def losses(self):
        """Exact nats per token of the best predictor that sees n last tokens, for n = 0..order."""
        values = []
        for n in range(self.order + 1):
            grams = self.grams % self.vocabulary_size ** (n + 1)
            share = grams.unique(return_counts=True)[1].double() / len(grams)
            entropy = -(share * share.log()).sum()
            values.append(float(entropy) - sum(values))
        return values


def _below(count, key):
    """Uniform integers in [0, count) from keys; count <= 2**32, by 31 bits of each draw."""
    return (counter.uniform(key) >> (counter.BITS - 31)) * count >> 31
