"""What a grammar file (params/grammars/*.yaml) may say, checked field by field."""

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

KINDS = ("PCFG", "flat", "static", "bank", "small release", "small release, flat")
LEVELS = ("corpus", "document", "section", "paragraph", "sentence")
END = "end"  # the role that closes every sentence: one token, the last of the vocabulary
_Share = Annotated[float, Field(ge=0, le=1)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Role(_Fields):
    """A role's words: how many, and the exponent of the Zipf law over their ranks (0: uniform)."""

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


class GrammarFile(_Fields):
    """A grammar, its words and its latents.

    - sentence: productions, as nltk writes them: S -> A 'role' [0.5] | B [0.5].
    - redraw: the share of the maps and habits that is drawn afresh at a level.
    - habits: {role: the role that it follows}, which a word does with probability `binding`.
    - repetitions: how many documents in a row have the same latents.
    - bank: of how many fixed latents one is drawn where `redraw` says so; 0: any. Habits are then
      one to one, so that every word of a role is as frequent under each latent.
    - exclude_held_out: how many held-out documents share no sentence with training.
    """

    name: str
    kind: Literal[*KINDS] = "PCFG"
    label: str = ""
    about: str = ""
    sentence: str
    roles: dict[str, Role]
    document: DocumentShape
    redraw: dict[Literal[*LEVELS], _Share]
    habits: dict[str, str] = {}
    binding: _Share = 0.0
    repetitions: int = Field(default=1, gt=0)
    bank: int = Field(default=0, ge=0, lt=1 << 10)
    exclude_held_out: int = Field(default=0, ge=0)

    @field_validator("roles")
    def _end_is_no_role(cls, roles):
        if END in roles:
            raise ValueError(f"role {END!r} is added to every sentence; remove it from roles")
        return roles

    @field_validator("habits")
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
    def _binding_needs_habits(cls, binding, info):
        if binding > 0 and not info.data.get("habits", {}):
            raise ValueError("no habits say who follows whom; add 'habits: {verb: subject}'")
        return binding

    @field_validator("bank")
    def _bank_holds_permutations(cls, bank, info):
        roles, habits = info.data.get("roles", {}), info.data.get("habits", {})
        if not bank:
            return bank
        if [share for share in info.data.get("redraw", {}).values() if share > 0] != [1.0]:
            raise ValueError("a latent is drawn as a whole, at one level; redraw one, by 1.0")
        if any(role.zipf > 0 for role in roles.values()):
            raise ValueError("holds no maps of frequencies; set zipf of all roles to 0")
        for child, parent in habits.items():
            if roles[child].size != roles[parent].size:
                raise ValueError(f"habits are one to one; give {child} and {parent} one size")
        return bank


def checked(content):
    """The GrammarFile of a mapping. Raises ValueError, a line on the first field that is wrong."""
    try:
        return GrammarFile(**content)
    except ValidationError as error:
        told = first_fault(error, content.get("name"), GrammarFile.model_fields)
        raise ValueError(told) from None


def first_fault(error, name, fields) -> str:
    """A line on the first of the `fields` of a grammar file that a ValidationError tells of."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    given = "" if first["type"].startswith("missing") else f" = {first['input']!r}"
    mend = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        mend = f"no such field; fields: {', '.join(fields)}"
    return f"grammar {name}: {field}{given}: {mend}"
