"""What models are run on to look for induction, and where their heads should then attend.

A match of order n is an earlier position j whose last n tokens are the query's own; it is exclusive when the n + 1 last
ones are not (Olsson et al. 2022; by order: Akyurek et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from latentree.data.corpus import held_out

LONGEST = 10  # orders of matches that are told apart
BOUND = "induction before a bound word"
RELEASED = "duplicate-token, as released"


def stimuli(
    process, sequences: int, context: int, seed: int = 0, grammar=None
) -> dict[str, Stimulus]:
    """Three kinds of `sequences` sequences of `context` tokens.

    - natural: held-out documents, as many as fill the context.
    - legal repeat: the first half of a natural one, twice.
    - random repeat: a row of tokens drawn uniformly from the vocabulary with `seed`, twice; no token marks its beginning.

    `grammar` tells which words call for the next one (`bound_queries`): the process's own, if it has one, else none; give
    a control without a grammar that of the corpus it is compared with.
    ValueError for an odd context, or less than 2 sequences of 4 tokens.
    """
    if context % 2 or context < 4 or sequences < 2:
        raise ValueError(
            f"context = {context}, sequences = {sequences}: cannot be halved; give an even context from 4 up "
            "and 2 sequences or more"
        )
    half = context // 2
    natural = held_out(process, sequences, context)
    bound = bound_queries(grammar or getattr(process, "grammar", None), natural)
    inside = (
        torch.arange(half) < half - 1
    )  # what follows the last token of a copy is not what followed it there
    repeated = None if bound is None else (bound[:, :half] & inside).repeat(1, 2)
    drawn = torch.randint(
        process.vocabulary_size, (sequences, half), generator=torch.Generator().manual_seed(seed)
    )
    return {
        "natural": Stimulus(natural["tokens"], natural["document"], bound=bound),
        "legal repeat": Stimulus(
            natural["tokens"][:, :half].repeat(1, 2), period=half, bound=repeated
        ),
        "random repeat": Stimulus(drawn.repeat(1, 2), period=half),
    }


def bound_queries(grammar, fields) -> torch.Tensor | None:
    """Queries (sequence, position) followed by a word whose role the grammar binds to theirs; None if it binds none.

    There the last occurrence of the query's word tells what comes next; elsewhere it may tell nothing. `fields` are
    `corpus.held_out`'s; without the field role, the role is the first that has the token.
    """
    habits = grammar.file.habits if grammar else {}
    if not habits:
        return None
    roles, role = list(grammar.roles), fields.get("role")
    if role is None:
        role_of = torch.full((grammar.vocabulary_size,), -1)
        for number in reversed(range(len(roles))):
            role_of[torch.as_tensor(grammar.words[number])] = number
        role = role_of[fields["tokens"]]
    bound = torch.zeros_like(role, dtype=torch.bool)
    for child, parent in habits.items():
        bound[:, :-1] |= (role[:, :-1] == roles.index(parent)) & (role[:, 1:] == roles.index(child))
    return bound


def match_orders(tokens, document=None, longest: int = LONGEST):
    """All matches in tokens (sequence, position): sequence, query, key j < query, and exclusive order, (matches,) each.

    A match does not reach across the boundaries of `document`. Orders above `longest` are given as longest + 1.
    """
    document = torch.zeros_like(tokens) if document is None else document
    found = []
    for first, (x, d) in enumerate(zip(tokens.split(16), document.split(16), strict=True)):
        same = (x[:, :, None] == x[:, None]) & (d[:, :, None] == d[:, None])
        sequence, query, key = same.tril(-1).nonzero().T
        found.append(torch.stack([sequence + 16 * first, query, key]))
    sequence, query, key = torch.cat(found, 1)
    order, longer = torch.ones_like(key), torch.arange(len(key), device=key.device)
    for back in range(1, longest + 1):
        longer = longer[key[longer] >= back]  # the matches that may be longer than `back`
        s, q, j = sequence[longer], query[longer] - back, key[longer] - back
        same = (tokens[s, q] == tokens[s, j]) & (document[s, q] == document[s, j])
        longer = longer[same & (document[s, j] == document[s, j + back])]
        order[longer] += 1
    return sequence, query, key, order


def find_targets(stimulus: Stimulus) -> Targets:
    """The targets of each score (a score without an order has order 0).

    - induction: what followed the matches of exclusive order 1 to LONGEST; of any order, however long, as order 0.
    - induction before a bound word: the same, for the queries that `bound` marks.
    - duplicate-token: the matches themselves, of any order.
    - previous-token: the token before the query.
    - in a repeat, what the release calls induction of order k: the same token one period earlier, for the queries of
      the repeat but the first k.
    """
    tokens = stimulus.tokens
    sequence, query, key, order = match_orders(tokens, stimulus.document)
    named = {
        ("induction", n): (sequence[order == n], query[order == n], key[order == n] + 1)
        for n in range(1, LONGEST + 1)
    }
    if stimulus.bound is not None:
        here = stimulus.bound[sequence, query]
        for n in range(LONGEST + 1):
            chosen = here & (order == n) if n else here
            named[BOUND, n] = sequence[chosen], query[chosen], key[chosen] + 1
    named |= {
        ("induction", 0): (sequence, query, key + 1),
        ("duplicate-token", 0): (sequence, query, key),
    }
    s, q = torch.ones_like(tokens[:, 1:]).nonzero().T
    named["previous-token", 0] = s, q + 1, q
    for k in range(1, min(LONGEST + 1, stimulus.period or 0)):
        s, q = torch.ones_like(tokens[:, stimulus.period + k :]).nonzero().T
        named[RELEASED, k] = s, q + stimulus.period + k, q + k
    queries = tokens.new_zeros(len(tokens), len(named))
    for i, (s, q, _) in enumerate(named.values()):
        queries[:, i] = torch.zeros_like(tokens).index_put((s, q), torch.ones_like(s)).sum(1)
    score = torch.arange(len(named)).repeat_interleave(
        torch.tensor([len(s) for s, _, _ in named.values()])
    )
    columns = (torch.cat(column) for column in zip(*named.values(), strict=True))
    return Targets(list(named), *columns, score.to(tokens.device), queries)


def matched(stimulus: Stimulus) -> torch.Tensor:
    """Whether each query (sequence, position) has a match of any order: its token came before, in the same document."""
    sequence, query, *_ = match_orders(stimulus.tokens, stimulus.document, longest=1)
    found = torch.zeros_like(stimulus.tokens, dtype=torch.bool)
    found[sequence, query] = True
    return found


@dataclass
class Targets:
    """Where scores look: attention from `query` to `key` of `sequence` (entries,) counts for score number `score`.

    `names` [(score, order), ...]; `queries` (sequence, score): how many queries of a sequence have a target.
    """

    names: list
    sequence: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    score: torch.Tensor
    queries: torch.Tensor

    def of_sequences(self, first: int, count: int):
        """The targets in `count` sequences from number `first` on, which are then numbered from 0."""
        here = (self.sequence >= first) & (self.sequence < first + count)
        entries = {
            "sequence": self.sequence[here] - first,
            "query": self.query[here],
            "key": self.key[here],
            "score": self.score[here],
        }
        return replace(self, **entries, queries=self.queries[first : first + count])

    def of_another_sequence(self):
        """The same targets, each sequence looked at where another one has its own: what positions alone would give."""
        return replace(
            self, sequence=(self.sequence + 1) % len(self.queries), queries=self.queries.roll(1, 0)
        )


@dataclass
class Stimulus:
    """Tokens (sequence, position) to run a model on.

    `document` (sequence, position) numbers the documents, if matches count within one only; `period` is the length in
    tokens of what is repeated, if something is; `bound` (sequence, position) marks the queries whose own word calls for
    the next one, if some do.
    """

    tokens: torch.Tensor
    document: torch.Tensor | None = None
    period: int | None = None
    bound: torch.Tensor | None = None

    @cached_property
    def targets(self) -> Targets:
        """The targets of all scores in these tokens."""
        return find_targets(self)
