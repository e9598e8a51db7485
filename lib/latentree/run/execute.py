"""The child process of latentree.run.execution: papermill executes one notebook, told as JSON on standard input.

It is a process of its own because a kernel's death, a time-out and a stop are then all seen from outside.
"""

import ctypes
import json
import logging
import signal
import sys
import time

import papermill
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

FINISHED, CELL_ERROR, DEAD_KERNEL = 0, 3, 4
SECONDS_BETWEEN_BARS = 5


class Progress:
    """A text file for papermill's bar and the kernel's output: whole lines pass, redrawn bars every few seconds."""

    def __init__(self, name: str):
        self.name, self.pending, self.last_bar, self.last_line = name, "", 0.0, ""

    def write(self, text: str) -> None:
        *lines, self.pending = (self.pending + text).split("\n")
        for line in lines:
            self.show(line)
        if "\r" in self.pending and time.monotonic() - self.last_bar > SECONDS_BETWEEN_BARS:
            self.last_bar = time.monotonic()
            self.show(self.pending)
            self.pending = ""

    def show(self, line: str) -> None:
        drawn = [piece.rstrip() for piece in line.split("\r") if piece.strip()]
        if drawn and drawn[-1] != self.last_line:
            self.last_line = drawn[-1]
            print(f"{self.name}: {self.last_line}", flush=True)

    def flush(self) -> None:
        """Lines are flushed as they are shown."""


def end_with_parent() -> None:
    """On Linux, be killed when the parent dies; the kernel then sees that its own parent is gone and ends."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """The command; returns its exit status."""
    end_with_parent()
    job = json.load(sys.stdin)
    logging.getLogger("papermill").setLevel(
        logging.CRITICAL
    )  # the parent says in one line what happened
    progress = Progress(job["name"])
    bar = {
        "file": progress,
        "mininterval": 0,
        "bar_format": "{n_fmt} of {total_fmt} cells, {elapsed}\n",
    }
    try:
        papermill.execute_notebook(
            # papermill fills in braces in paths as if they were templates
            job["notebook"].replace("{", "{{").replace("}", "}}"),
            job["partial"].replace("{", "{{").replace("}", "}}"),
            parameters=job["parameters"],
            kernel_name="python3",
            language="python",
            progress_bar=bar,
            stdout_file=progress,
            stderr_file=progress,
            autosave_cell_every=10,
            coalesce_streams=True,
            # sockets instead of ports: no other user can connect, and parallel runs never meet
            config=Config(
                KernelManager={
                    "transport": "ipc",
                    "connection_file": f"{job['private']}/kernel.json",
                }
            ),
        )
    except PapermillExecutionError:
        return CELL_ERROR
    except (
        RuntimeError
    ) as error:  # the kernel died (nbclient's DeadKernelError), or it never answered
        progress.show(str(error))
        return DEAD_KERNEL
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
