"""Text of a grammar in which every role's habits live as long as they are told to."""

import torch

from latentree.data import counter
from latentree.data.grammar import Grammar
from latentree.data.sampler import GrammarProcess


class Lifetimes(GrammarProcess):
    """A grammar's text, but each role's habits are redrawn at sentences of their own.

    `lifetimes` {child: for how many sentences each set of its habits lives, in order} takes the
    place of the grammar file's `redraw`; sets of all roles last through a document together. Two
    roles whose boundaries coincide where the longer-lived one changes are nested, others crossed.
    Documents have a field more: alive, the number of the set of its role's habits that a token
    stands in (of a role that follows none: of its document).

    Raises ValueError unless each role with habits has lifetimes that fill a document.
    """

    def __init__(self, grammar: Grammar, lifetimes: dict, seed: int = 0):
        file = grammar.file
        sentences = file.document.per_document("sentence")
        whole = {child: [sentences] for child in file.habits}
        if {child: [sum(lives)] for child, lives in lifetimes.items()} != whole:
            raise ValueError(
                f"grammar {grammar.name}: lifetimes = {lifetimes}: give for each of "
                f"{', '.join(file.habits)} numbers that sum to the {sentences} sentences of a "
                "document"
            )
        super().__init__(Grammar(file.model_dump() | {"redraw": {}}), seed)
        self.lifetimes = lifetimes
        self._content = self._content | {"lifetimes": sorted(lifetimes.items())}

    def documents(self, ids, device="cpu", detail=True):
        """Documents by number, as those of any grammar, with the field alive."""
        found = super().documents(ids, device, detail)
        if detail:
            token, most = found.token, max(map(len, self.lifetimes.values()))
            token["alive"] = token["document"] * most
            for child in self.lifetimes:
                here = token["role"] == self.grammar.roles.index(child)
                token["alive"] += here * self._set_of(child).to(device)[token["sentence"]]
        return found

    def _set_of(self, child):
        """The number of the set of habits in each sentence of a document: (sentence,)."""
        lives = torch.tensor(self.lifetimes[child])
        return torch.arange(len(lives)).repeat_interleave(lives)

    def _latents(self, ids, document_key):
        """Maps and habits as of any grammar, but with a unit for each sentence."""
        maps, habits, *rest = super()._latents(ids, document_key)
        for c, child in enumerate(habits):
            number = self._set_of(child).to(ids.device)
            key = counter.subkey(counter.subkey(document_key, 3000 + c)[:, None], number)
            habits[child] = self._draw_habits(child, key.flatten())
        return maps.expand(len(ids) * len(number), -1), habits, *rest
