"""Legal mass: how much of a prediction a sentence grammar allows, in each syntactic state."""

import numpy as np
import pandas as pd
import torch

from latentree.data.grammar import END, Grammar
from latentree.evidence.curves import sequence_sums
from latentree.exact.parser import PrefixParser
from latentree.train.model import log_probabilities


def next_roles(grammar: Grammar, tokens: torch.Tensor) -> tuple[torch.Tensor, list, torch.Tensor]:
    """What the grammar allows after each of tokens (sequence, position); windows begin a sentence.

    A state is all roles of the sentence so far. Returns each place's state (sequence, position), a
    number; the states' names, the last role and those that may follow ("end > subject|verb"), so
    that several have the same; and the tokens allowed after each (state, vocabulary), bool.
    """
    numbers, rows = {(): 0}, []
    for row in tokens.tolist():
        prefix, states = (), []
        for token in row:
            role = grammar.roles[grammar.role_of[token]]
            prefix = () if token == grammar.end else (*prefix, role)
            states.append(numbers.setdefault(prefix, len(numbers)))
        rows.append(states)
    parser, names = PrefixParser(grammar), []
    legal = torch.zeros(len(numbers), grammar.vocabulary_size, dtype=torch.bool)
    for prefix, number in numbers.items():
        following = []
        for role, words, chance in zip(grammar.roles, grammar.words, parser.next_roles(prefix)):
            if chance > 0:
                legal[number, words] = True
                following.append(role)
        last = prefix[-1] if prefix else END
        names.append(f"{last} > {'|'.join(following)}")
    return torch.tensor(rows), names, legal


def legal_mass(log_p: torch.Tensor, state: torch.Tensor, legal: torch.Tensor) -> torch.Tensor:
    """Probability of the legal next tokens (sequence, position); log_p has the vocabulary last."""
    return (log_p.exp() * legal[state]).sum(-1)


def masses(model, grammar: Grammar, tokens: torch.Tensor, states: tuple) -> pd.DataFrame:
    """What a model gives to roles after tokens: DataFrame (quantity, name, sequence, sum, count).

    quantity "legal": `legal_mass` by the names of `states` (`next_roles` of the tokens), and of all
    places ("all"). quantity "role", the released curves: the probability of one role's words after
    another's, for pairs that can follow each other ("subject > verb").
    """
    log_p, (state, names, legal) = log_probabilities(model, tokens), states
    mass = legal_mass(log_p, state, legal)
    legal = pd.concat([sequence_sums(mass, state, names), sequence_sums(mass).assign(name="all")])
    found, words = [legal.assign(quantity="legal")], dict(zip(grammar.roles, grammar.words))
    pairs = followers(grammar).stack()
    for before, role in pairs[pairs > 0].index:
        after = torch.isin(tokens, torch.as_tensor(words[before]))
        mass = log_p[..., words[role]].exp().sum(-1).masked_fill(~after, torch.nan)
        found.append(sequence_sums(mass).assign(name=f"{before} > {role}", quantity="role"))
    return pd.concat(found, ignore_index=True)[["quantity", "name", "sequence", "sum", "count"]]


def followers(grammar: Grammar) -> pd.DataFrame:
    """P(next role, a column | role, a row but the end), exact, for recursive grammars too.

    Neighbours meet in a production: the last role of one symbol and the first of the next.
    """
    roles, symbols = len(grammar.roles), len(grammar.nonterminals)
    number = {role: symbols + i for i, role in enumerate(grammar.roles)}  # after the nonterminals
    number |= {symbol: symbol for symbol in range(symbols)}
    unit = np.eye(symbols + roles)
    first, last = np.zeros_like(unit), np.zeros_like(unit)
    for left, right, chance in grammar.productions:
        first[left, number[right[0]]] += chance
        last[left, number[right[-1]]] += chance
    # P(role | symbol), chains summed in closed form
    first, last = (np.linalg.inv(unit - chains)[:, symbols:] for chains in (first, last))
    pairs = np.outer(last[0], unit[number[END], symbols:])
    for left, right, chance in grammar.productions:
        for one, other in zip(right, right[1:]):
            meets = np.outer(last[number[one]], first[number[other]])
            pairs += grammar.visits[left] * chance * meets
    table = pd.DataFrame(pairs, grammar.roles, grammar.roles).drop(index=END)
    return table.div(table.sum(axis=1), axis=0)
