"""Parameters are declared in a notebook's first code cell, and every file of them suits it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from latentree.data.files import read_yaml
from latentree.run.parameters import check, declared
from latentree.run.record import version_of
from tiny import PARAMETERS, write_notebook, write_project


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    return declared(write_notebook(tmp_path_factory.mktemp("n") / "01_a.ipynb"))


def test_values_replace_defaults_and_a_whole_number_becomes_a_float(parameters):
    values = check({"seed": 3, "learning_rate": 1}, parameters)
    assert values["seed"] == 3 and type(values["learning_rate"]) is float
    assert values["corpora"] == ["bound", "bound-flat"] and values["profile"] == "smoke"


@pytest.mark.parametrize("text", ["1e-3", "1.0e3", "'0.1'"])
def test_a_number_that_yaml_reads_as_text_is_told_as_yaml_reads_it(parameters, text):
    with pytest.raises(ValueError) as refusal:
        check({"learning_rate": yaml.safe_load(text)}, parameters)
    mend = str(refusal.value).split("write ")[1].rstrip(")")
    assert yaml.safe_load(mend) == float(text.strip("'"))


@pytest.mark.parametrize("line", ["a: int = 1 + 1", "a: int = -1", "a = 'x'"])
def test_a_bad_declaration_is_refused(tmp_path, line):
    with pytest.raises(ValueError, match="a = "):
        check({}, declared(write_notebook(tmp_path / "01.ipynb", parameters=PARAMETERS + line)))


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"cells": [', "does not appear to be JSON"),
        (
            '{"cells": [], "metadata": {}, "nbformat": 3, "nbformat_minor": 0}',
            "missing an expected",
        ),
    ],
)
def test_what_is_no_notebook_is_refused_with_the_librarys_reason(tmp_path, text, reason):
    (tmp_path / "01.ipynb").write_text(text)
    with pytest.raises(ValueError, match=f"01.ipynb: .*{reason}"):
        declared(tmp_path / "01.ipynb")


def test_a_python_that_takes_docstrings_away_is_told_as_the_cause(parameters, monkeypatch):
    monkeypatch.setattr(sys, "flags", SimpleNamespace(optimize=2))
    with pytest.raises(ValueError, match="PYTHONOPTIMIZE: transformers needs docstrings"):
        check({}, parameters)


def test_every_parameter_file_suits_its_notebook():
    for path in sorted(Path("params").glob("*/[0-9]*.yaml")):
        values = check(read_yaml(path), declared(Path("notebooks") / f"{path.stem}.ipynb"))
        assert values["profile"] == path.parent.name


def test_the_version_is_of_values_and_not_of_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(write_project(tmp_path, **{"01_a": []}))
    file, grammar = Path("params/smoke/01_a.yaml"), Path("params/grammars/bound.yaml")
    before = version_of("smoke")
    file.write_text(json.dumps(yaml.safe_load(file.read_text())))
    assert version_of("smoke") == before
    grammar.parent.mkdir()
    grammar.write_text("name: bound\n")
    assert version_of("smoke") != before
