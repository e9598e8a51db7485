"""pyproject.toml, constraints.txt, environment.yml and .ci/run say the same."""

import os
import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [
    Requirement(text)
    for text in PROJECT["dependencies"]
    + PROJECT["optional-dependencies"]["test"]
    + PROJECT["optional-dependencies"]["book"]
]
PINS = [
    line
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def test_every_dependency_is_pinned_once_to_an_allowed_version():
    pinned = dict(line.split("==") for line in PINS)
    assert len(pinned) == len(PINS)
    assert sorted(pinned) == sorted(requirement.name for requirement in NEEDED)
    for requirement in NEEDED:
        assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_pins_are_releases_that_every_machine_finds():
    for line in PINS:
        assert re.fullmatch(r"[a-z0-9-]+==\d+(\.\d+)*", line), line


def test_conda_installs_the_same_project_with_the_same_pins():
    python = next(item for item in CONDA if str(item).startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python=") + ".0")
    assert {"pip": ["-c constraints.txt", "-e .[test,book]"]} in CONDA
    assert {item.split("=")[0] for item in CONDA if isinstance(item, str)} == {"python", "pip"}


def test_the_continuous_integration_runs_make_test_and_nothing_else():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines[0].startswith("#!") and os.access(ROOT / ".ci/run", os.X_OK)
    assert [line for line in lines[1:] if not line.startswith(("set ", "cd "))] == ["make test"]


def test_make_test_runs_pytest_and_make_installs_with_the_pins():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(
        r"^test: .venv/.installed browser\n\t\.venv/bin/python -m pytest -n 2$",
        makefile,
        re.MULTILINE,
    )
    assert makefile.count("-c constraints.txt -e '.[test,book]'") == 2
