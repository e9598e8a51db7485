"""Documents of a grammar: any document by its number, sampled on any device with integer arithmetic only.

Order of the draws: a document's latents (for each level that redraws, from the corpus down), a shape for each
sentence, a rank for each word, and last the maps that turn ranks into tokens. Each draw has its own key (counter.py).
"""

from dataclasses import dataclass, field

import torch

from . import counter
from .errors import UserError
from .grammar import LEVELS, Grammar

HELD_OUT = 1 << 40  # document ids from here on are held out: no training document has one


@dataclass
class Documents:
    """Documents laid end to end: one entry per token in the fields of `token`, int64 (tokens,) each.

    `token`: tokens; document (index into the ids asked for), position (in the document), and, from a grammar, role,
    rank, binds_to (how many tokens back or ahead the word it follows stands, 0: free), sentence, paragraph, section
    (numbered within the document), shape (index into `shapes`), unit (row of `maps`).
    `maps[role]` (units, size): the token of each rank; `habits[child]` (units, parent size): the child rank that
    each parent rank calls for.
    """

    token: dict
    count: int
    shapes: list = field(default_factory=list)
    maps: dict = field(default_factory=dict)
    habits: dict = field(default_factory=dict)

    @property
    def tokens(self):
        """The tokens themselves (tokens,)."""
        return self.token["tokens"]


def flat_documents(tokens, fields=(), **rest):
    """Documents from padded (documents, longest) arrays: every field keeps the places where tokens >= 0."""
    kept = tokens >= 0
    document = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
    position = kept.cumsum(-1) - 1
    named = {"tokens": tokens, "document": document, "position": position, **dict(fields)}
    return Documents({name: value.expand_as(tokens)[kept] for name, value in named.items()}, len(tokens), **rest)


