"""What a grammar file (params/grammars/*.yaml) may say, checked field by field."""

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

LEVELS = ("corpus", "document", "section", "paragraph", "sentence")


class Role(BaseModel):
    """The words of a role: how many, and the exponent of the Zipf law over their ranks (0: uniform)."""

    model_config = ConfigDict(extra="forbid", strict=True)
    size: int = Field(gt=0, lt=1 << 24)
    zipf: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @property
    def frequencies(self):
        """Probability of each rank (size,): proportional to rank**-zipf."""
        weights = np.arange(1, self.size + 1, dtype=float) ** -self.zipf
        return weights / weights.sum()

    @property
    def has_map(self):
        """A uniform role looks the same under every map of ranks to tokens, so it has none."""
        return self.zipf > 0 and self.size > 1


class DocumentShape(BaseModel):
    """Sections in a document, paragraphs in a section, sentences in a paragraph."""

    model_config = ConfigDict(extra="forbid", strict=True)
    sections: int = Field(gt=0)
    paragraphs: int = Field(gt=0)
    sentences: int = Field(gt=0)

    def per_document(self, level):
        """How many units of `level` a document holds."""
        counts = (self.sections, self.paragraphs, self.sentences)
        return int(np.prod(counts[: LEVELS.index(level) - 1]))


class GrammarFile(BaseModel):
    """The fields of a grammar file (params/grammars/*.yaml)."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    kind: Literal["PCFG", "flat", "static", "small release", "small release, flat"] = "PCFG"
    label: str = ""
    about: str
    sentence: str
    roles: dict[str, Role]
    shared: float = Field(default=0.0, ge=0, lt=1)
    document: DocumentShape
    redraw: dict[str, float]
    binding: float = Field(default=0.0, ge=0, le=1)
    habits: dict[str, str] = {}
    repetitions: int = Field(default=1, gt=0)
    exclude_held_out: int = Field(default=0, ge=0)


class HashedFile(BaseModel):
    """The fields of a file of kind "hashed n-gram"."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    kind: str
    label: str = ""
    about: str = ""
    vocabulary_size: int = Field(default=1000, gt=1)
    tables: int = Field(default=1000, gt=0)


class ChainFile(BaseModel):
    """The fields of a file of kind "n-gram": a chain with the counts of a sample of its parent."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    kind: str
    label: str = ""
    about: str = ""
    parent: str
    order: int = Field(default=3, gt=0)
    sample_tokens: int = Field(default=1_000_000, gt=0)


def checked(model, content, name):
    """`content` as a pydantic `model`; every fault becomes a one-line ValueError naming the field and its value."""
    try:
        return model(**content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        given = "" if first["type"] == "missing" else f", got {first['input']!r}"
        mend = (
            f"remove it (fields: {', '.join(model.model_fields)})"
            if first["type"] == "extra_forbidden"
            else first["msg"]
        )
        raise ValueError(f"grammar {name}: {field}{given}: {mend}") from None
