"""Documents of a grammar: any document by its number, sampled on any device with integer arithmetic only.

Order of the draws: a document's latents (for each level that redraws, from the corpus down), a shape for each
sentence, a rank for each word, and last the maps that turn ranks into tokens. Each draw has its own key (counter.py).
"""

import numpy as np
import torch

from latentree.data import counter
from latentree.data.corpus import HELD_OUT, Corpus, Documents, position_within
from latentree.data.grammar import END, LEVELS, Grammar


class GrammarProcess(Corpus):
    """A Grammar with a seed: sentences of its roles, words by the latents of each place."""

    def __init__(self, grammar: Grammar, seed: int = 0):
        super().__init__(
            name=grammar.name,
            kind=grammar.file.kind,
            vocabulary_size=grammar.vocabulary_size,
            end=grammar.end,
            mean_document_length=grammar.mean_document_length,
            content=grammar.content,
            seed=seed,
            label=grammar.file.label,
        )
        self.grammar = grammar
        self.repetitions = grammar.file.repetitions
        self.held_out_limit = grammar.file.exclude_held_out or None
        self._key = counter.mix(torch.tensor(seed))
        self._starts = (grammar.sizes.cumsum() - grammar.sizes).tolist()
        self._limits, self._tables = {}, {}  # per device
        self._shapes = list(grammar.shapes or [])
        self._shape_number = {}  # production choices -> index in _shapes, for grammars whose shapes are not enumerated
        self._excluded = None

    def documents(self, ids, device="cpu", detail=True):
        """Documents by number. `ids` (documents,) integers >= 0; from HELD_OUT on they are held out.

        Without `detail` only the fields tokens and document are filled.
        """
        ids = torch.as_tensor(ids, dtype=torch.int64, device=device)
        if len(ids) == 0 or ids.min() < 0:
            raise ValueError(
                f"{self.name}: document ids {ids.tolist()[:3]} are not documents; ask for at least one id >= 0"
            )
        layout, grammar = self.grammar.file.document, self.grammar
        per_document = layout.per_document("sentence")
        document_key = counter.subkey(self._key.to(device), ids)
        latents = self._latents(ids, document_key)
        number = torch.arange(len(ids) * per_document, device=device)
        key = counter.subkey(
            counter.subkey(document_key, 1)[:, None], number[:per_document]
        ).flatten()
        unit = number * len(latents["maps"]) // len(number)
        if grammar.file.exclude_held_out and bool((ids < HELD_OUT).any()):
            key = self._avoid_held_out(
                key, unit, latents, (ids < HELD_OUT).repeat_interleave(per_document)
            )

        fields = self._sentences(key, unit, latents)
        sentence = fields["sentence"]
        fields["document"] = sentence // per_document
        if not detail:
            return Documents({name: fields[name] for name in ("tokens", "document")}, len(ids))
        fields["position"] = position_within(fields["document"])
        fields["sentence"] = sentence % per_document
        fields["paragraph"] = fields["sentence"] // layout.sentences
        fields["section"] = fields["paragraph"] // layout.paragraphs
        fields["unit"] = unit[sentence]
        maps = {
            role: latents["maps"][:, start : start + size]
            for role, start, size in zip(grammar.roles, self._starts, grammar.sizes.tolist())
        }
        return Documents(fields, len(ids), self._shapes, maps, latents["habits"])

    def token_frequencies(self):
        """Exact share of each token in the corpus (vocabulary,), given the seed's corpus-level maps and habits.

        Permuting a random k of n entries leaves a rank with its word with weight (n - k) / (n - 1) and mixes it evenly
        with the others otherwise; a habit survives a redraw of k of n with probability 1 - k / n.
        """
        grammar, file = self.grammar, self.grammar.file
        above = file.model_dump() | {
            "redraw": {"corpus": file.redraw.get("corpus", 0.0)},
            "exclude_held_out": 0,
        }
        base = GrammarProcess(Grammar(above), self.seed).documents([0])
        shares = [share for level, share in file.redraw.items() if level != "corpus"]

        def rank_law(role, right):
            """Ranks of `role` in a production: its own Zipf law, or what its parent's ranks call for."""
            law, parent = grammar.frequencies[grammar.roles.index(role)], file.habits.get(role)
            if file.binding == 0 or parent not in right:
                return law
            above, habit = rank_law(parent, right), base.habits[role][0].numpy()
            lasting = np.prod([1 - round(share * len(habit)) / len(habit) for share in shares])
            called = lasting * np.bincount(habit, above, len(law)) + (1 - lasting) * law
            return file.binding * called + (1 - file.binding) * law

        counts = np.zeros(self.vocabulary_size)
        for left, right, probability in [*grammar.productions, (0, (END,), 1 / grammar.visits[0])]:
            for role in right:
                if isinstance(role, str):
                    r, law = grammar.roles.index(role), rank_law(role, right)
                    n = len(law)
                    kept = (
                        np.prod([min(1.0, (n - round(s * n)) / (n - 1)) for s in shares])
                        if grammar.role_specs[r].has_map
                        else 1.0
                    )
                    weight = grammar.visits[left] * probability
                    counts[base.maps[role][0].numpy()] += weight * kept * law
                    counts[grammar.words[r]] += weight * (1 - kept) / n
        return counts / counts.sum()

    # ------------------------------------------------------------------ latents

    def _latents(self, ids, document_key):
        """Maps (units, all words) and habits {child: (units, parents)} of every unit of the finest level that redraws."""
        grammar, device, file = self.grammar, ids.device, self.grammar.file
        maps = torch.as_tensor(np.concatenate(grammar.words), device=device)[None]
        habits = {}
        corpus_key = counter.subkey(self._key.to(device), -1)[None]
        if file.binding > 0:
            habits = {
                child: self._draw_habits(child, counter.subkey(corpus_key, 2))
                for child in file.habits
            }
        training = ids < HELD_OUT
        group = torch.where(
            training, ids // file.repetitions, HELD_OUT + (ids - HELD_OUT) // file.repetitions
        )
        for depth, level in enumerate(LEVELS):
            share = file.redraw.get(level, 0.0)
            if share == 0:
                continue
            if level == "corpus":
                key = corpus_key
            elif level == "document":
                key = counter.subkey(counter.subkey(self._key.to(device), -2), group)
            else:
                number = torch.arange(file.document.per_document(level), device=device)
                key = counter.subkey(counter.subkey(document_key, depth)[:, None], number).flatten()
            repeat = len(key) // len(maps)
            maps = maps.repeat_interleave(repeat, 0)
            for r, (start, size) in enumerate(zip(self._starts, grammar.sizes.tolist())):
                if grammar.role_specs[r].has_map:
                    chosen = counter.shuffled(counter.subkey(key, r), size)[
                        :, : round(share * size)
                    ]
                    _permute(maps[:, start : start + size], chosen)
            for c, child in enumerate(habits):
                fresh = self._draw_habits(child, counter.subkey(key, 1000 + c))
                size = fresh.shape[1]
                chosen = counter.shuffled(counter.subkey(key, 2000 + c), size)[
                    :, : round(share * size)
                ]
                habits[child] = (
                    habits[child]
                    .repeat_interleave(repeat, 0)
                    .scatter(1, chosen, fresh.gather(1, chosen))
                )
        return {"maps": maps, "habits": habits}

    def _draw_habits(self, child, key):
        """For each key and each rank of the child's parent, a child rank from the child's own Zipf law."""
        r, parent = (
            self.grammar.roles.index(child),
            self.grammar.roles.index(self.grammar.file.habits[child]),
        )
        places = torch.arange(int(self.grammar.sizes[parent]), device=key.device)
        return self._draw_ranks(
            torch.tensor(r, device=key.device),
            counter.subkey(counter.subkey(key, r)[:, None], places),
        )

    # ------------------------------------------------------------------ sentences

    def _sentences(self, key, unit, latents):
        """One sentence for each key, laid end to end: fields tokens, role, rank, sentence, place, shape, (tokens,) each."""
        grammar = self.grammar
        shape = self._draw_shapes(counter.subkey(key, 0))
        roles, bindings, lengths = self._shape_tables(
            key.device
        )  # shapes met for the first time are in them now
        length = lengths[shape]
        sentence = torch.arange(len(key), device=key.device).repeat_interleave(length)
        starts = length.cumsum(0) - length
        place = torch.arange(len(sentence), device=key.device) - starts[sentence]
        cell = shape[sentence] * roles.shape[1] + place
        role, binds_to = roles.flatten()[cell], bindings.flatten()[cell]
        word_key = counter.subkey(key[sentence], place + 1)
        rank = self._draw_ranks(role, word_key)
        if latents["habits"]:
            follows = (binds_to >= 0) & (
                counter.uniform(word_key + 1) < int(grammar.file.binding * 2**counter.BITS)
            )
            for child in grammar.parents_first:
                at = (follows & (role == grammar.roles.index(child))).nonzero()[:, 0]
                parent_rank = rank[starts[sentence[at]] + binds_to[at]]
                rank[at] = latents["habits"][child][unit[sentence[at]], parent_rank]
        maps = latents["maps"]
        tokens = maps.flatten()[
            unit[sentence] * maps.shape[1] + self._on(key.device)[1][role] + rank
        ]
        return {
            "tokens": tokens,
            "role": role,
            "rank": rank,
            "sentence": sentence,
            "place": place,
            "shape": shape[sentence],
        }

    def _on(self, device):
        """On `device`: thresholds of all roles' Zipf laws one after the other, and where each role's words start."""
        if device not in self._limits:
            limits = [
                counter.thresholds(f) + (r << counter.BITS)
                for r, f in enumerate(self.grammar.frequencies)
            ]
            self._limits[device] = (
                torch.cat(limits).to(device),
                torch.as_tensor(self._starts, device=device),
            )
        return self._limits[device]

    def _draw_ranks(self, role, key):
        """A rank from the Zipf law of each role (integers that broadcast with the keys)."""
        limits, starts = self._on(key.device)
        return (
            torch.searchsorted(limits, counter.uniform(key) + (role << counter.BITS), right=True)
            - starts[role]
        )

    def _shape_tables(self, device):
        """Role and binding of each position of each known shape, (shapes, longest), -1 past the end; lengths (shapes,)."""
        if device not in self._tables or len(self._tables[device][0]) != len(self._shapes):
            number = {name: r for r, name in enumerate(self.grammar.roles)}
            lengths = [len(s.roles) for s in self._shapes] or [1]
            rows = (
                [[number[name] for name in s.roles] for s in self._shapes],
                [s.binds_to for s in self._shapes],
            )
            padded = [
                [[*row, *[-1] * (max(lengths) - len(row))] for row in part] or [[-1]]
                for part in rows
            ]
            self._tables[device] = tuple(
                torch.tensor(part, device=device) for part in (*padded, lengths)
            )
        return self._tables[device]

    def _draw_shapes(self, key):
        """Index of a shape for each key: one draw where shapes are enumerated, else a derivation by stacks."""
        if self.grammar.shapes:
            return counter.draw(
                counter.thresholds([s.probability for s in self.grammar.shapes]).to(key.device), key
            )
        rows, shape = self._derive(key).unique(dim=0, return_inverse=True)
        for row in rows.tolist():
            choices = tuple(choice for choice in row if choice >= 0)
            if choices not in self._shape_number:
                self._shape_number[choices] = len(self._shapes)
                self._shapes.append(self.grammar.shape(choices))
        numbers = [
            self._shape_number[tuple(choice for choice in row if choice >= 0)]
            for row in rows.tolist()
        ]
        return torch.tensor(numbers, device=key.device)[shape]

    def _derive(self, key):
        """Production choices of a leftmost derivation for each key: (sentences, steps), -1 when done.

        All sentences expand the symbol on top of their stack at once, until every stack is empty.
        """
        productions = self.grammar.productions
        below = [[s for s in right if not isinstance(s, str)] for _, right, _ in productions]
        widest = max(map(len, below))
        pushed = torch.tensor(
            [[*reversed(b), *[-1] * (widest - len(b))] for b in below], device=key.device
        )
        pushes = torch.tensor([len(b) for b in below], device=key.device)
        limits = [
            (
                torch.tensor(
                    [i for i, rule in enumerate(productions) if rule[0] == n], device=key.device
                ),
                counter.thresholds([p for left, _, p in productions if left == n]).to(key.device),
            )
            for n in range(len(self.grammar.nonterminals))
        ]
        stack = torch.zeros(len(key), 1 + widest, dtype=torch.int64, device=key.device)
        height, steps = torch.ones_like(key), []
        while bool((height > 0).any()):
            live = (height > 0).nonzero()[:, 0]
            if stack.shape[1] < int(height.max()) + widest:
                stack = torch.nn.functional.pad(stack, (0, stack.shape[1] + widest))
            top = stack[live, height[live] - 1]
            choice, draw_key = torch.empty_like(top), counter.subkey(key[live], len(steps))
            for n, (rules, rule_limits) in enumerate(limits):
                choice[top == n] = rules[counter.draw(rule_limits, draw_key[top == n])]
            for slot in range(widest):
                stack[live, height[live] - 1 + slot] = pushed[choice, slot]
            height[live] += pushes[choice] - 1
            steps.append(torch.full_like(key, -1).scatter(0, live, choice))
        return torch.stack(steps, 1)

    # ------------------------------------------------------------------ sentences kept for evaluation

    def _avoid_held_out(self, key, unit, latents, training):
        """Keys under which no training sentence occurs in one of the first held-out documents: theirs, or redrawn ones."""
        key, again = key.clone(), training.nonzero()[:, 0]
        for attempt in range(1000):
            fields = self._sentences(key[again], unit[again], latents)
            again = again[torch.isin(_fingerprints(fields), self._held_out_sentences(key.device))]
            if len(again) == 0:
                return key
            key[again] = counter.subkey(key[again], -1)
        raise ValueError(
            f"grammar {self.name}: exclude_held_out is {self.grammar.file.exclude_held_out} and leaves no "
            "sentence to train on; set it to 0 or use more words"
        )

    def _held_out_sentences(self, device):
        if self._excluded is None:
            documents = self.documents(self.apart(HELD_OUT, self.grammar.file.exclude_held_out))
            fields = dict(documents.token)
            fields["sentence"] = (fields["place"] == 0).cumsum(0) - 1
            self._excluded = _fingerprints(fields).unique()
        return self._excluded.to(device)


def _permute(rows, chosen):
    """Permute, in place, the entries of rows (n, size) at places `chosen` (n, count, in random order) among themselves."""
    places = chosen if chosen.shape == rows.shape else chosen.sort(-1).values
    values = rows.gather(1, chosen)
    rows.copy_(values) if places is chosen else rows.scatter_(1, places, values)


def _fingerprints(fields):
    """A 64-bit hash of each sentence's tokens in their order."""
    hashed = counter.mix(fields["tokens"] * counter.GOLDEN + fields["place"] + 1)
    return torch.zeros(
        int(fields["sentence"][-1]) + 1, dtype=torch.int64, device=hashed.device
    ).index_add_(0, fields["sentence"], hashed)
