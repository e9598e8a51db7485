"""A measurement along training: every checkpoint of a series through one function, into one tidy table."""

import hashlib
import json
import shutil
from pathlib import Path

import pandas as pd

from latentree.data.files import write_text, writing
from latentree.data.progress import Reporter

KEY = "measured.json"  # what the parts beside it are measurements of


def sweep(
    series, measure, table, key=None, device="cpu", progress=True, steps=None, **options
) -> pd.DataFrame:
    """Measure the checkpoints of a series, one in memory at a time; the table (rows of all steps) is written to `table`.

    `series` has `steps` and `load(step, device=..., **options)`. `measure(model)` returns a table, to which a first column
    `step` is added. `steps` chooses some.

    Each finished checkpoint is kept as a CSV file in a hidden folder beside `table`, and there it stays: a sweep that is
    started again, or whose series has grown, measures only what is new. `key` (anything JSON holds: the stimuli, their
    seed) says what is measured; when it, the series' own `identity` or this library has changed, everything is measured
    again.

    ValueError for a step without a checkpoint, or rows that already have a column `step`.
    """
    table = Path(table)
    steps = list(series.steps if steps is None else steps)
    missing = [step for step in steps if step not in series.steps]
    if missing or not steps:
        raise ValueError(
            f"steps = {missing or steps}: no such checkpoints; choose among {list(series.steps)}"
        )
    with writing(table):
        parts = parts_folder(
            table,
            {"key": key, "series": getattr(series, "identity", None), "library": library_digest()},
        )
    files = {step: parts / f"step-{step:08d}.csv" for step in steps}
    left = [step for step, file in files.items() if not file.exists()]
    report = Reporter(table.stem, len(steps), len(steps) - len(left), "checkpoints", progress)
    for number, step in enumerate(left, start=len(steps) - len(left) + 1):
        model = series.load(step, device=device, **options)
        rows = measure(model)
        if "step" in rows:
            raise ValueError(
                f"measure: its table {list(rows)} has a column step; leave it to the sweep"
            )
        with writing(files[step]):
            write_text(files[step], rows.assign(step=step)[["step", *rows]].to_csv(index=False))
        del model  # before the next one is loaded
        report(number, f"step {step}")
    report.close()
    whole = pd.concat([pd.read_csv(files[step]) for step in steps], ignore_index=True)
    with writing(table):
        write_text(table, whole.to_csv(index=False))
    return whole


def digest(tokens) -> str:
    """A hash of tokens (any shape), for a sweep's key."""
    return hashlib.sha256(tokens.cpu().long().numpy().tobytes()).hexdigest()[:16]


def library_digest() -> str:
    """A hash of this library's source."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def parts_folder(table: Path, identity: dict) -> Path:
    """The hidden folder of the parts of `table`, emptied if what is there measures something else."""
    folder = table.with_name(f".{table.stem}")
    text = json.dumps(identity, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    there = folder / KEY
    if folder.exists() and not (there.exists() and digest in there.read_text(encoding="utf-8")):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(there, json.dumps({"sha256": digest, "measured": identity}, indent=1, default=str))
    return folder
