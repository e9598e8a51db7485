"""A text as a corpus: the same interface as the sampled corpora, so that every measurement takes either.

A source is a text file (documents between empty lines), a .jsonl file (field text), or a data set on the hub, streamed:
"allenai/c4" or, with its configuration, "allenai/c4:en".
"""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from latentree.data.corpus import HELD_OUT, Corpus, Documents, position_within


class Text(Corpus):
    """Documents of a text, tokenised; each ends with the tokenizer's end token."""

    def __init__(self, name: str, documents: list[list[int]], vocabulary_size: int, end: int):
        lengths = [len(document) for document in documents]
        super().__init__(
            name=name,
            kind="OLMo",
            vocabulary_size=vocabulary_size,
            end=end,
            mean_document_length=sum(lengths) / len(lengths),
            content=[list(map(int, document)) for document in documents],
        )
        self.count = len(documents)
        self._lengths = torch.tensor(lengths)
        self._begins = self._lengths.cumsum(0) - self._lengths
        self._tokens = torch.from_numpy(np.concatenate(documents))

    def documents(self, ids, device="cpu", detail=True) -> Documents:
        """Documents by number, counted from HELD_OUT on and round the text. ValueError for more of them than it has."""
        place = (torch.as_tensor(ids) - HELD_OUT) % self.count
        if len(place.unique()) < len(place):
            raise ValueError(
                f"text {self.name}: {len(place)} documents are asked for, it has {self.count}; give a longer "
                "text, or fewer or shorter sequences"
            )
        document = torch.arange(len(place)).repeat_interleave(self._lengths[place])
        position = position_within(document)
        tokens = self._tokens[self._begins[place][document] + position]
        return Documents(
            {
                "tokens": tokens.to(device),
                "document": document.to(device),
                "position": position.to(device),
            },
            len(place),
        )


def load_text(
    source: str,
    tokenizer,
    documents: int,
    vocabulary_size: int = 0,
    shortest: int = 16,
    longest: int = 4096,
) -> Text:
    """The first `documents` documents of `source` with at least `shortest` tokens, cut off after `longest`.

    `vocabulary_size` is the model's, where it is larger than the tokenizer's (many are padded).

    ValueError for a source that is not there, cannot be reached or is not text, a tokenizer without an end token, or less
    than 2 documents.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            f"tokenizer of {tokenizer.name_or_path}: has no end token; give a model whose tokenizer has one"
        )
    texts = _of_file(Path(source)) if Path(source).suffix in (".txt", ".jsonl") else _of_hub(source)
    tokens = (
        tokenizer(text, add_special_tokens=False)["input_ids"][:longest] + [end] for text in texts
    )
    kept = list(islice((row for row in tokens if len(row) >= shortest), documents))
    if len(kept) < 2:
        raise ValueError(
            f"text = {source!r}: has {len(kept)} documents of {shortest} tokens or more; give a longer text"
        )
    return Text(Path(source).stem, kept, max(len(tokenizer), vocabulary_size), end)


def _of_file(path):
    if not path.is_file():
        raise ValueError(
            f"text = {str(path)!r}: no such file; name a .txt or .jsonl file, or a data set such as allenai/c4:en"
        )
    with path.open(encoding="utf-8") as lines:
        try:
            if path.suffix == ".jsonl":
                yield from (json.loads(line)["text"] for line in lines if line.strip())
            else:
                yield from (text for text in lines.read().split("\n\n") if text.strip())
        except (ValueError, KeyError, TypeError) as error:  # UnicodeDecodeError is a ValueError
            mend = "give text in UTF-8, documents between empty lines, or one JSON object with the field text on each line"
            raise ValueError(
                f"text = {str(path)!r}: cannot be read ({type(error).__name__}: {error}); {mend}"
            ) from None


def _of_hub(source):
    name, _, configuration = source.partition(":")
    try:
        from datasets import load_dataset  # takes seconds, and only data sets of the hub need it

        rows = load_dataset(name, configuration or None, split="validation", streaming=True)
        yield from (row["text"] for row in rows)
    except ImportError:
        raise ValueError(
            f"text = {source!r}: reading data sets of the hub needs the package datasets; "
            "pip install 'latentree[text]', or give a .txt or .jsonl file"
        ) from None
    except Exception as error:  # whatever the network, the hub or the data set's format raises
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        mend = (
            "accept its licence and set HF_TOKEN"
            if "is a gated dataset" in reason
            else "connect to the network, mend the name, choose a data set with the field text"
        )
        raise ValueError(
            f"text = {source!r}: cannot be streamed ({reason}); {mend}, or give a .txt or .jsonl file"
        ) from None
