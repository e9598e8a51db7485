"""What a corpus is, corpora by name, and the rows of tokens that are cut from them: nothing is written to disk."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from latentree.data import counter
from latentree.data.files import read_yaml
from latentree.data.grammar import Grammar
from latentree.data.grammar_file import ChainFile, HashedFile, checked

HELD_OUT = 1 << 40  # document ids from here on are held out: no training document has one
BLOCK = 1 << 16  # documents whose order is shuffled together, where documents share latents
REFILL = 1 << 17  # tokens that a stream samples at a time


@dataclass
class Documents:
    """Documents laid end to end: one entry per token in the fields of `token`, int64 (tokens,) each.

    `token`: tokens; document (index into the ids asked for), position (in the document), and, from a grammar, role,
    rank, sentence, paragraph, section (numbered within the document), place (in the sentence), shape (index into
    `shapes`), unit (row of `maps` and `habits`).
    `maps[role]` (units or 1, size): the token of each rank; `habits[child]` (units, parent size): the child rank that
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


def position_within(group):
    """0, 1, 2, ... within each run of equal numbers of a sorted tensor (n,)."""
    counts = torch.bincount(group)
    return torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group]


class Corpus:
    """Text of any kind: each of its documents is a pure function of its number, so it need not be stored.

    - name, seed; kind ("PCFG", "flat", "n-gram", ...: its colour in figures) and label (its name in figures).
    - vocabulary_size, and end, the token that closes a sentence or text (None: there is none).
    - mean_document_length in tokens.
    - repetitions: how many documents in a row share their latents.
    - held_out_limit: how many held-out documents have no sentence in common with training (None: this is not asked).
    - grammar: the Grammar that its sentences follow, or None.
    """

    repetitions, held_out_limit, grammar = 1, None, None

    def __init__(
        self, name, kind, vocabulary_size, end, mean_document_length, content, seed=0, label=""
    ):
        self.name, self.kind, self.label, self.seed = name, kind, label or name, seed
        self.vocabulary_size, self.end = vocabulary_size, end
        self.mean_document_length = mean_document_length
        self._content = content

    def documents(self, ids, device="cpu", detail=True):
        """Documents by number: `ids` (documents,), integers >= 0; from HELD_OUT on they are held out.

        Without `detail` only the fields tokens and document need be filled.
        """
        raise NotImplementedError

    @cached_property
    def digest(self):
        """Eight hex digits of what the corpus is made of, its seed apart: equal ones give the same documents."""
        return hashlib.sha256(json.dumps(self._content).encode()).hexdigest()[:8]

    def apart(self, first, count):
        """Numbers of `count` documents from `first` on, (count,), no two of which share their latents."""
        return first + torch.arange(count) * self.repetitions

    def training_ids(self, place):
        """The training documents that stand at the places (int64 tensor of any shape) of the corpus.

        Where documents share latents, they are shuffled within blocks, so that those which share lie far apart.
        """
        if self.repetitions == 1:
            return place
        block = BLOCK - BLOCK % self.repetitions
        key = counter.mix(torch.tensor(self.seed)) ^ counter.GOLDEN
        number = place // block
        shuffled = torch.empty_like(place)
        for n in number.unique().tolist():
            here = number == n
            order = counter.shuffled(counter.subkey(key, n), block)
            shuffled[here] = n * block + order[place[here] % block]
        return shuffled


def load_corpus(name, folder="params/grammars", seed=0):
    """The Corpus that the file `folder`/`name`.yaml describes, with a seed.

    Raises ValueError for a file that is missing or wrong.
    """
    from latentree.data.ngrams import (  # these are corpora: they import this module
        Chain,
        HashedTables,
    )
    from latentree.data.sampler import GrammarProcess

    path = Path(folder) / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml"))) or "none"
        raise ValueError(f"corpus {name!r}: no file {path}; corpora there: {known}")
    content = read_yaml(path)
    if content.get("name") != name:
        raise ValueError(
            f"grammar file {path}: name is {content.get('name')!r}; give file and name the same"
        )
    kind = content.get("kind")
    if kind == "hashed n-gram":
        fields = checked(HashedFile, content, name).model_dump(exclude={"kind", "about"})
        return HashedTables(seed=seed, **fields)
    if kind == "n-gram":
        fields = checked(ChainFile, content, name).model_dump(exclude={"kind", "about"})
        parent = load_corpus(fields.pop("parent"), folder, seed)
        return Chain(parent, seed=seed, **fields)
    return GrammarProcess(Grammar(content), seed)


def pack(documents, documents_per_row, fields=("tokens",)):
    """Lay documents end to end in rows, `documents_per_row` to each: {field: (rows, longest)}, and lengths (rows,).

    Places past a row's end hold -1.
    """
    row = documents.token["document"] // documents_per_row
    rows = documents.count // documents_per_row
    lengths = torch.bincount(row, minlength=rows)
    column = torch.arange(len(row), device=row.device) - (lengths.cumsum(0) - lengths)[row]
    packed = {}
    for name in fields:
        value = documents.token[name]
        packed[name] = value.new_full((rows, int(lengths.max())), -1)
        packed[name][row, column] = value
    return packed, lengths


