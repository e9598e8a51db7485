"""A claim: an interval, and the region in which it must lie.

A verdict is computed, never typed in. It asks about the whole interval: a wide one decides nothing.
"""

from dataclasses import asdict, dataclass
from typing import Literal

import pandas as pd


@dataclass(frozen=True)
class Claim:
    """One statement with its evidence; all numbers share one unit.

    `interval` is (value, low, high), or None where nothing could be measured, which needs a
    `reason`. The claim holds if all of it lies above `above` and below `below`, those that are
    given. `null` is what chance or the control gives; `n` counts the independent units that the
    interval is `over`; `source` is a figure, a theorem or a reference; `definition` whether the
    field's score is meant or the release's; `whose`: the paper's claim, one about a control, or
    ours; `paper` the paper's own number. ValueError without a region or without evidence.
    """

    id: str
    source: str
    statement: str
    corpus: str
    interval: tuple[float, float, float] | None
    above: float | None = None
    below: float | None = None
    null: float | None = None
    n: int = 0
    seeds: tuple[int, ...] | list[int] = ()
    over: str = "sequences"
    definition: Literal["field", "as released"] = "field"
    whose: Literal["paper", "control", "ours"] = "paper"
    reason: str = ""
    paper: str = ""

    def __post_init__(self):
        if self.interval is None:
            if not self.reason:
                raise ValueError(f"claim {self.id}: interval is None; give the reason")
            return
        if self.above is None and self.below is None:
            raise ValueError(f"claim {self.id}: has no region; give above or below")
        _, low, high = self.interval
        if not low <= high:
            raise ValueError(f"claim {self.id}: interval {low} to {high} is none; give numbers")
        if not self.n or not len(self.seeds):
            raise ValueError(f"claim {self.id}: n = {self.n}, seeds = {self.seeds}; give both")

    @property
    def holds(self) -> bool:
        """Whether the whole interval lies in the region."""
        return self.verdict in ("present", "as predicted")

    @property
    def verdict(self) -> str:
        """What the region says of the interval: whether all of it lies inside, or all outside.

        A phenomenon of the paper's is present, or absent; what a control or we say is as predicted,
        or contradicted. Else it is undecided.
        """
        if self.interval is None:
            return "not tested"
        _, low, high = self.interval
        above, below = self.above, self.below
        inside = [above is None or low > above, below is None or high < below]
        outside = [above is not None and high <= above, below is not None and low >= below]
        phenomenon = self.whose == "paper" and below is None
        if all(inside):
            return "present" if phenomenon else "as predicted"
        if any(outside):
            return "absent" if phenomenon else "contradicted"
        return "undecided"

    @property
    def in_words(self) -> str:
        """The statement, its verdict and its interval as one sentence of Markdown."""
        if self.interval is None:
            return f"{self.statement}: **{self.verdict}**, {self.reason}."
        value, low, high = self.interval
        evidence = f"{value:.2g} [{low:.2g}, {high:.2g}] over {self.n} {self.over}"
        return f"{self.statement}, on {self.corpus}: **{self.verdict}**, {evidence}."

    def as_dict(self) -> dict:
        """All fields as plain JSON values: the interval as value, low, high, and the verdict."""
        fields = asdict(self)
        interval = fields.pop("interval") or (None, None, None)
        fields |= dict(zip(("value", "low", "high"), interval))
        for name in ("value", "low", "high", "above", "below", "null"):
            fields[name] = None if fields[name] is None else float(fields[name])
        fields |= {"n": int(self.n), "seeds": [int(seed) for seed in self.seeds]}
        return fields | {"verdict": self.verdict}


def claims_table(claims) -> pd.DataFrame:
    """The claims, one row each, as a notebook shows them at its end."""
    columns = "statement corpus value low high null above below n paper verdict".split()
    return pd.DataFrame([claim.as_dict() for claim in claims]).set_index("id")[columns]
