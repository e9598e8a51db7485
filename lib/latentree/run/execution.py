"""Execute one notebook: python -m latentree.run NOTEBOOK --params FILE --out FOLDER

The notebook writes into a staging folder, which is its parameter `out`. When all its cells have
been executed and results/NN.json is there, its figures, tables, results and the executed notebook
move into FOLDER, in place of earlier ones, and run.json says what was run. Otherwise what was
finished before stays as it was, and beside it NN_name.failed.ipynb shows how far this run came.
What is trained lies in FOLDER/checkpoints and is kept in any case.

Exit status: 0 done; 1 failed, or 2 bad input, before a kernel starts: one line on standard error.
"""

import argparse
import ctypes
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from base64 import b64decode, b64encode
from datetime import UTC, datetime
from io import TextIOBase
from pathlib import Path

import papermill
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config
from zmq import ZMQError

from latentree.data.files import locked, read_yaml
from latentree.run import record
from latentree.run.parameters import check, declared

_KINDS = "figures", "tables", "results"  # the folders of what a notebook writes
# Nobody sees a widget here: progress bars are text, shown while they move and kept at their end.
_TEXT_BARS = "import sys, tqdm\nsys.modules['tqdm.auto'] = tqdm.auto = tqdm\ndel sys, tqdm\n"


def run(notebook: Path, params: Path, out: Path) -> None:
    """Execute `notebook` with the parameters in the file `params` into the folder `out`.

    ValueError for bad input, before a kernel starts; RuntimeError if the run fails.
    """
    folder, name = out.resolve(), notebook.stem
    staging, failed = folder / f".{name}.partial", out / f"{name}.failed.ipynb"
    given = read_yaml(params)
    values = check(given, declared(notebook))
    given["out"] = values["out"] = str(staging)
    if values.get("checkpoints") == "":
        given["checkpoints"] = values["checkpoints"] = str(folder / "checkpoints")
    entry = record.describe(values) | {"started": datetime.now(UTC).isoformat()}
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".run.lock", 20):
        record.read_record(folder)  # so that the end will have both, and room for what is written
    for kind in _KINDS:
        kept = folder / kind
        if os.path.lexists(kept) and not (kept.is_dir() and os.access(kept, os.W_OK | os.X_OK)):
            raise OSError(f"{kept}: is no folder to write in; give rights, or another --out")
    with locked(folder / f".{name}.lock"):
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        staging.mkdir()
        executed = Path(shutil.copy(notebook, staging))
        early = _execute(notebook, executed, given)
        problem = _finish(executed, folder, early)
        result = staging / f"results/{name[:2]}.json"
        if not problem and not result.exists():
            problem = f"finished without results/{result.name}: end it with work.finish(claims)"
        if problem:
            os.replace(executed, failed)
            shutil.rmtree(staging)
            raise RuntimeError(f"{name}: {problem}; see {failed}")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the largest process, KiB
        entry["wall_seconds"] = round(time.monotonic() - start, 1)
        entry["peak_memory_gb"] = round(peak * 1024 / 1e9, 2)
        _publish(staging, folder, name[:2])
        record.write_entry(folder, name, entry)
        failed.unlink(missing_ok=True)


def _execute(notebook: Path, executed: Path, values: dict) -> str:
    """Let papermill execute a notebook into the file `executed`; why it ended early, or ''."""
    os.environ.pop("MPLBACKEND", None)
    os.environ.pop("JUPYTER_PATH", None)
    # OpenMP threads that spin long while they wait make two processes on shared cores ten times
    # slower, and threads that sleep at once make one process a third slower; this is long enough
    # for one and short enough for two.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    short = "/tmp" if os.access("/tmp", os.W_OK) else None  # a socket's path has 107 bytes at most
    private = tempfile.mkdtemp("", "latentree-", short)
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        os.environ[name] = f"{private}/{name}"
    startup = Path(private, "IPYTHONDIR/profile_default/startup")
    startup.mkdir(parents=True)
    (startup / "bars.py").write_text(_TEXT_BARS)
    # sockets instead of ports: no other user can connect, and runs side by side never meet
    sockets = {"transport": "ipc", "connection_file": f"{private}/kernel.json"}
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    lines, errors = _Lines(notebook.stem), os.dup(2)
    os.dup2(1, 2)  # what the kernel's process says goes with the progress
    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            values,
            kernel_name="python3",
            cwd=str(record.project_root()),
            progress_bar={"file": lines, "bar_format": "{n_fmt} of {total_fmt} cells"},
            stdout_file=lines,
            stderr_file=lines,
            coalesce_streams=True,
            config=Config(KernelManager=sockets),
        )
    except PapermillExecutionError:
        pass  # the cell holds its error
    except (RuntimeError, SystemExit, ZMQError) as error:  # the kernel died, or this was stopped
        return str(error)
    finally:
        os.dup2(errors, 2)
        shutil.rmtree(private, ignore_errors=True)
    return ""


