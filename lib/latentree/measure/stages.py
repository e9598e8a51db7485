"""What a model follows of the latents of nested levels: the words that they call for.

Where latents are redrawn in part at a second level (a section below a document, say), a word's
habit there may call for another word than the document does. How much of a role's probability the
called word gets, at places where both levels agree and where they do not, tells the levels apart.
"""

from dataclasses import replace

import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence

from latentree.data.corpus import HELD_OUT, held_out
from latentree.data.grammar import Grammar
from latentree.data.grammar_file import LEVELS
from latentree.data.sampler import GrammarProcess
from latentree.evidence.curves import sequence_sums
from latentree.train.model import log_probabilities


def windows_with_calls(process: GrammarProcess, sequences: int, context: int) -> dict:
    """Held-out windows with the fields called and called_above (sequence, position).

    They are the token that an earlier word calls for, by all latents and by those of the highest
    level that redraws some; -1 for none. ValueError if recursive, or if nothing is redrawn.
    """
    grammar = process.grammar
    if grammar.shapes is None or not _redrawn(grammar):
        what = f"recursive, or redraws nothing {grammar.file.redraw}"
        mend = "so that levels cannot be told apart; choose another grammar"
        raise ValueError(f"{process.name}: {what}, {mend}")

    def annotate(documents):
        above = _of_highest_level(process, documents)
        return {"called": _called(grammar, documents), "called_above": _called(grammar, above)}

    return held_out(process, sequences, context, annotate=annotate)


def followed(model, grammar: Grammar, rows: dict) -> pd.DataFrame:
    """How far a model follows each level in `rows`: DataFrame (name, sequence, sum, count).

    Named by the highest level that redraws latents: the share of the true role's probability that
    the called word gets, where all levels call for the same. Named by the deepest: the same where
    it calls for another word, of what is left beside the word that the highest level calls for.
    """
    called, above, role = (rows[name][:, 1:] for name in ("called", "called_above", "role"))
    p = log_probabilities(model, rows["tokens"])[:, :-1].double().exp()
    members = torch.nn.functional.one_hot(torch.as_tensor(grammar.role_of)).double()
    of_role = (p @ members).gather(-1, role[..., None])[..., 0]

    def share(word):
        return p.gather(-1, word.clamp(min=0)[..., None])[..., 0] / of_role

    there, same, levels = called >= 0, called == above, _redrawn(grammar)
    beside = share(called) / (1 - share(above)).clamp(min=1e-12)
    parts = {levels[0]: share(called).where(there & same, torch.nan)}
    if len(levels) > 1:
        parts[levels[-1]] = beside.where(there & ~same, torch.nan)
    return pd.concat(sequence_sums(part).assign(name=level) for level, part in parts.items())


def _redrawn(grammar):
    """The levels that redraw latents, the highest first."""
    return [level for level in LEVELS if grammar.file.redraw.get(level)]


def _of_highest_level(process, documents):
    """Held-out documents with the latents that hold before any deeper level redraws a part."""
    file, level = process.grammar.file, _redrawn(process.grammar)[0]
    content = file.model_dump() | {"redraw": {level: file.redraw[level]}, "exclude_held_out": 0}
    above = GrammarProcess(Grammar(content), process.seed)
    base = above.documents(process.apart(HELD_OUT, documents.count))
    each, units = file.document.per_document("sentence"), len(next(iter(base.maps.values())))
    number = documents.token["document"] * each + documents.token["sentence"]
    token = documents.token | {"unit": number * units // (documents.count * each)}
    return replace(documents, token=token, maps=base.maps, habits=base.habits)


def _called(grammar, documents):
    """The token that an earlier word calls for at each place, or -1."""
    token, tokens = documents.token, documents.tokens
    place, role = token["place"], token["role"]
    binds = [torch.tensor(shape.binds_to) for shape in documents.shapes]
    parent = pad_sequence(binds, True, padding_value=-1)[token["shape"], place]
    called = torch.full_like(tokens, -1)
    for child, habit in documents.habits.items():
        bound = (parent >= 0) & (parent < place) & (role == grammar.roles.index(child))
        here = bound.nonzero()[:, 0]
        unit, words = token["unit"][here], tokens[here - place[here] + parent[here]]
        above, below = documents.maps[grammar.file.habits[child]], documents.maps[child]
        rank = (above[unit % len(above)] == words[:, None]).int().argmax(1)
        called[here] = below[unit % len(below), habit[unit, rank]]
    return called
