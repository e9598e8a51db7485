"""Execute one notebook: python -m latentree.run NOTEBOOK --params FILE --out FOLDER [--timeout SECONDS]

Either FOLDER ends with the executed notebook NN_name.ipynb, results/NN.json and an entry in run.json, or with none of
them: then NN_name.failed.ipynb shows how far it came, one line on standard error says what happened, and the exit code
says which kind of failure it was. Parameters are checked before a kernel starts.

    python -m latentree.run --folder-of PROFILE     prints the folder of a profile's outputs
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from base64 import b64decode, b64encode
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from latentree.data.files import (
    code_cells,
    read_json,
    read_notebook,
    readable,
    with_palette,
    write_text,
)
from latentree.run.parameters import check, declared, load
from latentree.run.record import (
    NOTED,
    describe,
    output_folder,
    read_record,
    version_of,
    without_machine,
    write_record,
)

BAD_INPUT, CELL_ERROR, DEAD_KERNEL, TIMED_OUT, BUSY, NO_RESULT = 2, 3, 4, 5, 6, 7
SIGNALLED = 128  # plus the signal's number, as a shell has it
FAILURE = ".{}.failure"  # why a notebook failed last, until it has been executed

SECONDS_BETWEEN_LOOKS = 0.25
SECONDS_TO_SAVE = 8  # for papermill to notice that its kernel is gone and save the notebook


class Failure(Exception):
    """A run that did not succeed: Failure(exit code, what happened in one line)."""


def run(
    notebook: Path,
    params: Path,
    out: Path,
    timeout: float | None = None,
    follow_parent: bool = False,
) -> None:
    """Execute `notebook` with the parameters in `params` into the folder `out`, within `timeout` seconds."""
    declarations = declared(notebook)
    if "out" not in declarations:
        raise ValueError(
            f'{notebook}: declares no `out`: add `out: str = "outputs"  # folder` to its parameters cell'
        )
    values = load(params)
    try:
        values = check(values, declarations)
    except ValueError as error:
        raise ValueError(f"{params}: {error}") from None
    profile = values.get("profile", params.resolve().parent.name)
    version = version_of(profile)
    folder = out.resolve()
    values["out"] = str(folder)
    with lock(folder, notebook):
        read_record(folder)
        result = folder / "results" / f"{notebook.stem.split('_')[0]}.json"
        finished, failed, partial = (
            folder / name.format(notebook.stem)
            for name in ("{}.ipynb", "{}.failed.ipynb", ".{}.partial.ipynb")
        )
        noted, failure_told = (folder / name.format(notebook.stem) for name in (NOTED, FAILURE))
        for stale in (result, finished, partial, noted, failure_told):
            try:
                stale.unlink(missing_ok=True)
            except OSError as error:
                raise ValueError(
                    f"{stale}: cannot be replaced ({error.strerror}): remove it, or name another folder"
                ) from None
        entry = describe(
            {name: declaration.default for name, declaration in declarations.items()} | values,
            folder,
        )
        start = time.monotonic()
        try:
            peak = execute(notebook, partial, values, timeout, follow_parent)
            judge(partial, result)
            entry |= {
                "wall_seconds": round(time.monotonic() - start, 1),
                "peak_memory_gb": round(peak / 1e9, 2),
            }
            entry |= (
                without_machine(read_json(noted, "let record.note write it"), folder)
                if noted.exists()
                else {}
            )
            publish(partial, finished, folder)
            write_record(folder, profile, version, notebook.stem, entry)
        except (Failure, ValueError, OSError) as failure:
            code, message = (
                failure.args if isinstance(failure, Failure) else (NO_RESULT, str(failure))
            )
            if isinstance(failure, OSError):
                message = f"{without_machine(str(folder), folder)}: cannot be written ({failure.strerror}); make room there and run again"
            result.unlink(missing_ok=True)
            finished.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a full disk has no room for what failed either
                publish(partial if readable(partial) else notebook, failed, folder)
                message = f"{message}; see {without_machine(str(failed), folder)}"
            partial.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                write_text(failure_told, message)
            raise Failure(code, f"{notebook.stem}: {message}") from None
        for leftover in (partial, failed, noted):
            leftover.unlink(missing_ok=True)


def summary(folder: Path, executed: dict[str, bool]) -> list[str]:
    """One line for each notebook {name: whether it was executed}: what it took, or why it failed and where to look."""
    entries, lines = read_record(folder).get("notebooks", {}), []
    for name in executed:
        failure, took = folder / FAILURE.format(name), entries.get(name, {})
        if failure.exists():
            lines.append(f"{name}: FAILED: {failure.read_text(encoding='utf-8')}")
        elif executed[name] and took:
            lines.append(
                f"{name}: done in {took['wall_seconds'] / 60:.1f} min, {took['peak_memory_gb']:.1f} GB"
            )
        else:
            lines.append(f"{name}: not executed")
    return lines


@contextlib.contextmanager
def lock(folder: Path, notebook: Path):
    """Hold the folder for this notebook; a second run is refused at once."""
    try:
        (folder / "results").mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / f".{notebook.stem}.lock").acquire(timeout=0)
    except Timeout:
        message = (
            f"{notebook.stem}: another run is writing to {folder.name}: wait for it or stop it"
        )
        raise Failure(BUSY, message) from None
    except OSError as error:
        raise ValueError(
            f"--out {folder}: cannot be written ({error.strerror}): name another folder"
        ) from None
    with held:
        yield


def execute(
    notebook: Path, partial: Path, values: dict, timeout: float | None, follow_parent: bool
) -> int:
    """Let papermill execute the notebook in a child process, with private Jupyter folders; peak memory in bytes."""
    # The kernel's sockets lie in this folder, and a socket's path is limited to 107 bytes.
    short = "/tmp" if os.access("/tmp", os.W_OK) else None
    with tempfile.TemporaryDirectory(
        prefix="latentree-", dir=short, ignore_cleanup_errors=True
    ) as private:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("MPLBACKEND", "JUPYTER_PATH")
        }
        # OpenMP threads that spin long while they wait make two processes on shared cores ten times slower, and threads
        # that sleep at once make one process a third slower; this is long enough for one and short enough for two.
        environment = {"GOMP_SPINCOUNT": "10000"} | environment
        environment |= {"IPYTHONDIR": f"{private}/ipython", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        environment |= {
            f"JUPYTER_{kind}_DIR": f"{private}/{kind.lower()}"
            for kind in ("RUNTIME", "CONFIG", "DATA")
        }
        # What papermill and the kernel say goes with the progress: standard error has one line of our own.
        pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        line = [sys.executable, "-m", "latentree.run.execute"]
        child = subprocess.Popen(line, env=environment, start_new_session=True, **pipes)
        job = {
            "name": notebook.stem,
            "notebook": str(notebook.resolve()),
            "partial": str(partial),
            "private": private,
        }
        child.stdin.write(json.dumps(job | {"parameters": values}))
        child.stdin.close()
        peak = watch(child, timeout, os.getppid() if follow_parent else None)
    if child.returncode not in (0, CELL_ERROR):
        cell = last_started(partial)
        what = (
            "the kernel died"
            if child.returncode == DEAD_KERNEL
            else f"papermill ended with code {child.returncode}"
        )
        raise Failure(DEAD_KERNEL, f"{cell}: {what} (out of memory?)")
    return peak


def watch(child: subprocess.Popen, timeout: float | None, parent: int | None) -> int:
    """Wait for the child and sample its memory in bytes; stop it on a time-out, a signal, or its `parent`'s end."""
    received = []
    both = (signal.SIGTERM, signal.SIGINT)
    before = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in both
    }
    start, peak = time.monotonic(), 0
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(SECONDS_BETWEEN_LOOKS)
                return peak
            peak = max(peak, memory(child))
            if received:
                raise Failure(
                    SIGNALLED + received[0], f"stopped by {signal.Signals(received[0]).name}"
                )
            if timeout and time.monotonic() - start > timeout:
                raise Failure(
                    TIMED_OUT, f"not finished after {timeout:g} seconds: allow more with --timeout"
                )
            if parent and os.getppid() != parent:
                raise Failure(
                    SIGNALLED + signal.SIGTERM, "the process that started this run is gone"
                )
    finally:
        stop(child)
        for number, handler in before.items():
            signal.signal(number, handler)


