"""Legal mass: how much of a prediction a sentence grammar allows, in each syntactic state, from the grammar's own sets."""

import numpy as np
import pandas as pd
import torch

from latentree.data.grammar import END, Grammar
from latentree.evidence.curves import sequence_sums
from latentree.exact.parser import PrefixParser
from latentree.train.model import log_probabilities


def next_roles(
    grammar: Grammar, tokens: torch.Tensor
) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """What the grammar allows after each of tokens (sequence, position), which begin with a sentence.

    Returns the number of each place's state (sequence, position), all roles of the sentence so far; the states' names,
    the last role and those that may follow ("subject > verb", "end > subject|verb" where a sentence begins), so that
    several have the same; and the tokens allowed after each (state, vocabulary), bool. A shared token has all its roles
    ("noun/verb").
    """
    parser = PrefixParser(grammar)
    symbols = [
        s[0][0] if len(s) == 1 else s
        for s in parser.prefix_of(list(range(grammar.vocabulary_size)))
    ]
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
    legal, names = torch.zeros(len(prefixes), grammar.vocabulary_size, dtype=torch.bool), []
    for number, prefix in enumerate(prefixes):
        allowed = [r for r, p in enumerate(parser.next_roles(prefix)) if p > 0]
        for r in allowed:
            legal[number, grammar.words[r]] = True
        last = prefix[-1] if prefix else END
        last = last if isinstance(last, str) else "/".join(role for role, _ in last)
        names.append(f"{last} > {'|'.join(grammar.roles[r] for r in allowed)}")
    return torch.tensor(rows), names, legal


def legal_mass(log_p: torch.Tensor, state: torch.Tensor, legal: torch.Tensor) -> torch.Tensor:
    """Probability of the legal next tokens (sequence, position), from log probabilities (sequence, position, vocabulary)."""
    return (log_p.exp() * legal[state]).sum(-1)


def role_mass(
    grammar: Grammar, log_p: torch.Tensor, tokens: torch.Tensor, before: str, role: str
) -> torch.Tensor:
    """Probability of the words of `role`, (sequence, position), NaN but after the words of `before`: the released curves."""
    mass = log_p[..., grammar.words[grammar.roles.index(role)]].exp().sum(-1)
    there = torch.isin(tokens, torch.as_tensor(grammar.words[grammar.roles.index(before)]))
    return mass.masked_fill(~there, torch.nan)


def masses(
    model, grammar: Grammar, tokens: torch.Tensor, after: tuple | None = None
) -> pd.DataFrame:
    """What a model thinks of the roles after tokens (sequence, position): DataFrame (quantity, name, sequence, sum, count).

    quantity "legal": `legal_mass` by the names of `next_roles`, and of all places ("all"). quantity "role": `role_mass` of
    each pair of roles that can follow each other ("subject > verb"). `after` is `next_roles` of the tokens, if it is known.
    """
    log_p, (state, names, legal) = (
        log_probabilities(model, tokens),
        after or next_roles(grammar, tokens),
    )
    mass, pairs = legal_mass(log_p, state, legal), followers(grammar)
    found = [sequence_sums(mass, state, names), sequence_sums(mass).assign(name="all")]
    found = [rows.assign(quantity="legal") for rows in found]
    for a, b in ((a, b) for a in pairs.index for b in pairs.columns if pairs[b][a] > 0):
        found.append(
            sequence_sums(role_mass(grammar, log_p, tokens, a, b)).assign(
                name=f"{a} > {b}", quantity="role"
            )
        )
    return pd.concat(found, ignore_index=True)[["quantity", "name", "sequence", "sum", "count"]]


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
