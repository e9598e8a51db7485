"""The two n-gram controls: the release's hashed tables, and a chain estimated from a corpus with structure."""

import torch

from latentree.data import counter
from latentree.data.corpus import Corpus, Documents, position_within


class HashedTables(Corpus):
    """The released n-gram corpus: the last tokens, hashed, choose one of many Zipf laws over token index.

    Each token draws an order from `orders` with weight i**-1.5 (i = 1, 2, ...), that many last tokens (fewer at the
    start of a document) are hashed to one of `tables`, and table j is a Zipf law over token index with exponent
    max(Normal(2.0, 1.2), 1.2). A document has 10 + U{0..99} tokens and then the end token.
    """

    orders = (1, 2, 4, 8, 16, 32, 64, 128)
    shortest, spread = 10, 100

    def __init__(self, name="released-ngram", vocabulary_size=1000, tables=1000, seed=0, label=""):
        super().__init__(
            name=name,
            kind="hashed n-gram",
            vocabulary_size=vocabulary_size,
            end=vocabulary_size - 1,
            mean_document_length=self.shortest + (self.spread - 1) / 2 + 1,
            content={"vocabulary_size": vocabulary_size, "tables": tables},
            seed=seed,
            label=label,
        )
        self.tables = tables
        self._key = counter.mix(torch.tensor(seed))
        generator = torch.Generator().manual_seed(seed)
        exponent = (
            torch.randn(tables, generator=generator, dtype=torch.float64)
            .mul(1.2)
            .add(2.0)
            .clamp(min=1.2)
        )
        token = torch.arange(1, vocabulary_size, dtype=torch.float64)
        self.probabilities = (token ** -exponent[:, None]) / (token ** -exponent[:, None]).sum(
            1, keepdim=True
        )
        self.order_weights = torch.arange(1, len(self.orders) + 1, dtype=torch.float64) ** -1.5
        self._limits, powers = {}, [1]
        for _ in range(self.shortest + self.spread):
            powers.append(
                (powers[-1] * counter.GOLDEN + 2**63) % 2**64 - 2**63
            )  # wrapped as tensors wrap
        self._powers = torch.tensor(powers)

    def documents(self, ids, device="cpu", detail=True):
        """Documents by number, `ids` (documents,), drawn side by side, one token of each at a time."""
        ids = torch.as_tensor(ids, dtype=torch.int64, device=device)
        if device not in self._limits:
            table = counter.thresholds(self.probabilities)
            offset = torch.arange(self.tables)[:, None] << counter.BITS
            self._limits[device] = (
                (table + offset).flatten().to(device),
                counter.thresholds(self.order_weights).to(device),
            )
        limits, order_limits = self._limits[device]
        key = counter.subkey(self._key.to(device), ids)
        length = self.shortest + (
            counter.uniform(counter.subkey(key, 0)) * self.spread >> counter.BITS
        )
        longest = self.shortest + self.spread
        order = torch.tensor(self.orders, device=device)[
            counter.draw(
                order_limits, counter.subkey(key[:, None], 1 + torch.arange(longest, device=device))
            )
        ]
        draws = counter.uniform(
            counter.subkey(key[:, None], 1 + longest + torch.arange(longest, device=device))
        )
        tokens = torch.full((len(ids), longest + 1), -1, device=device)
        prefix = torch.zeros(len(ids), longest + 1, dtype=torch.int64, device=device)
        for t in range(int(length.max())):
            table = self._table(prefix, t, order[:, t])
            found = torch.searchsorted(limits, draws[:, t] + (table << counter.BITS), right=True)
            tokens[:, t] = (found - table * (self.vocabulary_size - 1)).clamp(
                max=self.vocabulary_size - 2
            )
            prefix[:, t + 1] = prefix[:, t] * counter.GOLDEN + tokens[:, t] + 1
        place = torch.arange(longest + 1, device=device)
        tokens = torch.where(
            place < length[:, None], tokens, torch.where(place == length[:, None], self.end, -1)
        )
        return _documents(tokens)

    def _table(self, prefix, t, order):
        """Number of the table that `order` (documents,) last tokens before place t choose.

        A rolling polynomial hash of each prefix (documents, places) gives that of any last tokens in one subtraction.
        """
        context = order.clamp(max=t)
        start = prefix.gather(1, (t - context)[:, None])[:, 0]
        hashed = counter.mix(prefix[:, t] - start * self._powers.to(prefix.device)[context])
        return (hashed >> 1 & 0x3FFFFFFFFFFFFFFF) % self.tables

    def token_losses(self, documents, knows_tables=True):
        """Exact loss of each token of whole documents in nats (tokens,): knowing hash and tables, or their average only.

        The order is hidden, so the first mixes the tables of all orders; both know how document lengths are spread.
        """
        document, place = documents.token["document"], documents.token["position"]
        tokens = torch.zeros(documents.count, int(place.max()) + 1, dtype=torch.int64)
        tokens[document, place] = documents.tokens
        prefix, p = torch.zeros_like(tokens), torch.zeros(tokens.shape, dtype=torch.float64)
        weights, average = self.order_weights / self.order_weights.sum(), self.probabilities.mean(0)
        for t in range(tokens.shape[1]):
            token = tokens[:, t].clamp(max=self.vocabulary_size - 2)
            p[:, t] = average[token]
            if knows_tables:
                tables = [
                    self._table(prefix, t, torch.full_like(token, order)) for order in self.orders
                ]
                p[:, t] = sum(
                    w * self.probabilities[table, token] for w, table in zip(weights, tables)
                )
            ending = 1 / (self.shortest + self.spread - t) if t >= self.shortest else 0.0
            p[:, t] = torch.where(tokens[:, t] == self.end, ending, (1 - ending) * p[:, t])
            if t + 1 < tokens.shape[1]:
                prefix[:, t + 1] = prefix[:, t] * counter.GOLDEN + tokens[:, t] + 1
        return -p[document, place].log()


