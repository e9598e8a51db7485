"""What a corpus is, corpora by name, and rows of tokens cut from them: nothing is stored."""

import hashlib
import json
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from pathlib import Path

import torch
from pydantic import ConfigDict, ValidationError, validate_call

from latentree.data import counter
from latentree.data.files import read_yaml
from latentree.data.grammar import Grammar
from latentree.data.grammar_file import KINDS, first_fault

# What a grammar file gives to a corpus without a grammar is of the types that this declares.
strictly = validate_call(
    config=ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
)
HELD_OUT = 1 << 40  # document ids from here on are held out: no training document has one
_BLOCK = 1 << 16  # documents whose order is shuffled together, where documents share latents
_REFILL = {"cpu": 1 << 17, "cuda": 1 << 21}  # tokens that a stream samples at a time


@dataclass
class Documents:
    """Documents laid end to end: the fields of `token` have an entry per token, int64 (tokens,).

    - token: tokens; document (index into the ids asked for), position (in the document), and, from
      a grammar, role, rank, sentence, paragraph, section (numbered within the document), place (in
      the sentence), shape (index into `shapes`), unit (row of `maps` and `habits`).
    - count: how many documents; shapes: those of their sentences (grammar.Shape).
    - maps[role] (units, size): the token of each rank; habits[child] (units, parent's size): the
      child's rank that each parent's rank calls for.
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


def side_by_side(rows) -> Documents:
    """Documents from fields (documents, longest), one a row, tokens -1 past its end."""
    kept = rows["tokens"] >= 0
    token = {name: field[kept] for name, field in rows.items()}
    token["document"] = kept.nonzero()[:, 0]
    token["position"] = position_within(token["document"])
    return Documents(token, len(kept))


class Corpus(ABC):
    """Text of any kind: each document is a pure function of its number, so none is stored.

    - name, seed; kind ("PCFG", "flat", ...: its colour in figures) and label (its name there).
    - vocabulary_size; end, the token that closes a sentence or text (None: there is none);
      mean_document_length in tokens.
    - repetitions: how many documents in a row share their latents.
    - held_out_limit: how many held-out documents share no sentence with training (None: not asked).
    - grammar: the Grammar that its sentences follow, or None; without one, callers: how many of the
      words, the first ones, say which word mostly follows them in a document (None: all).
    """

    repetitions, held_out_limit, grammar, callers = 1, None, None, None

    def __init__(
        self, name, kind, vocabulary_size, end, mean_document_length, content, seed=0, label=""
    ):
        self.name, self.kind, self.label, self.seed = name, kind, label or name, seed
        self.vocabulary_size, self.end = vocabulary_size, end
        self.mean_document_length = mean_document_length
        self._content, self._key = content, counter.mix(torch.tensor(seed))

    @abstractmethod
    def documents(self, ids, device="cpu", detail=True) -> Documents:
        """Documents by number, `ids` (documents,) >= 0; from HELD_OUT on they are held out.

        Without `detail` only the fields tokens and document need be filled.
        """

    def _keys(self, ids, device):
        """A key for each document by its number, from which all of it is drawn: (documents,)."""
        ids = torch.as_tensor(ids, dtype=torch.int64, device=device)
        if len(ids) == 0 or ids.min() < 0:
            raise ValueError(f"{self.name}: ids {ids.tolist()[:3]}; ask for at least one id >= 0")
        return counter.subkey(self._key.to(device), ids)

    @cached_property
    def words(self) -> list[str]:
        """A word for each token, to be shown: w0, w1, ..., unless the corpus has better ones."""
        return [f"w{token}" for token in range(self.vocabulary_size)]

    @cached_property
    def digest(self):
        """Eight hex digits of all but the seed that decides what the documents are."""
        return hashlib.sha256(json.dumps(self._content).encode()).hexdigest()[:8]

    def apart(self, first, count):
        """Numbers (count,) of documents from `first` on, no two of which share their latents."""
        return first + torch.arange(count) * self.repetitions

    def training_ids(self, place):
        """Numbers of the documents that training reads at places (int64, any shape) of the text.

        Those which share latents lie far apart: documents are shuffled within blocks.
        """
        if self.repetitions == 1:
            return place
        block = _BLOCK - _BLOCK % self.repetitions
        number, shuffled = place // block, torch.empty_like(place)
        for n in number.unique().tolist():
            here = number == n
            order = counter.shuffled(counter.subkey(self._key ^ counter.GOLDEN, n), block)
            shuffled[here] = n * block + order[place[here] % block]
        return shuffled


def load_corpus(name, folder="params/grammars", seed=0) -> Corpus:
    """The corpus that the file `folder`/`name`.yaml describes, with a seed.

    Raises ValueError for a file that is missing or wrong.
    """
    from latentree.data.filtered import FilteredTree  # which, as these, imports this module
    from latentree.data.ngrams import Chain, HashedTables, Successors
    from latentree.data.sampler import GrammarProcess

    kinds = {"n-gram": Chain, "hashed n-gram": HashedTables, "treeless": Successors}
    kinds["filtered tree"] = FilteredTree
    content = _content(name, folder)
    kind = content.pop("kind", "PCFG")
    if kind in KINDS:
        return GrammarProcess(Grammar(content | {"kind": kind}), seed)
    if kind not in [*kinds]:
        known = ", ".join((*KINDS, *kinds))
        raise ValueError(f"grammar {name}: kind = {kind!r}: choose one of {known}")
    content.pop("about", None)
    fields = signature(kinds[kind]).parameters.keys() - {"seed"}
    if unknown := content.keys() - fields:
        known = ", ".join(sorted(fields))
        raise ValueError(f"grammar {name}: {min(unknown)}: no such field; fields: {known}")
    if "parent" in content:  # which is no chain of a chain, or of itself
        content["parent"] = GrammarProcess(Grammar(_content(content["parent"], folder)), seed)
    try:
        return kinds[kind](seed=seed, **content)
    except ValidationError as error:
        raise ValueError(first_fault(error, name, fields)) from None


def _content(name, folder) -> dict:
    """What a grammar file says. ValueError if it is missing, or its name is another."""
    path = Path(folder) / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ValueError(f"corpus {name!r}: no file {path}; corpora there: {known}")
    content = read_yaml(path)
    if content.get("name") != name:
        raise ValueError(
            f"grammar file {path}: name is {content.get('name')!r}; give file and name the same"
        )
    return content


class Stream:
    """Training batches without end, (rows, context) tokens each, cut from a corpus in windows.

    Row b reads documents b, b + total_rows, b + 2 total_rows, ... of the corpus, one after the
    other without a boundary mark: any number of processes, each with its own rows, sees the same.
    With packing `documents` each window begins with a document, the next ones fill it up, and the
    one that its end cuts off begins the next window: all is read but what a document says after its
    first `context` tokens. With packing `stream` windows follow each other wherever they end.
    """

    def __init__(
        self, corpus, rows, context, device="cpu", packing="documents", first_row=0, total_rows=None
    ):
        self.corpus, self.rows, self.context, self.device = corpus, rows, context, device
        self.packing, self.total_rows = packing, total_rows or rows
        self._row = first_row + torch.arange(rows)[:, None]
        self.load_state_dict({"at": [(0, 0)] * rows})

    def next_batch(self):
        """The next (rows, context) tokens, int64."""
        if self._used == len(self._batches):
            self._refill()
        self._used += 1
        return self._batches[self._used - 1]

    def state_dict(self):
        """Where each row stands: the number of its document, and a place in that."""
        return {"at": [begins[self._used] for begins in self._begins]}

    def load_state_dict(self, state):
        """Go on where the stream of these rows stood that gave `state`."""
        self._begins, self._batches, self._used = [[at] for at in state["at"]], [], 0

    def _refill(self):
        """Sample the next documents of each row and cut them into windows, as many in each row."""
        at = self.state_dict()["at"]
        wanted = _REFILL[torch.device(self.device).type]
        per_row, count = max(1, round(wanted / (self.rows * self.corpus.mean_document_length))), 0
        while count == 0:
            place = torch.tensor([document for document, _ in at])[:, None] + torch.arange(per_row)
            ids = self.corpus.training_ids((self._row + place * self.total_rows).flatten())
            documents = self.corpus.documents(ids, self.device, detail=False)
            lengths = torch.bincount(documents.token["document"], minlength=len(ids))
            ends = lengths.view(self.rows, per_row).cumsum(1).tolist()
            cuts = [self._cut(row, begin) for row, (_, begin) in zip(ends, at)]
            count = min(map(len, cuts)) - 1
            per_row *= 2
        lanes = documents.tokens.split([row[-1] for row in ends])
        batches, self._begins, self._used = [], [], 0
        for lane, cut, (first, _) in zip(lanes, cuts, at):
            windows = torch.tensor([begin for begin, _, _ in cut[:count]], device=lane.device)
            batches.append(lane[windows[:, None] + torch.arange(self.context, device=lane.device)])
            self._begins.append([(first + document, place) for _, document, place in cut])
        self._batches = torch.stack(batches, 1)

    def _cut(self, ends, begin):
        """Where windows begin in documents with these ends, the one after the last included.

        Each is (token, document, place in the document).
        """
        begins, document = [(begin, 0, begin)], 0
        while begin + self.context <= ends[-1]:
            begin += self.context
            if self.packing == "documents":
                document = max(document + 1, bisect_right(ends, begin))
                begin = ends[document - 1]
            else:
                document = bisect_right(ends, begin)
            begins.append((begin, document, begin - (ends[document - 1] if document else 0)))
        return begins


def windows(corpus, sequences, context, first=0, device="cpu", annotate=None):
    """Windows of documents from number `first` on: one begins each row, others fill it up.

    Of documents that share their latents only the first is taken, so that windows are independent.
    Returns {field: (sequences, context)} of the documents' fields and those of the dict that
    `annotate(documents)` gives. ValueError for more held-out text than is kept out of training.
    """
    per_row, lengths = int(context / corpus.mean_document_length), [0]
    while min(lengths) < context:
        per_row += 1
        needed = first - HELD_OUT + sequences * per_row
        if first >= HELD_OUT and corpus.held_out_limit and needed > corpus.held_out_limit:
            raise ValueError(
                f"{corpus.name}: {sequences} held-out sequences of {context} tokens need {needed} "
                f"documents, but exclude_held_out keeps {corpus.held_out_limit} out of training; "
                "ask for fewer"
            )
        documents = corpus.documents(corpus.apart(first, sequences * per_row), device)
        row = documents.token["document"] // per_row
        lengths = torch.bincount(row).tolist()
    if annotate:
        documents.token.update(annotate(documents))
    found = {}
    for name, value in documents.token.items():
        found[name] = torch.stack([part[:context] for part in value.split(lengths)])
    return found


def held_out(corpus, sequences, context, device="cpu", annotate=None):
    """`windows` of held-out documents."""
    return windows(corpus, sequences, context, HELD_OUT, device, annotate)
