"""What models are run on to look for induction, and where their heads should then attend.

A match of order n is an earlier position j whose last n tokens are the query's own; it is
exclusive when the n + 1 last ones are not (Olsson et al. 2022; by order: Akyurek et al. 2024).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import pad

from latentree.data.corpus import held_out

LONGEST = 10  # orders of matches that are told apart
RELEASED = "duplicate-token, as released"


@dataclass
class Targets:
    """Where scores look.

    - names: [(score, order), ...]; order 0 for a score that has none, or for all orders together.
    - entries (4, entries): the numbers of a sequence, a query, a key and the score that counts
      attention there.
    - queries (sequence, score): how many queries of a sequence have a target.
    """

    names: list
    entries: torch.Tensor
    queries: torch.Tensor

    def of_sequences(self, first: int, count: int) -> "Targets":
        """The targets in `count` sequences from number `first` on, then numbered from 0."""
        sequence = self.entries[0]
        entries = self.entries[:, (sequence >= first) & (sequence < first + count)]
        entries[0] -= first
        return Targets(self.names, entries, self.queries[first : first + count])

    def of_another_sequence(self) -> "Targets":
        """The targets of the sequence before, in each: what positions alone would give."""
        entries = self.entries.clone()
        entries[0] = (entries[0] + 1) % len(self.queries)
        return Targets(self.names, entries, self.queries.roll(1, 0))


@dataclass
class Stimulus:
    """Tokens (sequence, position) to run a model on.

    `document` (sequence, position) numbers the documents, if matches count within one only;
    `period` is the length in tokens of what is repeated, if something is.
    """

    tokens: torch.Tensor
    document: torch.Tensor | None = None
    period: int | None = None

    @cached_property
    def orders(self) -> torch.Tensor:
        """The exclusive order of every match (sequence, query, key): 0 is none, 11 more than 10."""
        match = self.tokens[:, :, None] == self.tokens[:, None]
        if self.document is not None:
            match &= self.document[:, :, None] == self.document[:, None]
        match = match.tril(-1)  # a key before the query
        order, longer = torch.zeros_like(match, dtype=torch.uint8), match
        for _ in range(LONGEST + 1):
            order += longer
            longer = match & pad(longer[:, :-1, :-1], (1, 0, 1, 0))  # it goes on one token back
        return order

    @cached_property
    def targets(self) -> Targets:
        """The targets of each score.

        - induction: what followed the matches of exclusive order 1 to LONGEST; order 0: of any.
        - duplicate-token: the matches themselves, of any order.
        - previous-token: the token before the query.
        - in a repeat, what the release calls induction of order k: the same token one period
          earlier, for the queries of the repeat but the first k.
        """
        names, entries, queries = [], [], []

        def add(score, order, goals):
            where = goals.nonzero().T
            entries.append(torch.cat([where, torch.full_like(where[:1], len(names))]))
            queries.append(goals.any(2).sum(1))
            names.append((score, order))

        followed = self.orders.roll(1, 2)  # the last key has no match, so nothing comes round
        for n in range(LONGEST + 1):
            add("induction", n, followed == n if n else followed > 0)
        add("duplicate-token", 0, self.orders > 0)
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        back = (place[:, None] - place).expand_as(self.orders)
        add("previous-token", 0, back == 1)
        for k in range(1, min(LONGEST + 1, self.period or 0)):
            add(RELEASED, k, (back == self.period) & (place[:, None] >= self.period + k))
        return Targets(names, torch.cat(entries, 1), torch.stack(queries, 1))


def stimuli(corpus, sequences: int, context: int, seed: int = 0) -> dict[str, Stimulus]:
    """Kinds of `sequences` sequences of `context` tokens, by name.

    - natural: held-out documents, as many as fill the context.
    - legal repeat: the first half of a natural one, twice.
    - skeleton repeat, with a grammar: that half's roles, words drawn uniformly from each, twice.
    - random repeat: a row of tokens drawn uniformly from the vocabulary, twice.

    Words are drawn with `seed`. ValueError for an odd context, or for less than 2 rows of 4 tokens.
    """
    if context % 2 or context < 4 or sequences < 2:
        sizes = f"context = {context}, sequences = {sequences}"
        mend = "give an even context from 4 up and 2 sequences or more"
        raise ValueError(f"{sizes}: cannot be halved; {mend}")
    half, natural = context // 2, held_out(corpus, sequences, context)
    tokens = natural["tokens"]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(corpus.vocabulary_size, (sequences, half), generator=generator)
    repeated = {"legal repeat": tokens[:, :half], "random repeat": drawn}
    if corpus.grammar:
        role = natural["role"][:, :half]
        begins = torch.tensor([words[0] for words in corpus.grammar.words])[role]
        sizes = torch.as_tensor(corpus.grammar.sizes)[role]
        share = torch.rand(role.shape, generator=generator, dtype=torch.float64)
        repeated["skeleton repeat"] = begins + (share * sizes).long()
    twice = {name: Stimulus(once.repeat(1, 2), period=half) for name, once in repeated.items()}
    return {"natural": Stimulus(tokens, natural["document"])} | twice


def bound_queries(grammar, tokens) -> torch.Tensor | None:
    """Queries (sequence, position) before a word that is bound to theirs; None if none can be.

    There the last occurrence of the query's word tells what comes next; elsewhere perhaps nothing.
    """
    if grammar is None or not grammar.file.habits:
        return None
    role, number = torch.as_tensor(grammar.role_of)[tokens], list(grammar.roles).index
    bound = torch.zeros_like(tokens, dtype=torch.bool)
    for child, parent in grammar.file.habits.items():
        bound[:, :-1] |= (role[:, :-1] == number(parent)) & (role[:, 1:] == number(child))
    return bound
