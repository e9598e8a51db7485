"""Text of a grammar in which every role's habits live as long as they are told to."""

import torch

from latentree.data import counter
from latentree.data.grammar import Grammar
from latentree.data.sampler import GrammarProcess


class Lifetimes(GrammarProcess):
    """A grammar's text, but each role's habits are redrawn at sentences of their own.

    `lifetimes` {child: for how many sentences each set of its habits lives, in order} takes the
    place of the grammar file's `redraw`. Two roles whose boundaries coincide where the longer-lived
    one changes are nested, others crossed. With `parts`, levels of lives, sets inherit: at each
    level in turn a part has the habits of what it is a part of, but draws each of them anew with
    probability `redrawn`. The field alive is the number of the draw by which a word calls for a
    token (of a role that follows none: of its document).

    Raises ValueError unless each role's lifetimes, and each level of parts, fill a document.
    """

    def __init__(self, grammar: Grammar, lifetimes: dict, seed: int = 0, parts=(), redrawn=1.0):
        file = grammar.file
        self.sentences = file.document.per_document("sentence")
        whole = {child: self.sentences for child in file.habits}
        filled = {child: sum(lives) for child, lives in lifetimes.items()}
        if filled != whole or any(sum(lives) != self.sentences for lives in parts):
            raise ValueError(
                f"grammar {grammar.name}: lifetimes = {lifetimes}, parts = {list(parts)}: give for "
                f"each of {', '.join(file.habits)}, and for each level of parts, numbers that sum "
                f"to the {self.sentences} sentences of a document"
            )
        super().__init__(Grammar(file.model_dump() | {"redraw": {}}), seed)
        self.lifetimes, self.parts, self.redrawn = lifetimes, parts, redrawn
        self._content = self._content | {"lifetimes": sorted(lifetimes.items())}
        if parts:
            self._content |= {"parts": parts, "redrawn": redrawn}

    def documents(self, ids, device="cpu", detail=True):
        found = super().documents(ids, device, detail)
        if detail:
            token, roles = found.token, self.grammar.roles
            begins = torch.arange(len(token["place"]), device=device) - token["place"]
            above = self._tables[1].to(device)[token["shape"], token["place"]].clamp(min=0)
            parent = token["rank"][begins + above]
            sentence = token["document"] * self.sentences + token["sentence"]
            document_key = self._keys(ids, device)
            most = max(map(len, self.lifetimes.values())) + sum(map(len, self.parts))
            token["alive"] = token["document"] * most
            for child in self.lifetimes:
                drawn = self._drawn(child, document_key)[1]
                here = token["role"] == roles.index(child)
                token["alive"] += here * drawn[sentence, parent % drawn.shape[1]]
        return found

    def _latents(self, ids, document_key):
        maps, habits, latent = super()._latents(ids, document_key)
        habits = {child: self._drawn(child, document_key)[0] for child in habits}
        return maps.expand(len(ids) * self.sentences, -1), habits, latent  # of each sentence

    def _drawn(self, child, document_key):
        """A role's habits, and the number of the draw that each is from: (unit, parent)."""
        c = list(self.grammar.file.habits).index(child)
        key = counter.subkey(document_key, 3000 + c)[:, None]
        habits = drawn = torch.zeros(1, 1, dtype=torch.int64, device=key.device)
        before = 0
        for lives in (self.lifetimes[child], *self.parts):
            number = before + torch.arange(len(lives), device=key.device)
            number = number.repeat_interleave(torch.tensor(lives, device=key.device))
            of_set = counter.subkey(key, number).flatten()
            fresh = self._draw_habits(child, of_set)
            word = torch.arange(fresh.shape[1], device=key.device)
            chance = counter.uniform(counter.subkey(counter.subkey(of_set, -1)[:, None], word))
            again = (chance < self.redrawn * 2**counter.BITS) | (before == 0)
            habits = torch.where(again, fresh, habits)
            drawn = torch.where(again, number.repeat(len(document_key))[:, None], drawn)
            before += len(lives)
        return habits, drawn
