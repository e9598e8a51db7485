"""Parameters are declared once and refused early: by the function, by the command, and inside the notebook."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from latentree.run.parameters import check, declared, load, validate
from tiny import PARAMETERS, write_notebook

BAD_VALUES = [
    ({"sede": 1}, "sede", "seed"),
    ({"learning_rates": 0.1}, "learning_rates", "learning_rate"),
    ({"seed": "1"}, "seed", "write 1"),
    ({"seed": True}, "seed", "whole number"),
    ({"seed": 1.0}, "seed", "whole number"),
    ({"seed": None}, "None", "whole number"),
    ({"seed": -1}, "-1", "0 or more"),
    ({"learning_rate": "1e-3"}, "learning_rate", "write 1.0e-3"),
    ({"learning_rate": "1.0e3"}, "learning_rate", "write 1.0e+3"),
    ({"learning_rate": "0.1"}, "learning_rate", "write 0.1"),
    ({"learning_rate": True}, "True", "a number"),
    ({"learning_rate": float("nan")}, "nan", "a number"),
    ({"learning_rate": 0.0}, "0.0", "greater than 0"),
    ({"profile": "laptpo"}, "laptpo", "smoke, laptop, gpu, paper"),
    ({"profile": ["smoke"]}, "profile", "text"),
    ({"out": " "}, "out", "folder"),
    ({"seeds": []}, "seeds", "one or more"),
    ({"seeds": [1, 1]}, "seeds", "distinct"),
    ({"seeds": [0, -1]}, "seeds", "0 or above"),
    ({"seeds": 1}, "seeds", "[0, 1]"),
    ({"layers": 0}, "layers", "greater than 0"),
    ({"optimizer": "sgd"}, "sgd", "adamw, muon"),
    ({"device": "gpu"}, "gpu", "auto, cpu, cuda"),
]


@pytest.fixture(scope="module")
def declarations(tmp_path_factory):
    more = """\
seeds: list[int] = [0, 1]  # one run each
layers: int = 2  # transformer blocks
optimizer: str = "adamw"  # adamw or muon
device: str = "auto"  # auto, cpu or cuda
"""
    return declared(
        write_notebook(tmp_path_factory.mktemp("n") / "01_a.ipynb", parameters=PARAMETERS + more)
    )


def test_a_declaration_has_type_default_and_meaning(declarations):
    seed = declarations["seed"]
    assert (seed.type, seed.default, seed.meaning) == ("int", 0, "of all random numbers")
    assert (
        list(declarations)
        == "profile out seed learning_rate checkpoint seeds layers optimizer device".split()
    )


def test_good_values_pass_and_a_whole_number_becomes_a_float(declarations):
    values = check({"seed": 3, "learning_rate": 1, "seeds": [2, 1]}, declarations)
    assert values == {"seed": 3, "learning_rate": 1.0, "seeds": [2, 1]}
    assert type(values["learning_rate"]) is float


@pytest.mark.parametrize("values, thing, mend", BAD_VALUES, ids=lambda part: str(part)[:30])
def test_bad_values_are_refused_with_their_mend(declarations, values, thing, mend):
    with pytest.raises(ValueError) as refusal:
        check(values, declarations)
    assert (
        thing in str(refusal.value)
        and mend in str(refusal.value)
        and "\n" not in str(refusal.value)
    )


BAD_CELLS = [
    ("seed = 0", "name: type = literal"),
    ("seed: int", "name: type = literal"),
    ("seed: int = 0", "meaning"),
    ("import os", "name: type = literal"),
    ("seed: int = (\n0)  # seed", "name: type = literal"),
    ("seed: int = 1 + 1  # seed", "1 + 1 is not a literal"),
    ("seed: complex = 0  # seed", "complex"),
    ("seed: int = 0.5  # seed", "whole number"),
    ("seed: int = -1  # seed", "0 or more"),
    ("seed: int = 0  # seed\nseed: int = 1  # seed", "twice"),
    ("seed: int = 0  # 0 = the first", "two `=` signs"),
    ("seed: int = ", "line 1"),
]


@pytest.mark.parametrize("cell, mend", BAD_CELLS, ids=[cell for cell, _ in BAD_CELLS])
def test_bad_declarations_are_refused_with_their_mend(tmp_path, cell, mend):
    with pytest.raises(ValueError) as refusal:
        declared(write_notebook(tmp_path / "01_a.ipynb", parameters=cell))
    assert (
        "01_a.ipynb" in str(refusal.value)
        and mend in str(refusal.value)
        and "\n" not in str(refusal.value)
    )


def test_a_notebook_without_a_parameters_cell_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 cells are tagged `parameters`"):
        declared(write_notebook(tmp_path / "01_a.ipynb", tag="other"))


BAD_FILES = [
    ("", "not a mapping"),
    ("- 1", "not a mapping"),
    ("seed: [1", "not YAML"),
    ("seed: 1\nseed: 2", "seed is there twice"),
    (": 1", "line 1"),
    ("'': 1", "not a name"),
    ("1: 1", "not a name"),
]


@pytest.mark.parametrize("text, mend", BAD_FILES, ids=[text for text, _ in BAD_FILES])
def test_bad_files_are_refused_with_their_mend(tmp_path, text, mend):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as refusal:
        load(file)
    assert (
        "a.yaml" in str(refusal.value)
        and mend in str(refusal.value)
        and "\n" not in str(refusal.value)
    )


def test_a_file_that_is_missing_a_folder_or_no_text_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\xff")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "a.yaml"):
        with pytest.raises(ValueError, match="cannot be read"):
            load(path)


def test_validate_checks_current_values_of_annotated_names():
    namespace = {
        "__annotations__": {"seed": int, "seeds": list[int]},
        "seed": 1,
        "seeds": [0],
        "other": object(),
    }
    assert validate(namespace) == SimpleNamespace(seed=1, seeds=[0])
    with pytest.raises(ValueError, match="write 1.0e-3"):
        validate({"__annotations__": {"learning_rate": float}, "learning_rate": "1e-3"})


def test_a_kernel_started_in_the_notebooks_folder_works_from_the_root(tmp_path, monkeypatch):
    (tmp_path / "params").mkdir()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    validate({})
    assert Path.cwd() == tmp_path
