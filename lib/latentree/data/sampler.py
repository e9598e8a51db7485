"""Documents of a grammar: any by its number, on any device, with integer arithmetic only.

First a document's latents, for each level that redraws, from the corpus down; then a shape for each
sentence, a rank for each word, and the maps that turn ranks into tokens.
"""

from functools import cached_property

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from latentree.data import counter
from latentree.data.corpus import HELD_OUT, Corpus, Documents, position_within
from latentree.data.derivations import Derivations
from latentree.data.grammar import Grammar
from latentree.data.grammar_file import LEVELS
from latentree.data.words import words_of


class GrammarProcess(Corpus):
    """A Grammar with a seed: sentences of its roles, words by the latents of each place."""

    def __init__(self, grammar: Grammar, seed: int = 0):
        file, size, length = grammar.file, grammar.vocabulary_size, grammar.mean_document_length
        content, label = grammar.content, file.label
        super().__init__(file.name, file.kind, size, grammar.end, length, content, seed, label)
        self.grammar, self.repetitions = grammar, file.repetitions
        self.held_out_limit = file.exclude_held_out or None
        self._ranks = counter.Laws(grammar.frequencies)
        self._columns = [slice(words[0], words[-1] + 1) for words in grammar.words]

    def changed(self, **fields):
        """The same corpus and seed, with other values for some fields of its grammar file."""
        return GrammarProcess(Grammar(self.grammar.file.model_dump() | fields), self.seed)

    def documents(self, ids, device="cpu", detail=True):
        document_key = self._keys(ids, device)
        ids = torch.as_tensor(ids, dtype=torch.int64, device=device)
        layout = self.grammar.file.document
        per_document = layout.per_document("sentence")
        maps, habits, latent = self._latents(ids, document_key)
        number = torch.arange(len(ids) * per_document, device=device)
        unit = number * len(maps) // len(number)
        key = counter.subkey(document_key, 1)[:, None]
        key = counter.subkey(key, number[:per_document]).flatten()
        training = (ids < HELD_OUT).repeat_interleave(per_document)
        if self.held_out_limit and bool(training.any()):
            key = self._avoid_held_out(key, unit, maps, habits, training)
        token = self._sentences(key, unit, maps, habits)
        sentence = token["sentence"]
        token["document"] = sentence // per_document
        if not detail:
            return Documents({n: token[n] for n in ("tokens", "document")}, len(ids))
        token["position"] = position_within(token["document"])
        token["sentence"] = sentence % per_document
        token["paragraph"] = token["sentence"] // layout.sentences
        token["section"] = token["paragraph"] // layout.paragraphs
        token["unit"] = unit[sentence]
        if self.grammar.file.bank:
            token["latent"] = latent[token["unit"]]
        by_role = {role: maps[:, at] for role, at in zip(self.grammar.roles, self._columns)}
        shapes = self.grammar.shapes
        if shapes is None:  # of these documents only: there is no end of them
            shapes, number = self._derivations.shapes(counter.subkey(key, 0))
            token["shape"] = number[sentence]
        return Documents(token, len(ids), shapes, by_role, habits)

    @cached_property
    def words(self):
        """A word for each token; a full stop for the end."""
        return [*words_of({name: role.size for name, role in self.grammar.file.roles.items()}), "."]

    @cached_property
    def bank(self):
        """The habits of each latent of the bank: {child: (latent, parent's size)}."""
        file, found = self.grammar.file, {}
        key = counter.subkey(counter.subkey(self._key, -3), torch.arange(file.bank))
        for c, (child, parent) in enumerate(file.habits.items()):
            found[child] = counter.shuffled(counter.subkey(key, c), file.roles[parent].size)
        return found

    def token_frequencies(self):
        """Exact share of each token (vocabulary,), given the corpus-level maps and habits.

        Permuting a random k of n entries leaves a rank with its word with weight (n - k) / (n - 1)
        and mixes it evenly with the others otherwise; a habit survives a redraw of k of n with
        probability 1 - k / n. A bank's habits, one to one, leave even laws even.
        """
        grammar, file = self.grammar, self.grammar.file
        redrawn = {"corpus": file.redraw.get("corpus", 0.0)}
        fixed = self.changed(redraw=redrawn, exclude_held_out=0, bank=0).documents([0])
        shares = [share for level, share in file.redraw.items() if level != "corpus"]

        def law_of(role, siblings):
            """P(rank) in a production: by Zipf's law, or by what its parent's ranks call for."""
            law, parent = grammar.frequencies[grammar.roles.index(role)], file.habits.get(role)
            if file.binding == 0 or file.bank or parent not in siblings:
                return law
            habit = fixed.habits[role][0].numpy()
            lasting = np.prod([1 - round(share * len(habit)) / len(habit) for share in shares])
            called = np.bincount(habit, law_of(parent, siblings), len(law))
            called = lasting * called + (1 - lasting) * law
            return file.binding * called + (1 - file.binding) * law

        counts = np.zeros(self.vocabulary_size)
        counts[self.end] = 1.0
        for production in grammar.productions:
            for role in production.roles:
                r = grammar.roles.index(role)
                size, kept = grammar.role_specs[r].size, 1.0
                if grammar.role_specs[r].has_map:
                    for share in shares:
                        kept *= min(1.0, (size - round(share * size)) / (size - 1))
                weight = grammar.visits[production.left] * production.probability
                law = law_of(role, production.right)
                counts[fixed.maps[role][0].numpy()] += weight * kept * law
                counts[grammar.words[r]] += weight * (1 - kept) / size
        return counts / counts.sum()

    # ------------------------------------------------------------------ latents

    def _latents(self, ids, document_key):
        """By units of the finest level: maps (unit, word), habits {child: (unit, parent)}, latent.

        The last is the number (unit,) of what is drawn from a bank.
        """
        grammar, file, latent = self.grammar, self.grammar.file, None
        own_key = self._key.to(ids.device)
        key_of = {"corpus": counter.subkey(own_key, -1)[None]}
        maps, habits = torch.arange(self.vocabulary_size, device=ids.device)[None], {}
        if file.binding > 0:
            for child in file.habits:
                habits[child] = self._draw_habits(child, counter.subkey(key_of["corpus"], 2))
        held_out = (ids >= HELD_OUT) * HELD_OUT
        shared_by = held_out + (ids - held_out) // file.repetitions
        key_of["document"] = counter.subkey(counter.subkey(own_key, -2), shared_by)
        for depth, level in enumerate(LEVELS[2:], 2):
            number = torch.arange(file.document.per_document(level), device=ids.device)
            key = counter.subkey(document_key, depth)[:, None]
            key_of[level] = counter.subkey(key, number).flatten()

        for level in LEVELS:
            share, key = file.redraw.get(level, 0.0), key_of[level]
            if share == 0:
                continue
            repeat = len(key) // len(maps)
            maps = maps.repeat_interleave(repeat, 0)
            if file.bank:
                latent = counter.below(file.bank, counter.subkey(key, 1000))
                habits = {child: table.to(ids.device)[latent] for child, table in self.bank.items()}
                break
            for r, role in enumerate(grammar.role_specs):
                if role.has_map:
                    chosen = _choose(counter.subkey(key, r), role.size, share)
                    _permute(maps[:, self._columns[r]], chosen)
            for c, child in enumerate(habits):
                fresh = self._draw_habits(child, counter.subkey(key, 1000 + c))
                chosen = _choose(counter.subkey(key, 2000 + c), fresh.shape[1], share)
                old = habits[child].repeat_interleave(repeat, 0)
                habits[child] = old.scatter(1, chosen, fresh.gather(1, chosen))
        return maps, habits, latent

    def _draw_habits(self, child, key):
        """For each key and each rank of the child's parent, a rank from the child's own law."""
        file, r = self.grammar.file, self.grammar.roles.index(child)
        ranks = torch.arange(file.roles[file.habits[child]].size, device=key.device)
        return self._ranks.draw(r, counter.subkey(counter.subkey(key, r)[:, None], ranks))

    # ------------------------------------------------------------------ sentences

    def _sentences(self, key, unit, maps, habits):
        """One sentence for each key, laid end to end: {field: (tokens,)}."""
        grammar = self.grammar
        token = self._roles(counter.subkey(key, 0))
        role, place, sentence = token["role"], token["place"], token["sentence"]
        binds_to = token.pop("binds_to")
        word_key = counter.subkey(key[sentence], place + 1)
        rank = self._ranks.draw(role, word_key)
        if habits:
            follows = (binds_to >= 0) & counter.happens(grammar.file.binding, word_key + 1)
            for child in grammar.parents_first:
                at = (follows & (role == grammar.roles.index(child))).nonzero()[:, 0]
                parent_rank = rank[at - place[at] + binds_to[at]]
                rank[at] = habits[child][unit[sentence[at]], parent_rank]
        cell = unit[sentence] * maps.shape[1] + self._ranks.begins.to(key.device)[role] + rank
        return {"tokens": maps.flatten()[cell], "rank": rank} | token

    def _roles(self, key):
        """Fields role, place, binds_to, sentence, shape (tokens,) of one sentence for each key."""
        if self.grammar.shapes is None:  # then there is no field shape
            return self._derivations.draw(key)
        shape = self._shapes.draw(0, key)
        roles, bindings, lengths = (table.to(key.device) for table in self._tables)
        sentence = torch.arange(len(key), device=key.device).repeat_interleave(lengths[shape])
        place, shape = position_within(sentence), shape[sentence]
        cell = shape * roles.shape[1] + place
        token = {"role": roles.flatten()[cell], "binds_to": bindings.flatten()[cell]}
        return token | {"place": place, "sentence": sentence, "shape": shape}

    @cached_property
    def _shapes(self):
        return counter.Laws([[shape.probability for shape in self.grammar.shapes]])

    @cached_property
    def _derivations(self):
        return Derivations(self.grammar)

    @cached_property
    def _tables(self):
        """Roles and bindings of all shapes (shape, longest), -1 past the end; lengths."""
        number = {name: r for r, name in enumerate(self.grammar.roles)}
        roles, bindings = [], []
        for shape in self.grammar.shapes:
            roles.append(torch.tensor([number[name] for name in shape.roles]))
            bindings.append(torch.tensor(shape.binds_to))
        roles, bindings = (pad_sequence(rows, True, padding_value=-1) for rows in (roles, bindings))
        return roles, bindings, (roles >= 0).sum(1)

    # ------------------------------------------------------------------ sentences held out

    def _avoid_held_out(self, key, unit, maps, habits, training):
        """The keys, but redrawn where a training sentence occurs in a held-out document."""
        key, again = key.clone(), training.nonzero()[:, 0]
        for _ in range(1000):
            token = self._sentences(key[again], unit[again], maps, habits)
            again = again[torch.isin(_fingerprints(token), self._kept_sentences.to(key.device))]
            if len(again) == 0:
                return key
            key[again] = counter.subkey(key[again], -1)
        raise ValueError(
            f"grammar {self.name}: exclude_held_out = {self.held_out_limit}: leaves no sentence to "
            "train on; set it to 0 or use more words"
        )

    @cached_property
    def _kept_sentences(self):
        """Fingerprints of all sentences of the first held-out documents."""
        token = dict(self.documents(self.apart(HELD_OUT, self.held_out_limit)).token)
        token["sentence"] = (token["place"] == 0).cumsum(0) - 1
        return _fingerprints(token).unique()


def _choose(key, size, share):
    """For each key a random `share` of 0, 1, ... size - 1, in random order: (keys, count)."""
    return counter.shuffled(key, size)[:, : round(share * size)]


def _permute(rows, chosen):
    """Permute in place what rows (n, size) have at places `chosen` (n, count), in random order."""
    values = rows.gather(1, chosen)
    if chosen.shape == rows.shape:
        rows.copy_(values)
    else:
        rows.scatter_(1, chosen.sort(-1).values, values)


def _fingerprints(token):
    """A 64-bit hash of each sentence's tokens in their order."""
    hashed = counter.mix(token["tokens"] * counter.GOLDEN + token["place"] + 1)
    sums = torch.zeros(int(token["sentence"][-1]) + 1, dtype=torch.int64, device=hashed.device)
    return sums.index_add_(0, token["sentence"], hashed)
