"""A text as a corpus, so that every measurement takes it as it takes sampled ones."""

import ast
import json
import re
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.nn.utils.rnn import pad_sequence

from latentree.data.corpus import HELD_OUT, Corpus, Documents, side_by_side

_LIBRARY = sorted(Path(ast.__file__).parent.glob("*.py"))  # the modules that Python brings along


class Text(Corpus):
    """Documents of a text, tokenised; each ends with the tokenizer's end token."""

    def __init__(self, name: str, documents: list[list[int]], vocabulary_size: int, end: int):
        self._documents = [torch.as_tensor(document) for document in documents]
        self.count = len(documents)
        length = sum(map(len, documents)) / len(documents)
        content = [document.tolist() for document in self._documents]
        super().__init__(name, "OLMo", vocabulary_size, end, length, content)

    def documents(self, ids, device="cpu", detail=True) -> Documents:
        """Documents by number, counted from HELD_OUT on and round the text.

        Raises ValueError if a document would come twice.
        """
        place = ((torch.as_tensor(ids) - HELD_OUT) % self.count).tolist()
        if len(set(place)) < len(place):
            raise ValueError(
                f"text {self.name}: {len(place)} documents are asked for, it has {self.count}; "
                "give a longer text, or fewer or shorter sequences"
            )
        rows = [self._documents[at] for at in place]
        return side_by_side({"tokens": pad_sequence(rows, True, padding_value=-1).to(device)})


def load_text(source, tokenizer, documents, vocabulary_size=0, shortest=16, longest=4096) -> Text:
    """The first documents of `source` with at least `shortest` tokens, cut off after `longest`.

    `source` is a .txt file (documents between empty lines), a .jsonl file (field text), "python"
    for English that every Python brings along, or a data set on the hub, streamed: "allenai/c4" or,
    with its configuration, "allenai/c4:en". `vocabulary_size` is the model's, where it is larger
    than the tokenizer's (many are padded).
    Raises ValueError for a tokenizer without an end token, or less than 2 documents.
    """
    end = tokenizer.eos_token_id
    if end is None:
        told = f"tokenizer {tokenizer.name_or_path}: has no end token; choose one that has"
        raise ValueError(told)
    kept = []
    for text in _texts(source):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"][:longest]
        if len(tokens) + 1 >= shortest:
            kept.append([*tokens, end])
        if len(kept) == documents:
            break
    if len(kept) < 2:
        raise ValueError(
            f"text = {source!r}: has {len(kept)} documents of {shortest} tokens or more; give a "
            "longer text"
        )
    return Text(Path(source).stem, kept, max(len(tokenizer), vocabulary_size), end)


def _texts(source):
    """The texts of the documents of a source, one after the other."""
    path = Path(source).expanduser()
    if source == "python":
        yield from _manual()
    elif path.suffix in (".txt", ".jsonl") and not path.is_file():
        raise ValueError(f"text = {source!r}: there is no such file; give one, or python")
    elif path.suffix == ".txt":
        yield from filter(str.strip, path.read_text(encoding="utf-8").split("\n\n"))
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for line in filter(str.strip, lines):
                yield json.loads(line)["text"]
    else:
        from datasets import load_dataset  # takes seconds, and only data sets of the hub need it

        name, _, configuration = source.partition(":")
        for row in load_dataset(name, configuration or None, split="validation", streaming=True):
            yield row["text"]


def _docstrings(file):
    """What a module, its classes and its functions say of themselves, by empty lines."""
    parts = ast.walk(ast.parse(file.read_bytes()))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    told = [ast.get_docstring(part) for part in parts if isinstance(part, documented)]
    return "\n\n".join(filter(None, told))


def _manual(letters=800):
    """Prose of Python's manual and modules, without code: documents of so many letters or more."""
    for section in chain(topics.values(), map(_docstrings, _LIBRARY)):
        prose = ""
        for paragraph in section.split("\n\n"):
            words = " ".join(paragraph.split())
            plain = sum(map(str.isalpha, words)) > 0.75 * len(words)
            if paragraph[:1].isupper() and words.endswith(".") and plain:
                prose += re.sub(r'[*`"]', "", words) + "\n"
            if len(prose) > letters:
                yield prose
                prose = ""