class GrammarProcess:
    """A grammar with a seed: the corpus itself. Attributes: name, seed, grammar, vocabulary_size, end."""

    def __init__(self, grammar: Grammar, seed: int = 0):
        self.grammar, self.seed, self.name = grammar, seed, grammar.name
        self.vocabulary_size, self.end = grammar.vocabulary_size, grammar.end
        self.mean_document_length = grammar.mean_document_length
        self.repetitions = grammar.file.repetitions
        self.held_out_limit = grammar.file.exclude_held_out or None
        self._key = counter.mix(torch.tensor(seed))
        self._limits, self._tables = {}, {}  # per device
        self._shapes = list(grammar.shapes or [])
        self._shape_number = {}  # production choices -> index in _shapes, for grammars whose shapes are not enumerated
        self._excluded = None

    def documents(self, ids, device="cpu"):
        """Documents by number. `ids` (documents,) integers >= 0; from HELD_OUT on they are held out."""
        ids = torch.as_tensor(ids, dtype=torch.int64, device=device)
        if len(ids) == 0 or ids.min() < 0:
            raise UserError(f"{self.name}: document ids {ids.tolist()[:3]} are not documents; ask for at least one id >= 0")
        shape, grammar = self.grammar.file.document, self.grammar
        per_document = shape.per_document("sentence")
        document_key = counter.subkey(self._key.to(device), ids)
        maps, habits, units = self._latents(ids, document_key)
        sentence = torch.arange(per_document, device=device)
        sentence_key = counter.subkey(counter.subkey(document_key, 1)[:, None], sentence).flatten()
        unit = (torch.arange(len(ids) * per_document, device=device) * units) // (len(ids) * per_document)

        fields = self._sentences(sentence_key, unit, maps, habits)
        if grammar.file.exclude_held_out and bool((ids < HELD_OUT).any()):
            training = (ids < HELD_OUT).repeat_interleave(per_document)
            self._redraw_excluded(fields, training, sentence_key, unit, maps, habits)
        sentence = sentence[:, None]
        fields = {name: value.reshape(len(ids), -1) for name, value in fields.items()}
        numbers = {"sentence": sentence, "paragraph": sentence // shape.sentences,
                   "section": sentence // (shape.sentences * shape.paragraphs)}
        longest = fields["tokens"].shape[1] // per_document
        for name, number in numbers.items():
            fields[name] = number.expand(per_document, longest).reshape(1, -1)
        return flat_documents(fields.pop("tokens"), fields, shapes=self._shapes, maps=maps, habits=habits)

    # ------------------------------------------------------------------ latents

    def _latents(self, ids, document_key):
        """Maps and habits of every unit of the finest level that redraws, and the number of those units."""
        grammar, device = self.grammar, ids.device
        file, roles = grammar.file, grammar.roles
        maps = {role: torch.as_tensor(grammar.words[r], device=device)[None] for r, role in enumerate(roles)}
        habits = {}
        corpus_key = counter.subkey(self._key.to(device), -1)[None]
        if file.binding > 0:
            for child in file.habits:
                habits[child] = self._draw_habits(child, counter.subkey(corpus_key, 2))
        training = ids < HELD_OUT
        group = torch.where(training, ids // file.repetitions, HELD_OUT + (ids - HELD_OUT) // file.repetitions)
        level_key = {"corpus": corpus_key, "document": counter.subkey(counter.subkey(self._key.to(device), -2), group)}
        units = 1
        for depth, level in enumerate(LEVELS):
            share = file.redraw.get(level, 0.0)
            if share == 0:
                continue
            if level in level_key:
                key = level_key[level]
            else:
                number = torch.arange(file.document.per_document(level), device=device)
                key = counter.subkey(counter.subkey(document_key, depth)[:, None], number).flatten()
            repeat = len(key) // units
            units = len(key)
            for r, role in enumerate(roles):
                if grammar.role_specs[r].has_map:
                    maps[role] = maps[role].repeat_interleave(repeat, 0)
                    order = counter.shuffled(counter.subkey(key, r), grammar.sizes[r])[:, : round(share * grammar.sizes[r])]
                    maps[role] = maps[role].scatter(1, order.sort(-1).values, maps[role].gather(1, order))
            for c, child in enumerate(habits):
                fresh = self._draw_habits(child, counter.subkey(key, 1000 + c))
                size = fresh.shape[1]
                chosen = counter.shuffled(counter.subkey(key, 2000 + c), size)[:, : round(share * size)]
                habits[child] = habits[child].repeat_interleave(repeat, 0).scatter(1, chosen, fresh.gather(1, chosen))
        return maps, habits, units

    def _draw_habits(self, child, key):
        """For each key and each rank of the child's parent, a child rank from the child's own Zipf law."""
        roles = self.grammar.roles
        size = int(self.grammar.sizes[roles.index(self.grammar.file.habits[child])])
        keys = counter.subkey(counter.subkey(key, roles.index(child))[:, None], torch.arange(size, device=key.device))
        return counter.draw(self._rank_limits(key.device)[roles.index(child)], keys)

    # ------------------------------------------------------------------ sentences

    def _sentences(self, key, unit, maps, habits):
        """Sample one sentence for each key: padded (sentences, longest) fields, tokens -1 past the end."""
        grammar = self.grammar
        shape = self._draw_shapes(counter.subkey(key, 0))
        roles, bindings = self._shape_tables(key.device)
        role, binds_to = roles[shape], bindings[shape]
        place = torch.arange(role.shape[1], device=key.device)
        word_key = counter.subkey(key[:, None], place + 1)
        rank, tokens = torch.zeros_like(role), torch.full_like(role, -1)
        for r, limits in enumerate(self._rank_limits(key.device)):
            if len(limits) > 1:
                here = role == r
                rank[here] = counter.draw(limits, word_key[here])
        if habits:
            follows = (binds_to >= 0) & (counter.uniform(word_key + 1) < int(grammar.file.binding * 2**counter.BITS))
            for child in grammar.parents_first:
                sentence, position = (follows & (role == grammar.roles.index(child))).nonzero(as_tuple=True)
                parent_rank = rank[sentence, binds_to[sentence, position]]
                rank[sentence, position] = habits[child][unit[sentence], parent_rank]
        for r, name in enumerate(grammar.roles):
            sentence, position = (role == r).nonzero(as_tuple=True)
            row = unit[sentence] if len(maps[name]) > 1 else 0
            tokens[sentence, position] = maps[name][row, rank[sentence, position]]
        return {"tokens": tokens, "role": role, "rank": rank, "shape": shape[:, None].expand_as(role),
                "binds_to": torch.where(binds_to >= 0, binds_to - place, 0), "unit": unit[:, None].expand_as(role)}

    def _rank_limits(self, device):
        if device not in self._limits:
            self._limits[device] = [counter.thresholds(f).to(device) for f in self.grammar.frequencies]
        return self._limits[device]

    def _shape_tables(self, device):
        """Role and binding of each position of each known shape: (shapes, longest), -1 past the end."""
        if device not in self._tables or len(self._tables[device][0]) != len(self._shapes):
            role = {name: r for r, name in enumerate(self.grammar.roles)}
            rows = [([role[name] for name in s.roles], s.binds_to) for s in self._shapes]
            longest = max(len(roles) for roles, _ in rows)
            self._tables[device] = tuple(
                torch.tensor([[*row[part], *[-1] * (longest - len(row[part]))] for row in rows], device=device)
                for part in (0, 1))
        return self._tables[device]

    def _draw_shapes(self, key):
        """Index of a shape for each key: one draw where shapes are enumerated, else a derivation by stacks."""
        if self.grammar.shapes:
            return counter.draw(counter.thresholds([s.probability for s in self.grammar.shapes]).to(key.device), key)
        rows, shape = self._derive(key).unique(dim=0, return_inverse=True)
        for row in rows.tolist():
            choices = tuple(choice for choice in row if choice >= 0)
            if choices not in self._shape_number:
                self._shape_number[choices] = len(self._shapes)
                self._shapes.append(self.grammar.shape(choices))
        numbers = [self._shape_number[tuple(choice for choice in row if choice >= 0)] for row in rows.tolist()]
        return torch.tensor(numbers, device=key.device)[shape]

    def _derive(self, key):
        """Production choices of a leftmost derivation for each key: (sentences, steps), -1 when done.

        All sentences expand the symbol on top of their stack at once, until every stack is empty.
        """
        productions = self.grammar.productions
        below = [[s for s in right if not isinstance(s, str)] for _, right, _ in productions]
        widest = max(map(len, below))
        pushed = torch.tensor([[*reversed(b), *[-1] * (widest - len(b))] for b in below], device=key.device)
        pushes = torch.tensor([len(b) for b in below], device=key.device)
        limits = [(torch.tensor([i for i, rule in enumerate(productions) if rule[0] == n], device=key.device),
                   counter.thresholds([p for left, _, p in productions if left == n]).to(key.device))
                  for n in range(len(self.grammar.nonterminals))]
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

    def _redraw_excluded(self, fields, training, key, unit, maps, habits):
        """Redraw, in place, every training sentence that occurs in one of the first held-out documents."""
        attempt = 0
        again = (training & torch.isin(_fingerprint(fields["tokens"]), self._held_out_sentences(key.device))).nonzero()[:, 0]
        while len(again):
            attempt += 1
            if attempt > 1000:
                raise UserError(f"grammar {self.name}: exclude_held_out is {self.grammar.file.exclude_held_out} and leaves "
                                "no sentence to train on; set it to 0 or use more words")
            fresh = self._sentences(counter.subkey(key[again], -attempt), unit[again], maps, habits)
            for name, value in fresh.items():
                wider = value.shape[1] - fields[name].shape[1]
                if wider > 0:
                    fields[name] = torch.nn.functional.pad(fields[name], (0, wider), value=-1)
                fields[name] = fields[name].clone()
                fields[name][again] = value
            again = again[torch.isin(_fingerprint(fresh["tokens"]), self._held_out_sentences(key.device))]

    def _held_out_sentences(self, device):
        if self._excluded is None:
            ids = HELD_OUT + torch.arange(self.grammar.file.exclude_held_out)
            tokens = self.documents(ids).tokens
            starts = torch.cat([torch.zeros(1, dtype=torch.int64), (tokens == self.end).nonzero()[:-1, 0] + 1])
            lengths = torch.diff(starts, append=torch.tensor([len(tokens)]))
            padded = torch.full((len(starts), int(lengths.max())), -1)
            padded[torch.arange(padded.shape[1]) < lengths[:, None]] = tokens
            self._excluded = _fingerprint(padded).unique()
        return self._excluded.to(device)


def _fingerprint(tokens):
    """A 64-bit hash of each row's tokens (rows, longest) in their order; padding (-1) counts for nothing."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where(tokens >= 0, counter.mix(tokens * counter.GOLDEN + place + 1), 0).sum(-1)