class Stream:
    """An endless stream of training batches: each row is an endless lane of documents, cut into windows.

    Row b of a batch reads documents b, b + total_rows, b + 2 total_rows, ... of the corpus, packed without a boundary
    mark; successive batches continue it. Which documents a row reads depends on nothing but `total_rows`, so any number
    of processes, each with its own rows, sees the same corpus.
    """

    def __init__(self, corpus, rows, context, device="cpu", first_row=0, total_rows=None):
        self.corpus, self.rows, self.context, self.device = corpus, rows, context, device
        self.first_row, self.total_rows = first_row, total_rows or rows
        self._next = 0  # documents each row has read
        self._buffer = torch.empty(rows, 0, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._shortest = 0
        self._used = 0

    def next_batch(self):
        """The next (rows, context) tokens, int64."""
        while self._shortest - self._used < self.context:
            self._refill()
        batch = self._buffer[:, self._used : self._used + self.context]
        self._used += self.context
        return batch

    def _refill(self):
        per_row = max(1, round(REFILL / (self.rows * self.corpus.mean_document_length)))
        lane = self.first_row + torch.arange(self.rows)
        place = lane[:, None] + (self._next + torch.arange(per_row)) * self.total_rows
        fresh = self.corpus.documents(
            self.corpus.training_ids(place.flatten()), self.device, detail=False
        )
        packed, lengths = pack(fresh, per_row)
        kept = self._buffer[:, self._used :]
        old = self._lengths - self._used
        buffer = torch.full(
            (self.rows, int((old + lengths).max())), -1, dtype=torch.int64, device=self.device
        )
        buffer[:, : kept.shape[1]] = kept[:, : buffer.shape[1]]
        row, column = (packed["tokens"] >= 0).nonzero(as_tuple=True)
        buffer[row, old[row] + column] = packed["tokens"][row, column]
        self._buffer, self._lengths, self._used = buffer, old + lengths, 0
        self._shortest = int(self._lengths.min())
        self._next += per_row

    def state_dict(self):
        """What is needed to go on exactly here: how many documents each row has read, and what is left of them."""
        left = [
            row[self._used : length].clone()
            for row, length in zip(self._buffer, self._lengths.tolist())
        ]
        return {"first_row": self.first_row, "next": self._next, "left": left}

    def load_state_dict(self, *states):
        """Go on where the streams that gave `states` stood, together or this one alone: each row where it was."""
        found = {
            state["first_row"] + i: (state["next"], row)
            for state in states
            for i, row in enumerate(state["left"])
        }
        mine = [found[self.first_row + i] for i in range(self.rows)]
        self._next, self._used = max(read for read, _ in mine), 0
        lanes = []
        for lane, (read, left) in enumerate(
            mine, self.first_row
        ):  # rows of other processes may have read less
            unread = lane + torch.arange(read, self._next) * self.total_rows
            fresh = (
                self.corpus.documents(
                    self.corpus.training_ids(unread), self.device, detail=False
                ).tokens
                if len(unread)
                else left[:0]
            )
            lanes.append(torch.cat([left.to(self.device), fresh.to(self.device)]))
        self._buffer = torch.nn.utils.rnn.pad_sequence(lanes, batch_first=True, padding_value=-1)
        self._lengths = torch.tensor([len(lane) for lane in lanes], device=self.device)
        self._shortest = int(self._lengths.min())


def windows(corpus, sequences, context, first=0, device="cpu", annotate=None):
    """Windows of whole documents from number `first` on: each row begins a document, and others follow until it is full.

    Of documents that share their latents only the first is taken, so that windows are independent of each other.

    Returns {field: (sequences, context)} for every field of the documents, those that `annotate(documents)` gives
    included (a dict of (tokens,) tensors).
    """
    per_row = max(1, int(context / corpus.mean_document_length) + 1)
    while True:
        needed = first - HELD_OUT + sequences * per_row
        if first >= HELD_OUT and corpus.held_out_limit and needed > corpus.held_out_limit:
            raise ValueError(
                f"{corpus.name}: {sequences} held-out sequences of {context} tokens need {needed} documents, but "
                f"exclude_held_out keeps {corpus.held_out_limit} out of training; ask for fewer"
            )
        documents = corpus.documents(corpus.apart(first, sequences * per_row), device)
        packed, lengths = pack(documents, per_row)
        if int(lengths.min()) >= context:
            break
        per_row += 1
    documents.token.update(annotate(documents) if annotate else {})
    packed, _ = pack(documents, per_row, tuple(documents.token))
    return {name: value[:, :context] for name, value in packed.items()}


def held_out(corpus, sequences, context, device="cpu", annotate=None):
    """`windows` of held-out documents. ValueError if the grammar keeps fewer of them apart from training."""
    return windows(corpus, sequences, context, HELD_OUT, device, annotate)
