"""Every notebook, executed at smoke scale in the order of the Snakefile, with assertions on its result file."""

import ast
import json
import re
import statistics
from pathlib import Path
from textwrap import indent

import nbformat
import pytest
from latentree.run.execution import CELL_ERROR, output_folder
from latentree.run.execution import main as run
from latentree.run.exercises import has_tag, student_copy
from latentree.run.parameters import check, declared, load

NOTEBOOKS = sorted(Path("notebooks").glob("[0-9][0-9]_*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
CLAIMS = {
    "01_grammar_design": {
        "long-range-pcfg",
        "no-long-range-flat",
        "no-long-range-n-gram",
        "released-ngram-has-little-to-learn",
    },
    "02_training": {
        "latents-recovered",
        "reaches-in-context-counts",
        "more-with-every-sentence",
        "flat-stays-flat",
        "static-learned-in-weights",
    },
    "03_induction_heads": {
        "induction-on-pcfg",
        "induction-on-pcfg-exclusive-order-1",
        "induction-before-bound-words",
        "induction-on-released-small",
        "induction-not-on-flat",
        "induction-not-on-ngram",
        "induction-not-on-released-ngram",
        "none-before-bound-words-flat",
        "none-before-bound-words-n-gram",
        "as-released-on-bound",
        "as-released-not-on-bound-order3",
        "as-released-not-on-released-ngram",
        "induction-heads-matter",
    },
    "04_function_vectors": {
        "fv-on-pcfg",
        "fv-beyond-copying",
        "fv-on-bound",
        "fv-beyond-copying-on-bound",
        "fv-specific-to-latent",
        "fv-says-its-words",
        "fv-linear",
        "copy-prompt-on-pcfg",
        "fv-not-on-released-small-flat",
        "fv-not-on-bound-flat",
        "fv-not-on-bound-order3",
        "fv-not-on-released-ngram",
        "fv-any-improvement-on-released-small",
        "fv-any-improvement-on-bound",
        "fv-any-improvement-on-released-ngram",
    },
    "05_hydra_effect": {
        f"{question}-on-{name}"
        for question in ("figure-4", "hydra", "hydra-beyond-random")
        for name in ("pcfg", "pcfg-deeper", "released-small")
    }
    | {
        "hydra-not-on-bound-flat",
        "hydra-not-on-ngram",
        "hydra-not-on-released-ngram",
        "hydra-more-than-flat",
        "self-repair-of-a-head-on-pcfg",
        "self-repair-of-a-head-on-pcfg-deeper",
        "as-released-on-bound",
        "as-released-on-bound-flat",
        "as-released-on-released-small",
        "as-released-on-bound-order3",
        "as-released-not-on-released-ngram",
    },
    "06_hierarchy_in_stages": {
        "shallow-before-deep",
        "syntax-after-frequencies",
        "section-after-document",
        "no-latents-on-flat",
        "tree-beyond-position",
        "tree-beyond-position-by-uuas",
        "tree-beyond-position-by-depth",
        "tree-beyond-last-4-roles",
        "tree-beyond-last-8-roles",
        "tree-after-legal-mass",
        "tree-after-syntax",
        "tree-beyond-position-on-pcfg",
    }
    | {
        f"{claim}-{name}"
        for claim in (
            "shallow-before-deep-on",
            "legal-mass-saturates-early-on",
            "subject-verb-mass-is-exact-on",
            "near-the-ideal-reader-on",
            "latent-beyond-untrained-on",
        )
        for name in ("bound", "released-small")
    },
    "07_olmo": {
        f"{series}-{claim}"
        for series in ("series", "olmo")
        for claim in (
            "induction",
            "induction-head-matters",
            "function-vector",
            "hydra",
            "induction-as-released",
            "hydra-as-released",
        )
    },
    "08_theory_sanity_checks": {
        "theorem-1-window",
        "models-use-more",
        "window-exact",
        "long-memory-pays",
        "theorem-1-distance",
        "theorem-1-distance-used",
        "theorem-1-reuse",
        "theorem-1-reuse-at-cues",
        "theorem-1-reuse-anywhere",
        "theorem-1-reuse-by-the-current-segment",
        "rereads-raw-tokens",
        "theorem-3-specialisation",
        "theorem-3-specialisation-beyond-flat",
        "theorem-4-hydra",
        "theorem-4-hydra-of-heads",
        "a2",
        "a2-not-negligible",
        "a5a",
        "a5b",
        "a6",
        "a6-beyond-random",
    }
    | {
        f"hierarchical-over-{flat}-{metric}"
        for flat in ("flat", "released-flat")
        for metric in ("layer-hydra", "head-hydra", "induction", "function-vector")
    }
    | {
        f"as-released-hierarchical-over-{flat}-{metric}"
        for flat in ("flat", "released-flat")
        for metric in ("layer-hydra", "induction")
    },
}


def cells(path, kind):
    return [
        "".join(c["source"])
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == kind
    ]


def verdicts_of(path):
    return {claim["id"]: claim["verdict"] for claim in json.loads(path.read_text())["claims"]}


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """All notebooks executed one after the other into one folder: later ones read the checkpoints of 02.

    The exercises are appended a second time, with stubs for solutions; what their checks then say is printed.
    """
    out, sources = tmp_path_factory.mktemp("smoke"), tmp_path_factory.mktemp("notebooks")
    codes = {}
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, 4)
        for cell in student_copy(notebook).cells:
            if has_tag(cell, "check"):
                cell.source = f"try:\n{indent(cell.source, '    ')}\nexcept AssertionError as error:\n    print('stub:', error)"
            if has_tag(cell, "solution") or has_tag(cell, "check"):
                notebook.cells.append(nbformat.v4.new_code_cell(cell.source))
        nbformat.write(notebook, sources / path.name)
        codes[path.stem] = run(
            [
                str(sources / path.name),
                "--params",
                f"params/smoke/{path.stem}.yaml",
                "--out",
                str(out),
            ]
        )
    return out, codes


@pytest.mark.parametrize("name", NAMES)
def test_notebook_executes_and_leaves_its_results(smoke, name):
    out, codes = smoke
    assert codes[name] == 0
    results = json.loads((out / "results" / f"{name[:2]}.json").read_text())
    assert results["notebook"] == name and results["profile"] == "smoke"
    assert {claim["id"] for claim in results["claims"]} == CLAIMS[name]
    for claim in results["claims"]:
        if claim["value"] is not None:
            assert claim["low"] <= claim["high"] and claim["n"] > 0 and claim["rule"]
        assert claim["verdict"] in ("reproduced", "not reproduced", "not testable here")
    executed = json.loads((out / f"{name}.ipynb").read_text())
    figures = [
        o
        for c in executed["cells"]
        for o in c.get("outputs", [])
        if "image/png" in o.get("data", {})
    ]
    assert len(figures) >= 3 and len(list((out / "figures").glob(f"{name[:2]}_*.png"))) == len(
        figures
    )
    assert "Warning" not in json.dumps([c.get("outputs") for c in executed["cells"]])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_checks_of_exercises_tell_solutions_from_stubs(smoke, path):
    executed = nbformat.read(smoke[0] / path.name, 4)
    numbers = [str(n) for n in range(1, 1 + sum(has_tag(cell, "check") for cell in executed.cells))]
    right = "".join(
        o.get("text", "") for cell in executed.cells if has_tag(cell, "check") for o in cell.outputs
    )
    assert (
        list(dict.fromkeys(re.findall(r"^Exercise (\d+).*: right$", right, re.MULTILINE)))
        == numbers
    )
    said = "".join(
        o.get("text", "") for cell in executed.cells[-2 * len(numbers) :] for o in cell.outputs
    )
    assert re.findall(r"^stub: Exercise (\d+).*: not yet: ", said, re.MULTILINE) == numbers


def test_results_are_measured_and_not_typed(smoke):
    """At smoke scale nothing is learned: the very claims that hold on the laptop must fail here."""
    out, _ = smoke
    for number, ids in (
        ("02", ("latents-recovered", "more-with-every-sentence")),
        ("03", ("induction-on-pcfg", "induction-before-bound-words", "induction-heads-matter")),
        ("04", ("fv-on-pcfg", "fv-beyond-copying", "fv-specific-to-latent", "fv-says-its-words")),
        ("05", ("figure-4-on-pcfg", "hydra-more-than-flat")),
        (
            "06",
            (
                "legal-mass-saturates-early-on-bound",
                "near-the-ideal-reader-on-bound",
                "tree-beyond-position",
            ),
        ),
        ("08", ("theorem-1-window", "theorem-1-distance-used", "rereads-raw-tokens")),
    ):
        verdicts = verdicts_of(out / "results" / f"{number}.json")
        assert [verdicts[name] for name in ids] == ["not reproduced"] * len(ids)
    # a local series says nothing of the real one
    olmo = json.loads((out / "results" / "07.json").read_text())["claims"]
    assert {c["verdict"] for c in olmo if c["id"].startswith("olmo-")} == {"not testable here"}
    assert [c["verdict"] for c in olmo if c["id"] == "series-induction"] == ["not reproduced"]
    # nothing formed, so an absence says nothing
    assert verdicts_of(out / "results" / "03.json")["induction-not-on-flat"] == "not testable here"
    assert (
        verdicts_of(out / "results" / "04.json")["fv-not-on-released-small-flat"]
        == "not testable here"
    )
    exact = {c["id"]: c for c in json.loads((out / "results" / "01.json").read_text())["claims"]}
    assert exact["released-ngram-has-little-to-learn"]["verdict"] == "reproduced"
    assert exact["long-range-pcfg"]["value"] == pytest.approx(0.0285, abs=0.02)


def test_run_record_names_everything_but_the_machine(smoke):
    out, _ = smoke
    record = json.loads((out / "run.json").read_text())
    assert set(record["notebooks"]) == set(NAMES)
    for entry in record["notebooks"].values():
        assert entry["wall_seconds"] > 0 and entry["peak_memory_gb"] > 0 and entry["seeds"][0] == 0
    assert str(out) not in json.dumps(record)
    shown = record["notebooks"]["07_olmo"]["series"]
    assert shown["repository"] == "latentree/olmo-small" and len(shown["revisions"]) == 3
    assert all(
        len(found["commit"]) == 40 and found["files"] for found in shown["revisions"].values()
    )


def test_unknown_corpus_is_told_in_one_line_and_leaves_nothing(tmp_path, capfd):
    params = tmp_path / "wrong.yaml"
    params.write_text("profile: smoke\ncorpus: bouund\n")
    assert (
        run([str(NOTEBOOKS[0]), "--params", str(params), "--out", str(tmp_path / "out")])
        == CELL_ERROR
    )
    line = capfd.readouterr().err.strip()
    assert (
        "\n" not in line
        and "corpus 'bouund': no file params/grammars/bouund.yaml; corpora there: bound, " in line
    )
    assert [path.name for path in (tmp_path / "out").glob("*.ipynb")] == [
        "01_grammar_design.failed.ipynb"
    ]
    assert not list((tmp_path / "out" / "results").iterdir())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebook_reads_like_one(path):
    """Prose before every code cell, short cells, no outputs in the source, a parameters cell that is checked."""
    notebook = json.loads(path.read_text())
    kinds = [
        cell["cell_type"]
        for cell in notebook["cells"]
        if "check" not in cell["metadata"].get("tags", [])
    ]  # checks follow solutions
    assert all(before == "markdown" for before, kind in zip(kinds, kinds[1:]) if kind == "code")
    lengths = [
        len([line for line in source.splitlines() if line.strip()])
        for source in cells(path, "code")
    ]
    assert max(lengths) <= 25 and statistics.median(lengths) <= 8
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    text = "\n".join(cells(path, "markdown"))
    for part in (
        "**Question.**",
        "**The claim.**",
        "**What you will see.**",
        "**Time and hardware.**",
        "## Limits",
        "## Try it yourself",
    ):
        assert part in text
    assert len(re.findall(r"\w+", text)) < 12_000
    for source in cells(path, "code"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 15, f"{node.name} belongs in lib"


@pytest.mark.parametrize("path", [p for p in sorted(Path("params").glob("*/[0-9]*.yaml"))], ids=str)
def test_parameter_files_suit_their_notebooks(path):
    notebook = Path("notebooks") / f"{path.stem}.ipynb"
    values = check(load(path), declared(notebook))
    assert values["profile"] == path.parent.name


def test_reading_copy_is_of_these_parameters():
    """The committed outputs are those of the laptop's parameter files as they are."""
    folder = output_folder("laptop")
    for name in NAMES:
        results = json.loads((folder / "results" / f"{name[:2]}.json").read_text())
        assert results["profile"] == "laptop"
        executed = json.loads((folder / f"{name}.ipynb").read_text())
        sources = [
            "".join(c["source"])
            for c in executed["cells"]
            if c["cell_type"] == "code"
            and "injected-parameters" not in c["metadata"].get("tags", [])
        ]
        assert sources == cells(Path(f"notebooks/{name}.ipynb"), "code"), (
            f"{name} changed after it was executed"
        )
    assert [other.name for other in Path("outputs").glob("laptop-*")] == [folder.name]
    assert (
        sum(file.stat().st_size for file in folder.rglob("*") if "checkpoints" not in file.parts)
        < 6_000_000
    )


def test_reading_copy_shows_what_the_project_promises_on_a_laptop():
    folder = output_folder("laptop") / "results"
    promised = {
        "01": {"long-range-pcfg"},
        "02": {"latents-recovered", "reaches-in-context-counts", "flat-stays-flat"},
        "03": {
            "induction-on-pcfg",
            "induction-not-on-flat",
            "induction-not-on-ngram",
            "induction-heads-matter",
        },
        "04": {
            "fv-on-pcfg",
            "fv-beyond-copying",
            "fv-specific-to-latent",
            "fv-says-its-words",
            "fv-not-on-released-small-flat",
        },
        "06": {
            "shallow-before-deep",
            "legal-mass-saturates-early-on-bound",
            "no-latents-on-flat",
            "tree-beyond-position",
        },
    }
    for number, ids in promised.items():
        verdicts = verdicts_of(folder / f"{number}.json")
        assert {name: verdicts[name] for name in ids} == dict.fromkeys(ids, "reproduced")


def test_models_of_the_reading_copy_write_legal_sentences():
    executed = json.loads((output_folder("laptop") / "02_training.ipynb").read_text())
    printed = "".join(
        "".join(o["text"])
        for c in executed["cells"]
        for o in c.get("outputs", [])
        if o["output_type"] == "stream"
    )
    counts = re.findall(r"(\d+) of (\d+) sentences are legal", printed)
    assert len(counts) >= 5 and all(
        int(total) > 100 and int(legal) > 0.9 * int(total) for legal, total in counts
    )


def test_readme_shows_a_figure_that_is_there():
    figures = re.findall(r"!\[.*?\]\((.*?)\)", Path("README.md").read_text())
    assert figures and all(Path(figure).is_file() for figure in figures)
