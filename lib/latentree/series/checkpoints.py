"""A run's checkpoints: folders step-00000000, ... that transformers loads, by training step."""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from latentree.inside.products import use_onednn

IDENTITY = "training.json"  # what was trained on what: in the run's folder and in each checkpoint
CARD = "run_card.json"  # written last: its presence says that the training is finished
_BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")  # computed, not trained

logging.disable_progress_bar()  # transformers draws one for every small file


def checkpoint_steps(total_steps: int, evenly: int, log_spaced: int) -> list[int]:
    """Sorted steps from 0 to `total_steps`: `evenly` spaced ones and `log_spaced` ones, merged."""
    even = {round(total_steps * i / evenly) for i in range(1, evenly + 1)}
    log = {round(total_steps ** (i / max(1, log_spaced - 1))) for i in range(log_spaced)}
    return sorted({0, total_steps} | even | log)


def seed_folder(seed: int, variant: str = "") -> str:
    """The name of the folder of one training: seed-0, or for another kind of model KIND-seed-0."""
    return f"{variant}-seed-{seed}".removeprefix("-")


def save_checkpoint(model, run: Path, step: int, tokenizer=None) -> None:
    """Write `model` as checkpoint `step` of the run in the folder `run`: whole or not at all.

    With its `tokenizer` (words.tokenizer), other tools take the folder as it is.
    """
    partial, folder = run / ".partial-step", run / f"step-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    model.save_pretrained(partial)
    shutil.copy(run / IDENTITY, partial)
    if tokenizer:
        tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def read_identity(folder: Path) -> dict:
    """What was trained on what, from a run's folder or a checkpoint's."""
    if not (folder / IDENTITY).exists():
        raise ValueError(f"{folder}: has no {IDENTITY}; train there first, or name another folder")
    try:
        return json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / IDENTITY}: is damaged: {error}; give another folder") from None


def load_whole(folder: Path, device="auto", dtype=torch.float32):
    """The model in `folder`, ready to be measured: on `device`, or on a GPU if torch sees one.

    ValueError if the folder lacks some of its weights, which transformers would draw at random, has
    others than its config says, which it would leave out, or some that are whole numbers or not
    finite. PermissionError for a file that may not be read, which safetensors would call missing.
    """
    for file in Path(folder).iterdir():
        if file.is_file():
            file.open("rb").close()
        if file.suffix == ".safetensors":
            _check_numbers(file)
    options = {"ignore_mismatched_sizes": True, "output_loading_info": True}  # told below
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # of no MLP
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, **options
        )
    if missing := sorted(report["missing_keys"]):
        told = f"{missing[0]} (and {len(missing) - 1} more)"
        raise ValueError(f"{folder}: lacks the weights {told}; choose another checkpoint")
    others = [key for key in report["unexpected_keys"] if not key.endswith(_BUFFERS)]
    others += [f"{key} {tuple(size)}" for key, size, _ in report["mismatched_keys"]]
    if others := sorted(others):
        told = f"{others[0]} (and {len(others) - 1} more); give the config of their training"
        raise ValueError(f"{folder}: has weights that its config does not say, {told}")
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise ValueError(f"{folder}: has weights that are not finite; choose another checkpoint")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return use_onednn(model).to(device).eval()


def _check_numbers(file: Path) -> None:
    """ValueError for a file whose weights are whole numbers: quantised, and their scales lost."""
    try:
        with safe_open(file, "pt") as weights:
            names = [name for name in weights.keys() if not name.endswith(_BUFFERS)]
            whole = [name for name in names if "F" not in weights.get_slice(name).get_dtype()]
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}; choose another checkpoint") from None
    if whole:
        raise ValueError(f"{file}: {whole[0]} holds whole numbers; give weights of a float type")


class LocalSeries:
    """The checkpoints of the run in `folder`: `steps` in order, and `load(step)` for the model.

    `identity` says what was trained on what. ValueError if there is no checkpoint, or one is of
    another run. Half-written ones that a killed run left are not seen.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.identity = read_identity(self.folder)
        self._folders = {}
        for path in sorted(self.folder.iterdir()):  # glob sees nothing where it may not look
            if re.fullmatch(r"step-\d{8}", path.name):
                self._folders[int(path.name[5:])] = path
                theirs = read_identity(path)
                if theirs != self.identity:
                    raise ValueError(
                        f"{path}: is of another run, {theirs}, and not of this one, "
                        f"{self.identity}; move it elsewhere"
                    )
        self.steps = list(self._folders)
        if not self.steps:
            raise ValueError(f"{folder}: has no checkpoints yet; train there first")

    def config(self):
        """The transformers config of its models."""
        return AutoConfig.from_pretrained(self._folders[self.steps[-1]], local_files_only=True)

    def load(self, step: int, device="auto", dtype=torch.float32):
        """The model at `step`, ready to be measured."""
        model = load_whole(self._folders[step], device, dtype)
        said = model.config.num_attention_heads
        heads = self.identity.get("heads", said)
        if heads != said:  # weights of either have the same sizes
            raise ValueError(
                f"{self._folders[step]}: its config says {said} heads, and it was trained with "
                f"{heads}; restore its config.json"
            )
        return model
