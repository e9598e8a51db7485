"""Results as claims with evidence: what the paper says, what was measured here, and a verdict by a stated rule.

A verdict is computed from a claim's numbers by one of RULES and is never typed in. The rules ask about the interval
(low, high), not about the value, so a wide interval cannot reproduce anything. `null` is the value that chance or the
control gives; `margin` is how far from it counts; `threshold` is a number that the paper or the theory states.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas
from IPython import get_ipython
from pydantic import BaseModel, Field, FiniteFloat, ValidationError, computed_field, model_validator

from latentree.data.files import write_text, writing
from latentree.run.record import version_of

RULES = {
    "low > null + margin": lambda low, high, null, margin, threshold: low > null + margin,
    "high < null - margin": lambda low, high, null, margin, threshold: high < null - margin,
    "high < null + margin": lambda low, high, null, margin, threshold: high < null + margin,
    "null - margin < low and high < null + margin": lambda low, high, null, margin, threshold: (
        null - margin < low and high < null + margin
    ),
    "low >= threshold": lambda low, high, null, margin, threshold: low >= threshold,
    "high <= threshold": lambda low, high, null, margin, threshold: high <= threshold,
}

Verdict = Literal["reproduced", "not reproduced", "not testable here"]


def verdict(
    value, low, high, null, rule: str, margin: float = 0.0, threshold: float | None = None
) -> Verdict:
    """What the rule says of these numbers; without a value the claim was not testable."""
    if value is None:
        return "not testable here"
    return "reproduced" if RULES[rule](low, high, null, margin, threshold) else "not reproduced"


def executing_cell() -> int | None:
    """The number n of the notebook's cell In [n] that is being executed; none outside of notebooks."""
    shell = (
        get_ipython()
    )  # which may count the cell before or after it is executed, but keeps its text before
    return len(shell.user_ns["In"]) - 1 if shell else None


class Claim(BaseModel, extra="forbid", frozen=True):
    """One claim of the paper and its evidence; value, low, high, null, margin and threshold share one unit."""

    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    source: str = Field(min_length=1, description="the paper's figure or theorem")
    statement: str = Field(min_length=1)
    definition: Literal["field", "as released"]
    corpus: str = Field(min_length=1)
    value: FiniteFloat | None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    null: FiniteFloat | None = None
    n: int = Field(ge=0, description="independent units behind the interval")
    seeds: list[int]
    rule: Literal[tuple(RULES)]
    margin: FiniteFloat = Field(default=0.0, ge=0)
    threshold: FiniteFloat | None = None
    reason: str = ""
    cell: int | None = Field(
        default_factory=executing_cell, description="of the notebook, In [cell], that judges it"
    )

    def __init__(self, **fields):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            got = f" = {first['input']!r}" if where and first["type"] != "missing" else ""
            message = first["msg"].removeprefix("Value error, ")
            raise ValueError(
                f"claim {fields.get('id')!r}: {where}{got}: {message}".replace(": : ", ": ")
            ) from None

    @model_validator(mode="after")
    def has_evidence(self):
        if self.value is None:
            if not self.reason:
                raise ValueError("value is None: give the reason why it was not testable")
            return self
        needed = ["low", "high"] + [name for name in ("null", "threshold") if name in self.rule]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing: the rule `{self.rule}` needs it")
        if self.low > self.high:
            raise ValueError(f"low = {self.low} is above high = {self.high}: exchange them")
        if not self.n or not self.seeds:
            raise ValueError(f"n = {self.n}, seeds = {self.seeds}: a measured value has both")
        return self

    @computed_field
    @property
    def verdict(self) -> Verdict:
        return verdict(
            self.value, self.low, self.high, self.null, self.rule, self.margin, self.threshold
        )


def write_results(out, notebook: str, profile: str, claims: Sequence[Claim]) -> Path:
    """Write the claims of `notebook` ("03_induction_heads") to out/results/03.json, whole or not at all."""
    ids = [claim.id for claim in claims]
    for name in ids:
        if ids.count(name) > 1:
            raise ValueError(f"claim {name!r} is there twice: give each its own id")
    results = {
        "notebook": notebook,
        "profile": profile,
        "version": version_of(profile),
        "claims": [claim.model_dump() for claim in claims],
    }
    target = Path(out) / "results" / f"{notebook.split('_')[0]}.json"
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(
            target, json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        )
    return target


def show(claims: Sequence[Claim]) -> pandas.DataFrame:
    """The claims as a table, one row each, for the last cell of a notebook."""
    pandas.set_option("display.max_colwidth", None)  # statements are read, not glanced at
    columns = ["statement", "corpus", "value", "low", "high", "null", "n", "rule", "verdict"]
    rows = [claim.model_dump() for claim in claims]
    return pandas.DataFrame(rows, columns=["id", *columns]).set_index("id")
