"""Where direct effects are scored, and which other documents' contributions take a component's place there.

Each sequence is scored at one position. What replaces a contribution there comes from another document, at a position of
the same syntactic state, so that only what the document says is lost, and the syntax is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from latentree.data.corpus import held_out


def stimulus(
    process, sequences, context, seed=0, grammar=None, where=None, same_word=True
) -> Stimulus:
    """Held-out windows of `context` tokens, each scored at a position drawn from its second half with `seed`.

    The next token is of the same document. `where` (sequence, position), booleans over the windows that
    corpus.held_out(process, sequences, context) gives, allows fewer positions; windows without one are left out.
    `grammar` reads syntactic states: the process's own if it has one; without any, all positions are in one state. With
    `same_word` a state includes the word that stands there, so that a donor differs only in what came before. Windows whose
    scored position has no donor are left out.
    ValueError if `where` has another shape, the vocabularies differ, or less than 2 windows can be scored.
    """
    fields = held_out(process, sequences, context)
    tokens, document = fields["tokens"], fields["document"]
    allowed = torch.zeros_like(tokens, dtype=torch.bool)
    allowed[:, context // 2 : -1] = (document[:, 1:] == document[:, :-1])[:, context // 2 :]
    if where is not None:
        if where.shape != allowed.shape:
            shapes = f"{tuple(where.shape)}, and the tokens {tuple(allowed.shape)}"
            raise ValueError(f"where: has shape {shapes}; give one boolean for each token")
        allowed &= where
    kept = allowed.any(1)
    drawn = torch.rand(allowed.shape, generator=torch.Generator().manual_seed(seed))
    at = drawn.masked_fill(~allowed, -1).argmax(1)
    target = tokens[torch.arange(sequences), at + 1]
    grammar = grammar or getattr(process, "grammar", None)
    state, peers = syntactic_states(grammar, fields), None
    if grammar is not None:
        role = torch.as_tensor(grammar.role_of)
        peers = role == role[target][:, None]
    if same_word:
        state = state * process.vocabulary_size + tokens
    source = document  # the same document would give back what is removed
    return Stimulus(tokens, at, target, state, source, seed, peers).of(kept)


def syntactic_states(grammar, fields) -> torch.Tensor:
    """A number (sequence, position) for the roles of the sentence so far; 0 without a grammar.

    `fields` are corpus.held_out's; without the field role, grammar.role_of reads roles from the tokens. An end token
    closes a sentence, and so does the end of a document. ValueError for a grammar with another vocabulary.
    """
    tokens, document = fields["tokens"], fields["document"]
    if grammar is None:
        return torch.zeros_like(tokens)
    if int(tokens.max()) >= grammar.vocabulary_size:
        raise ValueError(
            f"grammar {grammar.name}: has {grammar.vocabulary_size} tokens, and token {int(tokens.max())} "
            "occurs; give a grammar with the same vocabulary"
        )
    role = fields["role"] if "role" in fields else torch.as_tensor(grammar.role_of)[tokens]
    begins = torch.ones_like(tokens, dtype=torch.bool)
    begins[:, 1:] = (tokens[:, :-1] == grammar.end) | (document[:, 1:] != document[:, :-1])
    numbers, states, state = {}, [], None
    for word, first in zip(role.flatten().tolist(), begins.flatten().tolist(), strict=True):
        state = numbers.setdefault((None if first else state, word), len(numbers))
        states.append(state)
    return torch.tensor(states).view_as(tokens)


def draw_donors(state, source, seed: int):
    """For each position another one of the same state: its sequence and position, (sequence, position) each.

    It is drawn uniformly from the positions of other sequences whose `source` differs; a position without any is its own
    donor. `state` and `source` are (sequence, position), and sources ascend along the sequences.
    """
    sequences, length = state.shape
    sequence = torch.arange(sequences).repeat_interleave(length)
    state, source = state.flatten(), source.flatten()
    order = state.argsort(
        stable=True
    )  # all that share a state, and in it a sequence or a source, stand side by side

    def span(label):
        key = (state * (int(label.max()) + 1) + label)[order]
        return torch.searchsorted(key, key), torch.searchsorted(key, key, right=True)

    (low, high), *own = span(torch.zeros_like(state)), span(sequence), span(source)
    start, stop = torch.minimum(own[0][0], own[1][0]), torch.maximum(own[0][1], own[1][1])
    others = high - low - (stop - start)
    share = torch.rand(
        len(order), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    drawn = low + (share * others).long()
    drawn = (drawn + (drawn >= start) * (stop - start)).clamp(max=len(order) - 1)
    donor = torch.empty_like(order)
    donor[order] = torch.where(others > 0, order[drawn], order)
    return (donor // length).view(sequences, length), (donor % length).view(sequences, length)


@dataclass
class Stimulus:
    """Sequences that are scored at one position each.

    `tokens` (sequence, position); `at` (sequence,), the scored positions; `target` (sequence,), the tokens whose logits are
    scored, the true next ones unless others are given; `state` and `source` (sequence, position) say which positions may
    be donors (`draw_donors`); `seed` of all draws; `peers` (sequence, vocabulary) marks the words of the target's role.
    """

    tokens: torch.Tensor
    at: torch.Tensor
    target: torch.Tensor
    state: torch.Tensor
    source: torch.Tensor
    seed: int = 0
    peers: torch.Tensor | None = None

    def of(self, kept) -> Stimulus:
        """Only the sequences that `kept` (sequence,) says, less those whose scored position then has no donor.

        ValueError if less than 2 are left.
        """
        if kept.sum() < 2:
            raise ValueError(
                f"where: leaves {int(kept.sum())} of {len(kept)} sequences a position with a donor; allow more "
                "positions or states, or give more sequences, for 2 or more"
            )
        peers = None if self.peers is None else self.peers[kept]
        fields = (
            field[kept] for field in (self.tokens, self.at, self.target, self.state, self.source)
        )
        shown, row = Stimulus(*fields, self.seed, peers), torch.arange(int(kept.sum()))
        paired = shown.same_state[0][row, shown.at] != row
        return shown if paired.all() else shown.of(paired)

    @cached_property
    def same_state(self):
        """Donors of the same syntactic state."""
        return draw_donors(self.state, self.source, self.seed)

    @cached_property
    def any_state(self):
        """Donors of any state."""
        return draw_donors(torch.zeros_like(self.state), self.source, self.seed)
