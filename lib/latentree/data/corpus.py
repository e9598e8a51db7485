"""Corpora by name, and the stream of training windows cut from them: nothing is written to disk."""

from pathlib import Path

import torch

from latentree.data import counter
from latentree.data.files import read_yaml
from latentree.data.grammar import Grammar
from latentree.data.grammar_file import ChainFile, HashedFile, checked
from latentree.data.ngrams import Chain, HashedTables
from latentree.data.sampler import HELD_OUT, GrammarProcess, apart

SHUFFLED_TOGETHER = (
    1 << 16
)  # documents whose order is shuffled as one block, where documents share latents
BLOCK_TOKENS = 1 << 17  # tokens sampled at a time


def load_process(name, grammars="params/grammars", seed=0):
    """The corpus that the file `grammars`/`name`.yaml describes, with a seed.

    `name` may also be a path to a file. Raises ValueError for a file that is missing or wrong.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else Path(grammars) / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml"))) or "none"
        raise ValueError(f"corpus {name!r}: no file {path}; corpora there: {known}")
    content = read_yaml(path)
    kind = content.pop("kind", "grammar")
    if kind == "grammar":
        return GrammarProcess(Grammar(content), seed)
    if kind == "hashed tables":
        return HashedTables(
            seed=seed, **checked(HashedFile, content, path.stem).model_dump(exclude={"about"})
        )
    if kind == "chain":
        fields = checked(ChainFile, content, path.stem).model_dump(exclude={"about"})
        parent = path.with_name(f"{fields['parent']}.yaml")
        if parent.is_file() and read_yaml(parent).get("kind", "grammar") != "grammar":
            raise ValueError(
                f"grammar file {path.name}: parent {fields['parent']!r} is no grammar; name a file of kind grammar"
            )
        return Chain(load_process(fields.pop("parent"), path.parent, seed), seed=seed, **fields)
    raise ValueError(
        f"grammar file {path.name}: kind {kind!r} is unknown; kinds: grammar, hashed tables, chain"
    )


def document_id(process, index):
    """The training document that stands at place `index` (int64 tensor) of the corpus.

    Where documents share latents, the order is shuffled within blocks, so that those which share lie far apart.
    """
    if process.repetitions == 1:
        return index
    block = SHUFFLED_TOGETHER - SHUFFLED_TOGETHER % process.repetitions
    key = counter.mix(torch.tensor(process.seed)) ^ counter.GOLDEN
    number = index // block
    order = {int(n): counter.shuffled(counter.subkey(key, n), block) for n in number.unique()}
    shuffled = torch.empty_like(index)
    for n, row in order.items():
        here = number == n
        shuffled[here] = n * block + row[index[here] % block]
    return shuffled


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

    def __init__(self, process, rows, context, device="cpu", first_row=0, total_rows=None):
        self.process, self.rows, self.context, self.device = process, rows, context, device
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
        per_row = max(1, round(BLOCK_TOKENS / (self.rows * self.process.mean_document_length)))
        lane = self.first_row + torch.arange(self.rows)
        place = lane[:, None] + (self._next + torch.arange(per_row)) * self.total_rows
        fresh = self.process.documents(
            document_id(self.process, place.flatten()), self.device, detail=False
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
                self.process.documents(
                    document_id(self.process, unread), self.device, detail=False
                ).tokens
                if len(unread)
                else left[:0]
            )
            lanes.append(torch.cat([left.to(self.device), fresh.to(self.device)]))
        self._buffer = torch.nn.utils.rnn.pad_sequence(lanes, batch_first=True, padding_value=-1)
        self._lengths = torch.tensor([len(lane) for lane in lanes], device=self.device)
        self._shortest = int(self._lengths.min())


def windows(process, sequences, context, first=0, device="cpu", annotate=None):
    """Windows of whole documents from number `first` on: each row begins a document, and others follow until it is full.

    Of documents that share their latents only the first is taken, so that windows are independent of each other.

    Returns {field: (sequences, context)} for every field of the documents, those that `annotate(documents)` gives
    included (a dict of (tokens,) tensors).
    """
    per_row = max(1, int(context / process.mean_document_length) + 1)
    while True:
        needed = first - HELD_OUT + sequences * per_row
        if first >= HELD_OUT and process.held_out_limit and needed > process.held_out_limit:
            raise ValueError(
                f"{process.name}: {sequences} held-out sequences of {context} tokens need {needed} documents, but "
                f"exclude_held_out keeps {process.held_out_limit} out of training; ask for fewer"
            )
        documents = process.documents(apart(process, first, sequences * per_row), device)
        packed, lengths = pack(documents, per_row)
        if int(lengths.min()) >= context:
            break
        per_row += 1
    documents.token.update(annotate(documents) if annotate else {})
    packed, _ = pack(documents, per_row, tuple(documents.token))
    return {name: value[:, :context] for name, value in packed.items()}


def held_out(process, sequences, context, device="cpu", annotate=None):
    """`windows` of held-out documents. ValueError if the grammar keeps fewer of them apart from training."""
    return windows(process, sequences, context, HELD_OUT, device, annotate)
