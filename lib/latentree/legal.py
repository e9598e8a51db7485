"""Legal mass: how much of a prediction a sentence grammar allows, in each syntactic state, from the grammar's own sets."""

import numpy as np
import pandas as pd
import torch

from latentree.grammar import END, Grammar
from latentree.parsing import PrefixParser


def syntactic_states(grammar: Grammar, tokens: torch.Tensor) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """The state after each of tokens (sequence, position), which begin with a sentence: all roles of the sentence so far.

    Returns each token's state (sequence, position), the states' names ("subject verb", "" before a sentence), and the
    tokens that the grammar allows after each (state, vocabulary), bool. A shared token has all its roles ("noun/verb").
    """
    parser = PrefixParser(grammar)
    symbols = [s[0][0] if len(s) == 1 else s for s in parser.prefix_of(list(range(grammar.vocabulary_size)))]
    prefixes, following, rows = [()], {}, []
    for row in tokens.tolist():
        state, states = 0, []
        for token in row:
            step = (state, symbols[token])
            if token != grammar.end and step not in following:
                following[step] = len(prefixes)
                prefixes.append((*prefixes[state], symbols[token]))
            state = 0 if token == grammar.end else following[step]
            states.append(state)
        rows.append(states)
    legal = torch.zeros(len(prefixes), grammar.vocabulary_size, dtype=torch.bool)
    for number, prefix in enumerate(prefixes):
        for p, words in zip(parser.next_roles(prefix), grammar.words):
            if p > 0:
                legal[number, words] = True
    names = [" ".join(s if isinstance(s, str) else "/".join(role for role, _ in s) for s in prefix) for prefix in prefixes]
    return torch.tensor(rows), names, legal


def legal_mass(log_p: torch.Tensor, state: torch.Tensor, legal: torch.Tensor) -> torch.Tensor:
    """Probability of the legal next tokens (sequence, position), from log probabilities (sequence, position, vocabulary)."""
    return (log_p.exp() * legal[state]).sum(-1)


def role_mass(grammar: Grammar, log_p: torch.Tensor, tokens: torch.Tensor, before: str, role: str) -> torch.Tensor:
    """Probability of the words of `role`, (sequence, position), NaN but after the words of `before`: the released curves."""
    mass = log_p[..., grammar.words[grammar.roles.index(role)]].exp().sum(-1)
    there = torch.isin(tokens, torch.as_tensor(grammar.words[grammar.roles.index(before)]))
    return mass.masked_fill(~there, torch.nan)


def followers(grammar: Grammar) -> pd.DataFrame:
    """P(next role, a column | role, a row but the end), exact, for recursive grammars too: what `role_mass` comes to.

    Neighbours meet in a production: the last role of what one symbol yields, and the first of the next one's.
    """
    count, number = len(grammar.nonterminals), {role: i for i, role in enumerate(grammar.roles)}
    unit = np.eye(count + len(number))  # nonterminals, then roles

    def yields(side):
        """P(role at one side of what a symbol yields), (symbol, role), corners summed in closed form."""
        corner = np.zeros_like(unit)
        for left, right, p in grammar.productions:
            symbol = right[side]
            corner[left, count + number[symbol] if isinstance(symbol, str) else symbol] += p
        return np.linalg.inv(unit - corner)[:, count:]

    first, last = yields(0), yields(-1)
    pairs = np.outer(last[0], unit[count + number[END], count:])
    for left, right, p in grammar.productions:
        symbols = [count + number[s] if isinstance(s, str) else s for s in right]
        for a, b in zip(symbols, symbols[1:]):
            pairs += grammar.visits[left] * p * np.outer(last[a], first[b])
    table = pd.DataFrame(pairs, grammar.roles, grammar.roles).drop(index=END)
    return table.div(table.sum(axis=1), axis=0)
