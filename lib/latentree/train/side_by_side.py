"""Several trainings side by side: on a CPU, small models train fastest with one thread each and one process a core."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for

import torch

from latentree.data.progress import Reporter
from latentree.train.training import CARD, check_run, train

SECONDS_BETWEEN_LOOKS = 0.5
told = None  # in a training process: how many tokens of each training are done


def train_all(jobs: dict, device: str = "auto", progress: bool = True) -> None:
    """Train every job {folder: (TrainingConfig, process, held-out tokens)} as `training.train` does.

    On a CPU as many at a time as torch has threads, each in a process of its own with one thread, so that the weights do not
    depend on the number of cores; on a GPU one after the other, in this process. All are checked before any starts. One that
    fails does not stop the others, and what is finished is not repeated.

    ValueError as from train, of the first that failed, and if a training process was killed.
    """
    for folder, (config, process, held_out) in jobs.items():
        check_run(config, process, held_out, folder, device)
    left = [folder for folder in jobs if not (folder / CARD).exists()]
    if device == "cuda" or device == "auto" and torch.cuda.is_available():
        for folder in left:
            train(*jobs[folder], folder, device=device, progress=progress)
        return
    if not left:
        return
    context = multiprocessing.get_context("spawn")
    done = context.Array("q", len(left), lock=False)
    total = sum(
        jobs[folder][0].steps * jobs[folder][0].batch_sequences * jobs[folder][0].context
        for folder in left
    )
    report = Reporter(f"{len(left)} models", total, 0, "tokens", progress)
    workers = min(len(left), torch.get_num_threads())
    with ProcessPoolExecutor(workers, context, begin, (done,)) as pool:
        futures = [
            pool.submit(train_one, *jobs[folder], folder, number)
            for number, folder in enumerate(left)
        ]
        while wait(futures, SECONDS_BETWEEN_LOOKS).not_done:
            report(sum(done), f"{sum(future.done() for future in futures)} of {len(left)} trained")
    report(
        sum(done), f"{sum(future.exception() is None for future in futures)} of {len(left)} trained"
    )
    report.close()
    try:
        for future in futures:
            future.result()
    except BrokenProcessPool:
        raise ValueError(
            f"{left[0].parent}: a training process was killed (out of memory?); start again, it goes on where it "
            "stopped"
        ) from None


# ---------------------------------------------------------------------- in a training process


def begin(done) -> None:
    """One thread, and an end as soon as the process that started this one has ended."""
    global told
    told = done
    torch.set_num_threads(1)
    threading.Thread(target=follow_parent, daemon=True).start()


def follow_parent() -> None:
    """Wait for the parent's end, however it comes, and end at once: two processes must not train in one folder."""
    wait_for([multiprocessing.parent_process().sentinel])
    os._exit(1)


def train_one(config, process, held_out, folder, number) -> None:
    """Train one model and tell how far it is."""
    train(config, process, held_out, folder, device="cpu", progress=Told(number))


@dataclass
class Told:
    """Stands in for a Reporter: tells the parent."""

    number: int

    def __call__(self, done: int, note: str = "") -> None:
        told[self.number] = done

    def close(self) -> None:
        """Nothing to close."""
