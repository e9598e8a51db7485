"""A measurement along training: one function on every checkpoint of a series, into one table."""

import hashlib
import json
import shutil
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from latentree.data.files import write_text


def sweep(series, measure, table, key=None, steps=None, **options) -> pd.DataFrame:
    """Measure a series' checkpoints, one in memory at a time; write all rows to `table`.

    `series` has `steps`, `identity` and `load(step, **options)`; `steps` chooses some.
    `measure(model)` returns a table, to which a first column `step` is added.

    Each measured checkpoint is kept as a file in the hidden folder .TABLE, so that a sweep that is
    started again, or whose series has grown, measures only what is new. `key` (anything JSON holds:
    the stimuli, their seed) says what is measured; when it, the series' identity or this library
    has changed, everything is measured again. ValueError for a step without a checkpoint.
    """
    table = Path(table)
    steps = list(series.steps if steps is None else steps)
    missing = sorted(set(steps) - set(series.steps))
    if missing or not steps:
        raise ValueError(f"steps = {missing}: have no checkpoints; choose among {series.steps}")
    measured = {"key": key, "series": series.identity, "library": _library()}
    name = hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:16]
    parts = table.with_name(f".{table.stem}") / name
    parts.mkdir(parents=True, exist_ok=True)
    files = {step: parts / f"step-{step:08d}.csv" for step in steps}
    for step, file in tqdm(files.items(), desc=table.stem, unit=" checkpoints"):
        if not file.exists():
            model = series.load(step, **options)
            rows = measure(model)
            rows.insert(0, "step", step)
            write_text(file, rows.to_csv(index=False))
            del model  # before the next one is loaded
    whole = pd.concat([pd.read_csv(file) for file in files.values()], ignore_index=True)
    write_text(table, whole.to_csv(index=False))
    for other in parts.parent.iterdir():  # parts of other measurements, now that these are whole
        if other.is_dir() and other != parts:
            shutil.rmtree(other)
    return whole


def digest(tokens) -> str:
    """A hash of tokens (any shape), for a sweep's key."""
    return hashlib.sha256(tokens.cpu().long().numpy().tobytes()).hexdigest()[:16]


def _library() -> str:
    """A hash of the source that a measurement can depend on: not how models are trained or run."""
    root = Path(__file__).parents[1]
    files = {file for file in root.rglob("*.py") if file.parent.name not in ("run", "train")}
    files.add(root / "train/model.py")
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()