def family(child: subprocess.Popen) -> list[psutil.Process]:
    """The child and all processes that it started; empty once it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(child.pid)
        return [process, *process.children(recursive=True)]
    return []


def memory(child: subprocess.Popen) -> int:
    """Resident memory of the child and all processes that it started, in bytes."""
    total = 0
    for process in family(child):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def stop(child: subprocess.Popen) -> None:
    """Kill the kernel, so that papermill saves the notebook and ends; kill papermill if it does not."""
    deadline = time.monotonic() + SECONDS_TO_SAVE
    while child.poll() is None:
        processes = family(child)
        for process in processes if time.monotonic() > deadline else processes[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(SECONDS_BETWEEN_LOOKS)


def judge(partial: Path, result: Path) -> None:
    """Success means: no cell has an error, every cell was executed, and the result was written and holds claims."""
    for name, cell in code_cells(partial):
        errors = [output for output in cell["outputs"] if output["output_type"] == "error"]
        left = any(
            error["ename"] == "SystemExit" and error["evalue"] in ("", "0") for error in errors
        )
        if left or cell["execution_count"] is None:
            raise Failure(
                NO_RESULT, f"{name}: the notebook ended here (sys.exit?) and not with its last cell"
            )
        if errors:
            raise Failure(
                CELL_ERROR, f"{name}: {errors[0]['ename']}: {' '.join(errors[0]['evalue'].split())}"
            )
        if cell["metadata"]["papermill"]["exception"]:
            raise Failure(CELL_ERROR, f"{name}: papermill stopped here without saying why")
    try:
        valid = isinstance(json.loads(result.read_text(encoding="utf-8"))["claims"], list)
    except (OSError, ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise Failure(
            NO_RESULT,
            f"finished without claims in results/{result.name}: end it with write_results",
        )


def last_started(partial: Path) -> str:
    """The last cell that papermill started, by name."""
    cells = code_cells(partial) if readable(partial) else []
    started = [
        name for name, cell in cells if cell["metadata"].get("papermill", {}).get("start_time")
    ]
    return started[-1] if started else "before the first cell"


def publish(source: Path, target: Path, folder: Path) -> None:
    """Put an executed notebook in its place, with small pictures, without papermill's paths and without those of this machine."""
    notebook = without_machine(read_notebook(source), folder)
    for private in ("input_path", "output_path", "parameters"):
        notebook["metadata"].get("papermill", {}).pop(private, None)
    for cell in notebook["cells"]:
        cell["source"] = cell["source"].splitlines(keepends=True)
        for shown in (
            output["data"]
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ):
            shown["image/png"] = b64encode(with_palette(b64decode(shown["image/png"]))).decode()
    write_text(target, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


class Parser(argparse.ArgumentParser):
    """The command's arguments."""

    def error(self, message):
        """Bad usage is a ValueError."""
        raise ValueError(f"{message} (see python -m latentree.run --help)")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = Parser(
        prog="python -m latentree.run",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("notebook", type=Path, nargs="?")
    parser.add_argument("--params", type=Path, help="YAML file with parameters")
    parser.add_argument(
        "--out", type=Path, help="folder for the executed notebook and what it writes"
    )
    parser.add_argument(
        "--timeout", type=float, help="seconds that the notebook may take; no limit without it"
    )
    parser.add_argument(
        "--follow-parent",
        action="store_true",
        help="stop when the process that started this one ends",
    )
    parser.add_argument(
        "--folder-of", metavar="PROFILE", help="print the folder of a profile's outputs and end"
    )
    try:
        given = parser.parse_args(arguments)
        if given.folder_of:
            print(output_folder(given.folder_of))
            return 0
        if not (given.notebook and given.params and given.out):
            parser.error("NOTEBOOK, --params and --out are all needed")
        if given.timeout is not None and not given.timeout > 0:
            parser.error(f"--timeout {given.timeout:g}: give a number of seconds greater than 0")
        run(given.notebook, given.params, given.out, given.timeout, given.follow_parent)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except Failure as failure:
        code, message = failure.args
        print(f"error: {message}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
