"""A training run's checkpoints: folders step-00000000, step-00000001, ... that transformers loads, in order of steps."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

IDENTITY = (
    "training.json"  # what was trained on what: in the run's folder, and a copy in each checkpoint
)
MEND = "remove this folder, or train again in a new one"
PARTIAL = ".partial-"  # a folder still being written, or already replaced


def checkpoint_steps(total_steps: int, evenly: int, log_spaced: int) -> list[int]:
    """Sorted steps from 0 to `total_steps`: about `evenly` evenly spaced and `log_spaced` log-spaced ones, merged."""
    even = {round(total_steps * i / evenly) for i in range(1, evenly + 1)}
    log = {round(total_steps ** (i / max(1, log_spaced - 1))) for i in range(log_spaced)}
    return sorted({0, total_steps} | even | log)


@contextmanager
def new_folder(folder: Path):
    """A temporary folder to fill, that takes the place of `folder` once the block ends without an error."""
    partial, replaced = (
        folder.with_name(PARTIAL + state + folder.name) for state in ("new-", "old-")
    )
    remove_partial(folder.parent)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Remove what a killed or failed run left half-written in `folder`."""
    for path in folder.glob(PARTIAL + "*"):
        shutil.rmtree(path)
    for path in folder.glob(".*.tmp"):
        path.unlink()


@contextmanager
def without_bars():
    """Keep transformers from drawing a progress bar for each small file."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def save_checkpoint(model, run: Path, step: int) -> None:
    """Write `model` and the identity of its run as checkpoint `step` of the run in folder `run`: whole or not at all."""
    with without_bars(), new_folder(run / f"step-{step:08d}") as partial:
        model.save_pretrained(partial)
        shutil.copy(run / IDENTITY, partial / IDENTITY)


def read_identity(folder: Path) -> dict:
    """What was trained on what, from a run's folder or a checkpoint's."""
    try:
        identity = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        identity = None
    if not isinstance(identity, dict):
        raise ValueError(
            f"{folder}: has no readable {IDENTITY}; train there first (notebook 02), or name a folder that train() has written"
        )
    return identity


def check_checkpoint(folder: Path, identity: dict) -> None:
    """Raises ValueError, with the folder's name, unless `folder` is a whole checkpoint of the run with this identity."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = {"architecture": config["model_type"], "vocabulary_size": config["vocab_size"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder}: truncated checkpoint, config.json cannot be read; {MEND}"
        ) from None
    weights = sorted(folder.glob("*.safetensors"))
    for file in weights or [folder / "model.safetensors"]:
        if not is_whole(file):
            raise ValueError(
                f"{folder}: truncated checkpoint, {file.name} is missing or cut off; {MEND}"
            )
    theirs = read_identity(folder) | model
    for name, value in identity.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{folder}: foreign checkpoint, its {name} is {theirs.get(name)!r} and this run's is {value!r}; {MEND}"
            )


def is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says: 8 bytes of length, the header, the tensors."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if length < file.stat().st_size else None
        ends = [
            entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
        ]
        return file.stat().st_size == 8 + length + max(ends)
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return False


class LocalSeries:
    """The checkpoints of the run in `folder`, in order of steps: iterate for (step, folder), `load` for the model.

    Every checkpoint is checked when the series is made: ValueError names one that is truncated or of another run.
    Half-written folders that a killed run left are not seen.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.identity = read_identity(self.folder)
        self._folders = {
            int(path.name.removeprefix("step-")): path
            for path in self.folder.glob("step-" + "[0-9]" * 8)
        }
        for path in self._folders.values():
            check_checkpoint(path, self.identity)

    @property
    def steps(self) -> list[int]:
        """The training steps that have a checkpoint, in order. ValueError if there is none yet."""
        if not self._folders:
            raise ValueError(
                f"{self.folder}: has no checkpoints yet; train there first, or name another folder"
            )
        return sorted(self._folders)

    def __len__(self):
        return len(self._folders)

    def __iter__(self):
        return iter(sorted(self._folders.items()))

    def config(self):
        """The transformers config of its models."""
        return AutoConfig.from_pretrained(self._folders[self.steps[-1]], local_files_only=True)

    def load(self, step: int, device="cpu", dtype=torch.float32, **options):
        """The model at `step`, ready to be measured; `options` go to from_pretrained (attn_implementation, say)."""
        if step not in self._folders:
            raise ValueError(
                f"step: {step} has no checkpoint in {self.folder}; choose one of {self.steps}"
            )
        folder = self._folders[step]
        try:
            with without_bars():
                model, report = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=dtype, local_files_only=True, output_loading_info=True, **options
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{folder}: damaged checkpoint, cannot be loaded ({reason}) with {options=}; {MEND}"
            ) from None
        if missing := sorted(report["missing_keys"]):  # transformers has drawn them at random
            raise ValueError(
                f"{folder}: damaged checkpoint, lacks the weights {missing[0]} (and {len(missing) - 1} more); {MEND}"
            )
        return model.to(device).eval()
