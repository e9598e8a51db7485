"""What the file of a corpus (params/grammars/*.yaml) may say, checked field by field."""

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

LEVELS = ("corpus", "document", "section", "paragraph", "sentence")
END = "end"  # the role that closes every sentence: one token, the last of the vocabulary
Share = Annotated[float, Field(ge=0, le=1)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Role(_Fields):
    """The words of a role: how many, and the exponent of the Zipf law over their ranks (0: uniform)."""

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


class DocumentShape(_Fields):
    """Sections in a document, paragraphs in a section, sentences in a paragraph."""

    sections: int = Field(gt=0)
    paragraphs: int = Field(gt=0)
    sentences: int = Field(gt=0)

    def per_document(self, level):
        """How many units of `level` a document holds."""
        counts = {"document": 1, "section": self.sections}
        counts["paragraph"] = counts["section"] * self.paragraphs
        counts["sentence"] = counts["paragraph"] * self.sentences
        return counts[level]


class _CorpusFile(_Fields):
    name: str
    label: str = ""  # its name in figures, if not `name`
    about: str = ""


class GrammarFile(_CorpusFile):
    """A grammar, its words and its latents."""

    kind: Literal["PCFG", "flat", "static", "small release", "small release, flat"] = "PCFG"
    sentence: str
    roles: dict[str, Role]
    document: DocumentShape
    redraw: dict[Literal[*LEVELS], Share]
    habits: dict[str, str] = {}
    binding: Share = 0.0
    repetitions: int = Field(default=1, gt=0)
    exclude_held_out: int = Field(default=0, ge=0)

    @field_validator("roles")
    @classmethod
    def _end_is_no_role(cls, roles):
        if END in roles:
            raise ValueError(f"role {END!r} is added to every sentence; remove it from roles")
        return roles

    @field_validator("habits")
    @classmethod
    def _habits_lead_from_role_to_role(cls, habits, info):
        roles = info.data.get("roles", {})
        for role in [*habits, *habits.values()]:
            if role not in roles:
                raise ValueError(f"{role!r} is no role; name some of {', '.join(roles)}")
        for child in habits:
            ancestor = child
            for _ in range(len(habits) + 1):
                ancestor = habits.get(ancestor)
            if ancestor is not None:
                raise ValueError(f"the habits of {child!r} lead back in a circle; remove one")
        return habits

    @field_validator("binding")
    @classmethod
    def _binding_needs_habits(cls, binding, info):
        if binding > 0 and not info.data.get("habits", {}):
            raise ValueError("no habits say who follows whom; add 'habits: {verb: subject}'")
        return binding


class HashedFile(_CorpusFile):
    """The release's n-gram corpus: how many words and tables."""

    kind: Literal["hashed n-gram"]
    vocabulary_size: int = Field(default=1000, gt=1)
    tables: int = Field(default=1000, gt=0)


class ChainFile(_CorpusFile):
    """An order-n chain with the counts of a sample of its parent, the name of another grammar file."""

    kind: Literal["n-gram"]
    parent: str
    order: int = Field(default=3, gt=0)
    sample_tokens: int = Field(default=1_000_000, gt=0)


def checked(model, content, name):
    """`content` as a pydantic `model`. Raises ValueError, one line that names the first field that is wrong."""
    try:
        return model(**content)
    except ValidationError as error:
        first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    given = "" if first["type"] == "missing" else f" = {first['input']!r}"
    mend = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        mend = f"no such field; fields: {', '.join(model.model_fields)}"
    raise ValueError(f"grammar {name}: {field}{given}: {mend}")
