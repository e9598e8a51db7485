"""What lets a training go on exactly where it was killed, and what it does to the machine on its way."""

import ctypes
import errno
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from latentree.data.files import writing
from latentree.series.checkpoints import (
    IDENTITY,
    PARTIAL,
    LocalSeries,
    read_identity,
    remove_partial,
)


def check_folder(folder: Path, identity: dict) -> None:
    """Raises ValueError unless `folder` is new or holds a run of this identity, with whole checkpoints."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder = {folder}: is a file; name a folder")
    if not (folder / IDENTITY).exists():
        if any(folder.glob("step-*")):
            raise ValueError(
                f"folder = {folder}: has checkpoints but no {IDENTITY}; name a new folder"
            )
        return
    there = read_identity(folder)
    for name in identity | there:
        if there.get(name) != identity.get(name):
            raise ValueError(
                f"folder = {folder}: was trained with {name} = {there.get(name)!r}, not {identity.get(name)!r}; name a new "
                f"folder, or give {name} back its value"
            )
    LocalSeries(folder)


def save_state(accelerator, stream, folder: Path, step: int) -> None:
    """Keep weights, optimizers, progress and the place in each process's stream as folder/state-<step>, whole or not.

    Older states are removed only when this one is in its place.
    """
    partial, state = folder / f"{PARTIAL}state", folder / f"state-{step:08d}"
    if accelerator.is_main_process:
        remove_partial(folder)
    accelerator.wait_for_everyone()
    accelerator.save_state(partial)
    torch.save(stream.state_dict(), partial / f"stream-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(partial, state)
        remove_states(folder, keep=state)
    accelerator.wait_for_everyone()


def load_state(accelerator, stream, folder: Path) -> None:
    """Go on from the latest state in `folder`, of any number of processes; start from the beginning if there is none."""
    states = sorted(folder.glob("state-" + "[0-9]" * 8))
    if not states:
        return
    try:
        accelerator.load_state(states[-1])
        stream.load_state_dict(
            *(torch.load(place) for place in sorted(states[-1].glob("stream-*.pt")))
        )
    except Exception as error:  # each library has errors of its own for a file that is cut off
        raise ValueError(
            f"{states[-1]}: cannot be read ({type(error).__name__}); remove it: the training then begins again"
        ) from None


def remove_states(folder: Path, keep: Path | None = None) -> None:
    """Remove the states in `folder`, but for `keep`."""
    for state in folder.glob("state-*"):
        if state != keep:
            shutil.rmtree(state)


@contextmanager
def alone(folder: Path):
    """Make `folder` and hold it, in the main process, until the block ends. ValueError if another training has it."""
    if int(os.environ.get("RANK", 0)):
        yield
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(folder.with_name(f".{folder.name}.lock")).acquire(
                timeout=3
            )  # one that was killed takes a moment to end
        except Timeout:
            raise ValueError(
                f"folder = {folder}: another training is writing there; wait for it or stop it"
            ) from None
    with held:
        yield


@contextmanager
def full_disk_told(folder: Path):
    """Turn the various errors that writing to a full disk raises into one ValueError, and remove what is half-written."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        # safetensors and torch.save raise errors of their own, some without the reason, but leave the disk full.
        full = (
            getattr(error, "errno", None) == errno.ENOSPC
            or shutil.disk_usage(existing(folder)).free < 2**20
        )
        if not full:
            raise
        remove_partial(folder)
        raise ValueError(
            f"folder = {folder}: no space left on the disk; free some and train again: it goes on from the last state"
        ) from error


def existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step, instead of handing pages back and getting them zeroed again.

    It saves a tenth of a training step on a CPU where page faults are dear. Other C libraries are left as they are.
    """
    trim_threshold, mmap_threshold = -1, -3  # mallopt's names for them, from malloc.h
    if hasattr(
        library := ctypes.CDLL(None) if os.name == "posix" else None, "gnu_get_libc_version"
    ):
        library.mallopt(mmap_threshold, 2**30)
        library.mallopt(trim_threshold, 2**31 - 1)


class Progress:
    """How far a run is, with the rows of its tables; saved and loaded with the state."""

    def __init__(self):
        self.step, self.seconds = 0, 0.0
        self.losses, self.held_out, self.by_position = [], [], []

    def state_dict(self):
        """All of it."""
        return dict(vars(self))

    def load_state_dict(self, state):
        """Go back to where `state` was taken."""
        vars(self).update(state)
