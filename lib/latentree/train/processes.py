"""What surrounds a training: processes and devices, its trackers, and the bar that shows it."""

import os
import sys
import warnings
from contextlib import contextmanager, suppress

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tqdm.auto import tqdm

_LAUNCHERS = "WORLD_SIZE RANK LOCAL_RANK LOCAL_WORLD_SIZE PMI_ OMPI_COMM_ MV2_COMM_ ACCELERATE_"


class _Screen:
    """What standard error is at the moment; what cannot be written to it is lost."""

    def write(self, text):
        with suppress(OSError, ValueError, AttributeError):  # full; closed, or in other signs; none
            sys.stderr.write(text)
            sys.stderr.flush()


class Bar(tqdm):
    """A bar of tokens. That it cannot be shown (a closed pipe, a full disk) never ends a run."""

    def __init__(self, **settings):
        super().__init__(unit=" tokens", unit_scale=True, file=_Screen(), **settings)


@contextmanager
def trackers_of(accelerator):
    """Within, a tracker that fails (no network, a full disk) is told; no more is said to them."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"trackers: {error}; nothing more is said to them", stacklevel=3)
        accelerator.trackers = []


def accelerator_of(config, device, folder) -> Accelerator:
    """Devices and processes, as Accelerate finds them."""
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise ValueError("device = 'cuda': torch sees no GPU here; give auto or cpu")
    # Accelerate remembers the first precision and device; a notebook trains several models.
    AcceleratorState._reset_state(reset_partial_state=not launched())
    return Accelerator(
        cpu=device == "cpu" or not gpu,
        mixed_precision={"float32": "no", "bfloat16": "bf16"}[config.precision],
        log_with=config.trackers or None,
        project_dir=folder / "trackers",
    )


def launched() -> bool:
    """Whether a launcher started this process as one of several.

    Without all that a launcher sets, what a scheduler or a shell has left in the environment
    (WORLD_SIZE, PMI_SIZE, ...) would make Accelerate wait for others. That is taken away with a
    warning, and so is ACCELERATE_...: how a model is trained, its TrainingConfig says alone.
    ValueError if a launcher's number of processes is none.
    """
    at_work = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    begins = "ACCELERATE_" if at_work else _LAUNCHERS
    left = [name for name in os.environ if name.startswith(tuple(begins.split()))]
    for name in left:
        del os.environ[name]
    if left:
        warnings.warn(f"ignored in the environment: {', '.join(left)}", stacklevel=2)
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal():
        raise ValueError(f"WORLD_SIZE = {size!r}: is no number of processes; unset it, or set it")
    if int(size) > 1:
        told = f"WORLD_SIZE = {size}: waits for so many processes; without a launcher unset it"
        warnings.warn(told, stacklevel=2)
    return int(size) > 1