class Chain(Corpus):
    """An order-n Markov chain with the exact n+1-gram counts of a sample of another corpus, read as a ring.

    Because the sample is a ring, its own contexts are the chain's stationary distribution and no context lacks a
    successor: the chain's loss is the sample's conditional entropy, exactly. A document starts after an end token and
    lasts `sentences` end tokens, as the documents it was estimated from.
    """

    def __init__(self, parent, order=3, sample_tokens=1_000_000, seed=0, name="", label=""):
        if parent.grammar is None:
            raise ValueError(f"parent {parent.name!r}: has no grammar; name a corpus that has one")
        super().__init__(
            name=name or f"{parent.name}-order{order}",
            kind="n-gram",
            vocabulary_size=parent.vocabulary_size,
            end=parent.end,
            mean_document_length=parent.mean_document_length,
            content={"order": order, "sample_tokens": sample_tokens, "parent": parent.digest},
            seed=seed,
            label=label,
        )
        self.order = order
        self.sentences = parent.grammar.file.document.per_document("sentence")
        if self.vocabulary_size ** (order + 1) >= 2**62:
            raise ValueError(
                f"chain of order {order}: {self.vocabulary_size} words to the power {order + 1} do not fit an "
                "integer; use a lower order"
            )
        needed = int(sample_tokens / parent.mean_document_length) + 1
        sample = parent.documents(torch.arange(needed)).tokens
        place = torch.arange(len(sample))
        key = torch.zeros(len(sample), dtype=torch.int64)
        for back in range(order, -1, -1):
            key = key * self.vocabulary_size + sample[(place - back) % len(sample)]
        self.grams = (
            key.sort().values
        )  # every (context, next) of the ring as one number, with its repetitions
        self._key = counter.mix(torch.tensor(seed))
        self._on = {}

    def documents(self, ids, device="cpu", detail=True):
        """Documents by number, `ids` (documents,), drawn side by side, one token of each at a time."""
        ids = torch.as_tensor(ids, dtype=torch.int64, device=device)
        if device not in self._on:
            contexts = self.grams // self.vocabulary_size
            openings = contexts[contexts % self.vocabulary_size == self.end]
            self._on[device] = (self.grams.to(device), openings.to(device))
        grams, openings = self._on[device]
        size, keep = self.vocabulary_size, self.vocabulary_size ** (self.order - 1)
        key = counter.subkey(self._key.to(device), ids)
        context = openings[_scaled(counter.uniform(counter.subkey(key, 0)), len(openings))]
        left = torch.full_like(ids, self.sentences)
        tokens = []
        while bool((left > 0).any()):
            low = torch.searchsorted(grams, context * size)
            high = torch.searchsorted(grams, (context + 1) * size)
            drawn = counter.uniform(counter.subkey(key, 1 + len(tokens)))
            token = grams[low + _scaled(drawn, high - low)] % size
            tokens.append(torch.where(left > 0, token, -1))
            context = context % keep * size + token
            left = left - (token == self.end).long()
        return _documents(torch.stack(tokens, 1))

    def losses(self):
        """Exact loss in nats per token of the best predictor that sees n = 0..order last tokens: a list of order + 1."""
        values = []
        for n in range(self.order + 1):
            grams = self.grams % self.vocabulary_size ** (n + 1)
            counts = grams.unique(return_counts=True)[1].double() / len(grams)
            entropy = -(counts * counts.log()).sum()
            values.append(float(entropy) - sum(values))
        return values


def _documents(tokens):
    """Documents from padded tokens (documents, longest), -1 past the end."""
    kept = tokens >= 0
    document = kept.nonzero()[:, 0]
    return Documents(
        {"tokens": tokens[kept], "document": document, "position": position_within(document)},
        len(tokens),
    )


def _scaled(draw, count):
    """Integers in [0, count) from uniform draws below 2**BITS, without overflow."""
    return ((draw >> (counter.BITS - 31)) * torch.as_tensor(count)) >> 31
