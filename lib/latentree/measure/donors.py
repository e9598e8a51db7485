"""Where direct effects are scored, and whose contributions take a component's place there.

Each sequence is scored at one position. What replaces a contribution comes from another document,
at a position of the same syntactic state: what the document says is lost, and the syntax is not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from latentree.data.corpus import held_out
from latentree.measure.stimuli import bound_queries


def stimulus(corpus, sequences, context, seed=0, grammar=None, where=None) -> Stimulus:
    """Held-out windows of `context` tokens, each scored at a position drawn from its second half.

    The next token is of the same document. `where` (sequence, position), booleans over the windows
    that held_out gives, allows fewer positions. `grammar` reads syntactic states, the corpus's own
    if it has one. A state includes the word that stands there (and without a grammar nothing else):
    a donor differs only in what came before. Windows without an allowed position or a donor are
    left out. ValueError if less than 2 are left.
    """
    fields = held_out(corpus, sequences, context)
    tokens, document = fields["tokens"], fields["document"]
    allowed = document == document.roll(-1, 1)
    allowed[:, : context // 2] = allowed[:, -1:] = False
    if where is not None:
        allowed &= where
    drawn = torch.rand(allowed.shape, generator=torch.Generator().manual_seed(seed))
    at = drawn.masked_fill(~allowed, -1).argmax(1)
    target = tokens[torch.arange(sequences), at + 1]
    grammar = grammar or corpus.grammar
    state, peers = _syntactic_states(grammar, fields) * corpus.vocabulary_size + tokens, None
    if grammar is not None:
        role = torch.as_tensor(grammar.role_of)
        peers = role == role[target][:, None]
    return Stimulus(tokens, at, target, state, seed, peers).of(allowed.any(1))


def at_answers(corpus, sequences, context, seed=0, grammar=None) -> Stimulus:
    """A stimulus (see there) scored before words that a document's latents decide.

    These are words that another one calls for; without binding, words of a role that has several.
    On text without a tree a logit's `peers` are the words that may follow the scored one.
    """
    grammar, where = grammar or corpus.grammar, None
    tokens = held_out(corpus, sequences, context)["tokens"]
    if corpus.kind == "treeless":
        where = tokens < corpus.callers
    elif grammar is not None:
        several = torch.as_tensor(grammar.sizes > 1)[torch.as_tensor(grammar.role_of)[tokens]]
        where = bound_queries(grammar, tokens)
        where = several.roll(-1, 1) if where is None else where
    shown = stimulus(corpus, sequences, context, seed, grammar, where)
    if corpus.kind != "treeless":
        return shown
    before = shown.tokens[torch.arange(len(shown.at)), shown.at]
    peers = torch.zeros(len(before), corpus.vocabulary_size, dtype=torch.bool)
    return replace(shown, peers=peers.scatter(1, corpus.choices[before], True))


def _syntactic_states(grammar, fields) -> torch.Tensor:
    """A number (sequence, position) for the roles of the sentence so far; 0 without a grammar."""
    tokens, document = fields["tokens"], fields["document"]
    if grammar is None:
        return torch.zeros_like(tokens)
    role = torch.as_tensor(grammar.role_of)[tokens]
    begins = torch.ones_like(tokens, dtype=torch.bool)  # of a sentence
    begins[:, 1:] = (tokens[:, :-1] == grammar.end) | (document[:, 1:] != document[:, :-1])
    numbers, states, state = {}, [], None
    for word, first in zip(role.flatten().tolist(), begins.flatten().tolist(), strict=True):
        state = numbers.setdefault((None if first else state, word), len(numbers))
        states.append(state)
    return torch.tensor(states).view_as(tokens)


def _draw_donors(state, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each place of state (sequence, position) one of the same state in another sequence.

    It is drawn uniformly: its numbers (sequence, position). A place without any is its own donor.
    """
    sequences, length = state.shape
    sequence, state = torch.arange(sequences).repeat_interleave(length), state.flatten()
    # In this order all that share a state stand side by side, and in it those of one sequence.
    order = state.argsort(stable=True)
    of_state, of_sequence = state[order], (state * sequences + sequence)[order]
    low, start = (torch.searchsorted(key, key) for key in (of_state, of_sequence))
    high, stop = (torch.searchsorted(key, key, right=True) for key in (of_state, of_sequence))
    own = stop - start
    others = high - low - own
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(len(order), dtype=torch.float64, generator=generator)
    drawn = low + (share * others).long()
    drawn = drawn + (drawn >= start) * own  # past those of the own sequence
    donor = torch.empty_like(order)
    donor[order] = order[torch.where(others > 0, drawn, torch.arange(len(order)))]
    return (donor // length).view(sequences, length), (donor % length).view(sequences, length)


@dataclass
class Stimulus:
    """Sequences that are scored at one position each; no document stands in two of them.

    `tokens` (sequence, position); `at` (sequence,), the scored positions; `target` (sequence,), the
    tokens whose logits are scored, the true next ones unless others are given; `state` (sequence,
    position): positions of equal number may be each other's donors; `seed` of all draws; `peers`
    (sequence, vocabulary) marks the words of the target's role.
    """

    tokens: torch.Tensor
    at: torch.Tensor
    target: torch.Tensor
    state: torch.Tensor
    seed: int = 0
    peers: torch.Tensor | None = None

    def of(self, kept) -> Stimulus:
        """Only the sequences that `kept` (sequence,) says and that keep a donor; 2 or more."""
        if kept.sum() < 2:
            left = f"{int(kept.sum())} of {len(kept)} sequences a position with a donor"
            mend = "allow more positions or states, or give more sequences, for 2 or more"
            raise ValueError(f"where: leaves {left}; {mend}")
        fields = (self.tokens, self.at, self.target, self.state)
        peers = None if self.peers is None else self.peers[kept]
        shown = Stimulus(*(field[kept] for field in fields), self.seed, peers)
        row = torch.arange(len(shown.at))
        paired = shown.same_state[0][row, shown.at] != row
        return shown if paired.all() else shown.of(paired)

    @cached_property
    def same_state(self):
        """For each position one of its state in another sequence: numbers (sequence, position)."""
        return _draw_donors(self.state, self.seed)
