"""Where a profile's outputs lie, and what is written down about each run (FOLDER/run.json).

Nothing here names the machine: paths are told from the project's root, and there are no host or user names.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import filelock

import latentree
from latentree.data.files import read_json, write_text

NOTED = ".{}.noted.json"  # what a notebook notes about its run, until the run has ended
PACKAGES = "torch transformers accelerate nnsight nltk numpy pandas scipy papermill".split()


def project_root() -> Path:
    """The nearest folder, from here upwards, that has parameter files; else the checkout this package is in."""
    here = Path.cwd()
    checkout = Path(__file__).resolve().parents[3]
    return next(
        (folder for folder in (here, *here.parents) if (folder / "params").is_dir()), checkout
    )


def version_of(profile: str) -> str:
    """The project's version and 8 hex digits of the profile's parameter files and all grammars (names and bytes)."""
    root = project_root()
    files = sorted((root / "params" / profile).glob("*.yaml"))
    if not files:
        known = sorted({file.parent.name for file in root.glob("params/*/*.yaml")} - {"grammars"})
        raise ValueError(
            f"profile {profile!r} has no files params/{profile}/*.yaml: choose one of {', '.join(known)}"
        )
    digest = hashlib.sha256()
    for file in files + sorted((root / "params" / "grammars").glob("*.yaml")):
        digest.update(f"{file.parent.name}/{file.name}\0".encode() + file.read_bytes() + b"\0")
    return f"{latentree.__version__}-{digest.hexdigest()[:8]}"


def output_folder(profile: str) -> Path:
    """The folder of a profile's outputs, relative to the project's root: another one whenever a parameter changes."""
    return Path("outputs") / f"{profile}-{version_of(profile)}"


def without_machine(value, folder: Path):
    """`value` with this machine's paths in all its texts told from the project's root, and the home folder as ~.

    An output folder outside the project becomes the place where everything is, `.`.
    """
    if isinstance(value, dict):
        return {key: without_machine(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [without_machine(item, folder) for item in value]
    if not isinstance(value, str):
        return value
    root = project_root()
    inside = folder.relative_to(root).as_posix() if folder.is_relative_to(root) else "."
    packages = Path(filelock.__file__).parents[1]
    for path, name in [
        (folder, inside),
        (root, "."),
        (packages, packages.name),
        (Path.home(), "~"),
    ]:
        if len(path.parts) > 1:
            # not inside a longer path, but right after a terminal colour (ESC[32m) as in a traceback
            path = rf"(?:(?<=\dm)|(?<![\w.~-])){re.escape(str(path))}"
            value = re.sub(rf"{path}/", "", value) if name == "." else value
            value = re.sub(rf"{path}(?![\w.-])", name, value)
    return value


def git_state() -> dict:
    """Commit and whether files outside outputs/ differ from it; both null outside git."""

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=project_root(), capture_output=True, text=True
        )

    head = git("rev-parse", "HEAD") if shutil.which("git") else None
    if head is None or head.returncode:
        return {"commit": None, "dirty": None}
    dirty = git("status", "--porcelain", "--", ".", ":(exclude)outputs").stdout.strip() != ""
    return {"commit": head.stdout.strip(), "dirty": dirty}


def versions() -> dict[str, str | None]:
    """Python's and the main packages' versions; None where a package is missing."""

    def installed(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {"python": platform.python_version()} | {
        package: installed(package) for package in PACKAGES
    }


def device() -> dict:
    """Names of the processor and the GPUs, and the number of threads a notebook may use."""
    cpu = platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    gpus = []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return {
        "cpu": cpu,
        "gpus": gpus,
        "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count()),
    }


def parameters_of(values: dict, folder: Path) -> dict:
    """What run.json says about the parameters: values without `out`, their hash, and the seeds."""
    shown = without_machine(
        {name: value for name, value in values.items() if name != "out"}, folder
    )
    digest = hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()
    seeds = values.get("seeds", [values["seed"]] if "seed" in values else [])
    return {"parameters": shown, "parameters_sha256": digest, "seeds": seeds}


def note(out, notebook: str, **facts) -> None:
    """Facts that `notebook` ("07_olmo") has found out, for its entry in out/run.json: which revisions it shows, say."""
    write_text(Path(out) / NOTED.format(notebook), json.dumps(facts))


def describe(values: dict, folder: Path) -> dict:
    """All that is known about a run before it starts."""
    machine = {"versions": versions(), "device": device()}
    return (
        git_state()
        | parameters_of(values, folder)
        | machine
        | {"started": datetime.now(UTC).isoformat()}
    )


def read_record(folder: Path) -> dict:
    """What FOLDER/run.json says; nothing if there is none yet. ValueError if it is damaged."""
    file = folder / "run.json"
    return (
        read_json(file, "it is not the record of a run: remove it, or name another folder")
        if file.exists()
        else {}
    )


def write_record(folder: Path, profile: str, version: str, notebook: str, entry: dict) -> None:
    """Put the entry of one notebook into FOLDER/run.json; notebooks that finish together wait for each other."""
    file = folder / "run.json"
    with filelock.FileLock(folder / ".run.lock"):
        record = read_record(folder)
        notebooks = record.get("notebooks", {}) | {notebook: entry}
        record = {
            "version": version,
            "profile": profile,
            "notebooks": dict(sorted(notebooks.items())),
        }
        write_text(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