def _open_what_is_closed() -> None:
    """Give a kernel, which inherits them, a standard output and error if there are none."""
    for number in (1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)


def _stop(number, frame):
    """As SystemExit a signal lets papermill stop its kernel and save the notebook."""
    raise SystemExit(f"stopped by {signal.Signals(number).name}")


class _Lines(TextIOBase):
    """Prints what papermill and the kernel say, by lines; of a redrawn bar one in five seconds."""

    def __init__(self, name: str):
        self.name, self.last_bar = name, 0.0

    def write(self, text: str) -> None:
        if "\r" in text:
            if time.monotonic() - self.last_bar < 5:
                return
            self.last_bar = time.monotonic()
            text = text.strip().split("\r")[-1]
        for line in text.splitlines():
            if line.strip():
                try:
                    print(f"{self.name}: {line}", flush=True)
                except OSError:  # nobody listens any more, or the log's disk is full
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _finish(executed: Path, folder: Path, early: str) -> str:
    """Take this machine's paths out of an executed notebook and make its pictures small.

    Returns what kept it from its end, `early` or a cell's error, with the cell's number and line.
    """
    text = executed.read_text(encoding="utf-8").replace(f"/{executed.parent.name}", "")
    notebook = json.loads(record.without_machine(text, folder))
    for name in ("input_path", "output_path", "parameters"):
        notebook["metadata"].get("papermill", {}).pop(name, None)
    number, cell_name = 0, "before the first cell"
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if source and cell["metadata"].get("papermill", {}).get("start_time") and "outputs" in cell:
            number += 1
            cell_name = f"In [{number}] `{source.splitlines()[0][:60]}`"
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":  # papermill takes SystemExit: 0 for a success
                early = early or f"{output['ename']}: {output['evalue']}"
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = _small(output["data"]["image/png"])
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    executed.write_text(text, encoding="utf-8")
    return early and f"{cell_name}: {early}"


def _small(picture: str) -> str:
    from latentree.evidence.figures import with_palette  # takes seconds to import

    return b64encode(with_palette(b64decode(picture))).decode()


def _publish(staging: Path, folder: Path, number: str) -> None:
    """Move what a notebook has written into `folder`, in place of what an earlier run left."""
    earlier = {file for kind in _KINDS for file in folder.glob(f"{kind}/{number}[._]*")}
    ready = {}
    try:
        for file in filter(Path.is_file, sorted(staging.rglob("*"))):
            target = folder / file.relative_to(staging)
            target.parent.mkdir(exist_ok=True)
            ready[target] = target.with_name(f".{target.name}.new")
            shutil.move(file, ready[target])  # to another disk, too, if the folder is a link there
        for target, file in ready.items():  # all are beside their places by now
            os.replace(file, target)
    finally:
        for file in ready.values():
            file.unlink(missing_ok=True)
    for file in earlier - ready.keys():
        file.unlink()
    shutil.rmtree(staging)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m latentree.run", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--params", type=Path, required=True, help="YAML file with parameters")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that it writes")
    parser.add_argument("--follow-parent", action="store_true", help="end with the parent process")
    given = parser.parse_args(arguments)
    logging.disable()  # one line of our own says what happened
    _open_what_is_closed()
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that lacks a sign must not end a run
    if given.follow_parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    try:
        run(given.notebook, given.params, given.out)
        return 0
    except TimeoutError as error:  # another run holds the folder
        status, problem = 2, str(error)
    except (ValueError, FileNotFoundError) as error:
        status, problem = 2, f"{given.params}: {str(error).removeprefix(f'{given.params}: ')}"
    except (RuntimeError, OSError) as error:
        status, problem = 1, str(error)
    print("error:", " ".join(problem.split()), file=sys.stderr)
    return status
