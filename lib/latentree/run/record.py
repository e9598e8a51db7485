"""What is written down about a run, in FOLDER/run.json. Nothing in it names the machine."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from importlib.metadata import version
from pathlib import Path

import latentree
from latentree.data.files import locked, read_yaml, write_text

_PACKAGES = "torch transformers accelerate nnsight nltk numpy pandas scipy papermill".split()


def project_root() -> Path:
    """The nearest folder, from here upwards, that has parameters; else this package's checkout."""
    here = Path.cwd()
    checkout = Path(__file__).resolve().parents[3]
    return next((at for at in (here, *here.parents) if (at / "params").is_dir()), checkout)


def version_of(profile: str) -> str:
    """The project's version, and 8 hex digits of the values of its files and all grammars."""
    folder = project_root() / "params"
    files = sorted((folder / profile).glob("*.yaml"))
    if not files:
        known = {file.parent.name for file in folder.glob("*/*.yaml")} - {"grammars", "series"}
        mend = f"choose one of {', '.join(sorted(known))}"
        mend = mend if known else "start in a clone of the project"
        raise ValueError(f"profile = {profile!r}: is not in {folder}; {mend}")
    files += sorted((folder / "grammars").glob("*.yaml"))
    values = {f"{file.parent.name}/{file.stem}": read_yaml(file) for file in files}
    return f"{latentree.__version__}-{_digest(values)[:8]}"


def describe(values: dict) -> dict:
    """All that is known before a run of its parameters, of this project and of this machine."""
    parameters = {name: value for name, value in values.items() if name != "out"}
    versions = {package: version(package) for package in _PACKAGES}
    one_seed = [values[name] for name in ("seed", "corpus_seed") if name in values][:1]
    return {
        "version": version_of(values["profile"]),
        **_git_state(),
        "parameters": parameters,
        "parameters_sha256": _digest(parameters),
        "seeds": values.get("seeds") or one_seed,
        "versions": {"python": platform.python_version()} | versions,
        "device": _device(),
    }


def write_entry(folder: Path, notebook: str, entry: dict) -> None:
    """Put one notebook's entry into FOLDER/run.json; notebooks that finish together wait."""
    with locked(folder / ".run.lock", 20):
        record = dict(sorted((read_record(folder) | {notebook: entry}).items()))
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        write_text(folder / "run.json", without_machine(text, folder))


def read_record(folder: Path) -> dict:
    """FOLDER/run.json, or {}. Raises ValueError if it holds no entries."""
    file = folder / "run.json"
    try:
        return {} | json.loads(file.read_text(encoding="utf-8") if file.exists() else "{}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: is damaged: {error}; move it elsewhere") from None


def without_machine(text: str, folder: Path) -> str:
    """JSON text with paths told from the project's root, and the home folder as ~."""
    root, packages = project_root(), Path(sysconfig.get_path("purelib"))
    inside = folder.relative_to(root) if folder.is_relative_to(root) else folder.name
    shown = {folder: f"{inside}", root: ".", packages: packages.name}
    shown[Path(os.path.expanduser("~"))] = "~"  # a user without a home folder has none to hide
    for path, name in shown.items():
        if path != path.parent:  # a home folder of / is in every path
            text = re.sub(rf"{re.escape(str(path))}(?![\w.-])", name, text)
    return text


def _digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _told(*line) -> str | None:
    """What a program prints in the project's root; None if it is not installed, or fails."""
    if shutil.which(line[0]) is None:
        return None
    hooks = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}  # git's, and of another repository
    env = {name: os.environ[name] for name in os.environ.keys() - hooks}
    ran = subprocess.run(line, cwd=project_root(), env=env, capture_output=True, text=True)
    return None if ran.returncode else ran.stdout.strip()


def _git_state() -> dict:
    """Commit, and whether files outside outputs/ differ from it; None where git does not say."""
    here = (project_root() / ".git").exists()  # and not a repository that the project lies in
    commit = _told("git", "rev-parse", "--verify", "HEAD") if here else None
    if commit is None:
        return {"commit": None, "dirty": None}
    changed = _told("git", "status", "--porcelain", "--", ".", ":(exclude)outputs")
    return {"commit": commit, "dirty": changed != ""}


def _device() -> dict:
    """Names of the processor and the GPUs, and the number of threads a notebook may use."""
    processors = Path("/proc/cpuinfo")
    found = processors.exists() and re.search(r"model name\s*: (.+)", processors.read_text())
    gpus = _told("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or ""
    return {
        "cpu": found[1] if found else platform.machine(),
        "gpus": gpus.splitlines(),
        "threads": os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count()),
    }
