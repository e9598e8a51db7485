"""Tiny notebooks and projects for the tests of what runs notebooks."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import psutil
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PARAMETERS = """\
profile: str = "smoke"  # size of the run
out: str = "outputs/scratch"  # folder for everything that is written
checkpoints: str = ""  # folder of trained models
seed: int = 0  # of all random numbers
learning_rate: float = 0.01  # largest step of the optimizer
corpora: list[str] = [
    "bound",
    "bound-flat",
]  # file names
"""
WRITE = """\
import json, pathlib
folder = pathlib.Path(out, "results")
folder.mkdir()
written = (folder / "{}.json").write_text(json.dumps({{"claims": []}}))"""
# Waits a minute, but only the first time that it is executed in this folder.
WAIT_ONCE = """\
import pathlib, time
waited = pathlib.Path("waited").exists()
pathlib.Path("waited").touch()
print("waiting", flush=True)
time.sleep(0 if waited else 60)"""


def write_notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A notebook with a parameters cell and `cells`."""
    head = [
        new_markdown_cell("# A tiny notebook"),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    body = [new_code_cell(cell) for cell in cells]
    nbformat.write(new_notebook(cells=head + body, metadata={"kernelspec": kernel}), path)
    return path


def write_project(root: Path, **notebooks: list[str]) -> Path:
    """A project with a smoke profile: each notebook's cells, then one that writes a result."""
    for name, cells in notebooks.items():
        write_notebook(root / f"notebooks/{name}.ipynb", *cells, WRITE.format(name[:2]))
        params = root / f"params/smoke/{name}.yaml"
        params.parent.mkdir(parents=True, exist_ok=True)
        params.write_text("profile: smoke\nseed: 3\n")
    return root


def command(name: str, *more: str) -> list[str]:
    """The command line that runs a project's notebook into its folder `out`."""
    files = [f"notebooks/{name}.ipynb", "--params", f"params/smoke/{name}.yaml", "--out", "out"]
    return [sys.executable, "-m", "latentree.run", *files, *more]


def run(root: Path, name: str, *more: str) -> subprocess.CompletedProcess:
    line = command(name, *more)
    return subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=120)


def execute_all(notebooks: list[Path], params: Path, out: Path) -> None:
    """Execute this project's notebooks with the parameters in the folder `params`, as `make run`.

    First all trainings in one pool; then 02; then the others two at a time, 07 last.
    """

    def do(module, *more):
        line = [sys.executable, "-m", module, *more, "--out", out]
        ran = subprocess.run(line, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr

    def execute(path):
        do("latentree.run", path, "--params", params / f"{path.stem}.yaml")

    if params.name != "labs":  # which train by themselves
        do("latentree.run.trainings", "--params", params)

    order = {"02": 0, "07": 2}  # 07 shows what 03 to 05 have written
    for turn in (0, 1, 2):
        with ThreadPoolExecutor(2) as pool:
            now = [path for path in notebooks if order.get(path.stem[:2], 1) == turn]
            list(pool.map(execute, now))


def start(arguments: list[str], root: Path, word: str = "waiting") -> subprocess.Popen:
    """Start a process in the background and return when it has printed `word`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(arguments, cwd=root, text=True, env=environment, **pipes)
    for line in process.stdout:
        if word in line:
            return process
    raise AssertionError(f"{word!r} was never printed: {process.stderr.read()}")


def nothing_runs_in(root: Path, seconds: float = 20) -> bool:
    """Whether no process but this one works in this folder any more, after at most `seconds`."""
    deadline, this = time.monotonic() + seconds, os.getpid()
    while left := [
        p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(root) and p.pid != this
    ]:
        if time.monotonic() > deadline:
            print(left)
            return False
        time.sleep(0.2)
    return True
