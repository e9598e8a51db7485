"""What is installed is said the same everywhere, and the code is in ruff's form."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TEXTS = PROJECT["dependencies"] + [text for extra in EXTRAS.values() for text in extra]
NEEDED = {Requirement(text) for text in TEXTS if not text.startswith("latentree")}
MAKEFILE = (ROOT / "Makefile").read_text()


def test_every_dependency_is_pinned_once_to_a_release_that_is_allowed():
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"[a-z0-9-]+==\d+(\.\d+)*", line) for line in lines)
    pinned = dict(line.split("==") for line in lines)
    assert sorted(pinned) == sorted(requirement.name for requirement in NEEDED)
    assert len(pinned) == len(lines)
    for requirement in NEEDED:
        assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_executing_needs_neither_a_browser_nor_a_book_nor_jupyterlab():
    names = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert not names & {"selenium", "sphinx", "jupyterlab", "ipywidgets", "datasets", "pytest"}
    needed = set(re.findall(r"\.venv/\.has-(\w+)", MAKEFILE))
    assert needed <= EXTRAS.keys()


def test_conda_installs_the_same_project_with_the_same_pins():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(item for item in conda if str(item).startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python=") + ".0")
    assert {"pip": ["-c constraints.txt", "-e .[test,lab]"]} in conda


def test_the_continuous_integration_runs_make_test_and_nothing_else():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines[0].startswith("#!") and os.access(ROOT / ".ci/run", os.X_OK)
    assert [line for line in lines[1:] if not line.startswith(("set ", "cd "))] == ["make test"]
    assert re.search(r"^test: .*\n\t\.venv/bin/python -m pytest -n 2$", MAKEFILE, re.MULTILINE)


def test_an_old_python_is_refused_in_one_line(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("MAKE", "MFLAGS"))}
    line = ["make", "run", f"PYTHON={old}"]
    ran = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=inherited)
    assert ran.returncode == 2 and f"error: PYTHON = {old}: is not Python 3.11" in ran.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_code_is_formatted_and_clean():
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for line in ([ruff, "check"], [ruff, "format", "--check"]):
        line += ["lib", "tests", "bench", "docs", "notebooks"]
        ran = subprocess.run(line, cwd=ROOT, text=True, capture_output=True)
        assert ran.returncode == 0, ran.stdout


ROOMS = {
    "data": set(),
    "inside": set(),
    "evidence": {"data"},
    "exact": {"data"},
    "series": {"data", "inside"},
    "train": {"data", "series", "inside"},
    "measure": {"data", "exact", "series", "train", "inside", "evidence"},
    "run": {"data", "series", "evidence", "train"},
}


def test_imports_never_run_back():
    for file in (ROOT / "lib/latentree").glob("*/*.py"):
        read = set(re.findall(r"^\s*from latentree\.(\w+)", file.read_text(), re.MULTILINE))
        assert read <= ROOMS[file.parent.name] | {file.parent.name}, file
