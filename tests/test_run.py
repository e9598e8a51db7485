"""A run either succeeds as a whole or fails with its own exit code, one line, and nothing half-written."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from filelock import FileLock
from latentree.run.execute import Progress
from latentree.run.execution import (
    BAD_INPUT,
    BUSY,
    CELL_ERROR,
    DEAD_KERNEL,
    NO_RESULT,
    TIMED_OUT,
    main,
)
from latentree.run.record import output_folder, version_of, without_machine
from tiny import (
    PARAMETERS,
    WAIT_ONCE,
    command,
    nothing_runs_in,
    run,
    start,
    write_notebook,
    write_project,
)

NAME = "01_tiny"


def one_line(text: str) -> str:
    assert text.count("\n") == 1 and text.endswith("\n"), text
    return text


def assert_failed(root: Path, name: str = NAME):
    """The folder holds the failed notebook, and neither a result nor anything half-written."""
    left = {
        path.relative_to(root / "out").as_posix()
        for path in (root / "out").rglob("*")
        if path.is_file()
    }
    assert left <= {
        f"{name}.failed.ipynb",
        f".{name}.failure",
        f".{name}.lock",
        ".run.lock",
        "run.json",
    }
    assert (root / "out" / f".{name}.failure").read_text().endswith(f"{name}.failed.ipynb")
    nbformat.validate(nbformat.read(root / "out" / f"{name}.failed.ipynb", as_version=4))


# ---- success


@pytest.fixture(scope="module")
def succeeded(tmp_path_factory):
    """A project whose notebook ran once, after a failed run had left its traces."""
    root = tmp_path_factory.mktemp("project")
    ipc = "from ipykernel.kernelapp import IPKernelApp\nassert IPKernelApp.instance().transport == 'ipc'"
    warn = (
        "import sys\nprint('in', out)\nprint('\\x1b[32m' + out + '/tables/a.csv', file=sys.stderr)"
    )
    write_project(root, **{NAME: [ipc, warn, ""]})
    params = root / "params" / "smoke" / f"{NAME}.yaml"
    params.write_text(
        f"seed: 3\nlearning_rate: 1\nout: ignored\ncheckpoint: {root}/out/checkpoints/1\n"
    )
    (root / "out" / "results").mkdir(parents=True)
    (root / "out" / f"{NAME}.failed.ipynb").write_text("old")
    (root / "out" / "results" / "01.json").write_text("old")
    ran = run(root, NAME)
    assert ran.returncode == 0, ran.stderr
    return root, ran


def test_success_leaves_the_notebook_its_result_and_a_record(succeeded):
    root, ran = succeeded
    left = sorted(
        path.relative_to(root / "out").as_posix()
        for path in (root / "out").rglob("*")
        if path.is_file()
    )
    assert left == [f".{NAME}.lock", ".run.lock", f"{NAME}.ipynb", "results/01.json", "run.json"]
    assert json.loads((root / "out/results/01.json").read_text())["claims"] == []
    assert ran.stderr == "" and f"{NAME}: in {root}/out" in ran.stdout and "cells" in ran.stdout


def test_the_executed_notebook_keeps_outputs_and_names_no_machine(succeeded):
    root, _ = succeeded
    text = (root / "out" / f"{NAME}.ipynb").read_text()
    cells = nbformat.reads(text, as_version=4).cells
    assert str(root) not in text and str(Path.home()) not in text
    injected = next(cell for cell in cells if "injected-parameters" in cell.metadata.tags)
    assert 'out = "out"' in injected.source and "seed = 3" in injected.source
    streams = {
        output.name: output.text
        for cell in cells
        for output in cell.get("outputs", [])
        if "name" in output
    }
    assert streams == {"stdout": "in out\n", "stderr": "\x1b[32mout/tables/a.csv\n"}


def test_the_record_says_what_was_run_and_names_no_machine(succeeded):
    root, _ = succeeded
    text = (root / "out" / "run.json").read_text()
    record = json.loads(text)
    entry = record["notebooks"][NAME]
    assert str(root) not in text and os.uname().nodename not in text
    assert record["profile"] == "smoke" and entry["seeds"] == [3]
    assert entry["parameters"] == {
        "profile": "smoke",
        "seed": 3,
        "learning_rate": 1.0,
        "checkpoint": "out/checkpoints/1",
    }
    assert entry["commit"] is None and entry["dirty"] is None
    assert entry["wall_seconds"] > 0 and 0.01 < entry["peak_memory_gb"] < 4
    assert (
        entry["versions"]["papermill"]
        and entry["device"]["cpu"]
        and entry["started"].endswith("+00:00")
    )


def test_plain_papermill_runs_the_same_notebook_and_only_warns_of_an_unknown_parameter(tmp_path):
    root = write_project(tmp_path, **{NAME: []})
    (root / "a.yaml").write_text("sede: 1\nout: plain\n")
    papermill = [
        sys.executable,
        "-m",
        "papermill",
        f"notebooks/{NAME}.ipynb",
        "a.ipynb",
        "-f",
        "a.yaml",
    ]
    ran = subprocess.run(papermill, cwd=root, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and "Passed unknown parameter: sede" in ran.stderr
    assert (root / "plain/results/01.json").exists()


def test_a_redrawn_bar_takes_a_line_every_few_seconds_and_text_passes_at_once(capsys):
    progress = Progress("01")
    for text in ["\r 1%", "\r 2%", "\r 3%", "\r100%\n", "done\nhalf", " a line\n", "\n"]:
        progress.write(text)
    assert capsys.readouterr().out.splitlines() == [
        "01:  1%",
        "01: 100%",
        "01: done",
        "01: half a line",
    ]


# ---- failures while it runs


@pytest.mark.parametrize(
    "cell, code, words",
    [
        ("raise ValueError('too\\nfew')", CELL_ERROR, ["In [4] `raise", "ValueError: too few"]),
        ("import sys; sys.exit(0)", NO_RESULT, ["In [4]", "sys.exit"]),
        ("import os; os.kill(os.getpid(), 9)", DEAD_KERNEL, ["In [4] `import os", "kernel died"]),
    ],
    ids=["error", "exit-0", "killed"],
)
def test_a_failed_cell_has_its_own_exit_code(tmp_path, cell, code, words):
    root = write_project(tmp_path, **{NAME: [cell]})
    ran = run(root, NAME)
    assert ran.returncode == code
    for word in [NAME, "see out/01_tiny.failed.ipynb", *words]:
        assert word in one_line(ran.stderr)
    assert_failed(root)


def test_a_notebook_that_writes_no_result_has_not_succeeded(tmp_path):
    root = write_project(tmp_path, **{NAME: []})
    write_notebook(root / "notebooks" / f"{NAME}.ipynb", "print('all is well')")
    (root / "out/results").mkdir(parents=True)
    (root / "out/results/01.json").write_text('{"claims": []}')
    (root / "out" / f"{NAME}.ipynb").write_text("of an earlier run")
    ran = run(root, NAME)
    assert ran.returncode == NO_RESULT and "write_results" in one_line(ran.stderr)
    assert_failed(root)


def test_a_time_out_ends_the_kernel(tmp_path):
    root = write_project(tmp_path, **{NAME: [WAIT_ONCE]})
    ran = run(root, NAME, "--timeout", "3")
    assert ran.returncode == TIMED_OUT and "--timeout" in one_line(ran.stderr)
    assert_failed(root)
    assert nothing_runs_in(root)


def test_a_second_run_is_refused_and_sigterm_ends_the_first(tmp_path, monkeypatch, capsys):
    root = write_project(tmp_path, **{NAME: [WAIT_ONCE]})
    first = start(command(NAME), root)
    monkeypatch.chdir(root)
    assert main(command(NAME)[3:]) == BUSY
    assert "another run" in one_line(capsys.readouterr().err)
    first.send_signal(signal.SIGTERM)
    assert first.wait(20) == 128 + signal.SIGTERM
    assert "SIGTERM" in one_line(first.stderr.read())
    assert_failed(root)
    assert (
        '"waiting\\n"' in (root / "out" / f"{NAME}.failed.ipynb").read_text()
    )  # what was done is kept
    assert nothing_runs_in(root)
    FileLock(root / "out" / f".{NAME}.lock").acquire(timeout=0)


def test_kill_9_leaves_no_kernel_and_no_lock(tmp_path):
    root = write_project(tmp_path, **{NAME: [WAIT_ONCE]})
    first = start(command(NAME), root)
    first.kill()
    assert nothing_runs_in(root)
    FileLock(root / "out" / f".{NAME}.lock").acquire(timeout=0)


def test_a_run_that_follows_its_parent_ends_with_it(tmp_path):
    root = write_project(tmp_path, **{NAME: [WAIT_ONCE]})
    line = [
        sys.executable,
        "-c",
        f"import subprocess; subprocess.run({command(NAME, '--follow-parent')!r})",
    ]
    parent = start(line, root)
    assert (
        len(psutil.Process(parent.pid).children(recursive=True)) == 3
    )  # the run, papermill, the kernel
    parent.kill()
    assert nothing_runs_in(root)
    assert_failed(root)


# ---- bad input: refused before a kernel starts

BAD_FILES = [
    ("sede: 1", "sede", "did you mean seed?"),
    ("learning_rate: 1e-3", "learning_rate = '1e-3'", "write 1.0e-3"),
    ("seed: one", "seed = 'one'", "whole number"),
    ("seed: 1.5", "seed = 1.5", "whole number"),
    ("seed: true", "seed = True", "whole number"),
    ("seed:", "seed = None", "whole number"),
    ("seed: -1", "seed = -1", "0 or more"),
    ("seed: 1\nseed: 2", "line 2: seed is there twice", "keep one"),
    ("learning_rate: 2.0", "learning_rate = 2.0", "at most 1"),
    ("learning_rate: .inf", "learning_rate = inf", "a number"),
    ("profile: huge", "profile = 'huge'", "smoke, laptop, gpu, paper"),
    ("profile: gpu", "profile 'gpu'", "choose one of smoke"),
    ("out: ''", "out = ''", "folder"),
    ("checkpoint: [a]", "checkpoint = ['a']", "text in quotes"),
    ("- seed", "not a mapping", "name: value"),
    ("", "None, not a mapping", "name: value"),
    ("seed: {", "not YAML", "name: value"),
    ("? [1]\n: 2", "is not a name", "name: value"),
]
BAD_CELLS = [
    ("seed = 0", "`seed = 0`", "name: type = literal"),
    ("seed: int = 0  # seed", "declares no `out`", "add `out"),
    (PARAMETERS + "a: set = {}  # set", "type set", "choose one of"),
    (PARAMETERS + "a: int = len('')  # length", "len('')", "not a literal"),
]
BAD_ARGUMENTS = [
    ({"notebook": "notebooks/none.ipynb"}, "notebooks/none.ipynb", "name a notebook"),
    ({"notebook": "notebooks"}, "notebooks", "name a notebook"),
    ({"notebook": "old.ipynb"}, "format 3", "format 4"),
    ({"notebook": "params/smoke/01_tiny.yaml"}, "01_tiny.yaml: is not a notebook", ".ipynb"),
    ({"--params": "none.yaml"}, "none.yaml", "name a YAML file"),
    ({"--params": "params"}, "params", "name a YAML file"),
    ({"--out": "params/smoke/01_tiny.yaml"}, "--out", "another folder"),
    ({"--out": "/proc/out"}, "--out /proc/out", "another folder"),
    ({"--out": "x" * 300}, "--out", "another folder"),
    ({"--timeout": "0"}, "--timeout 0", "greater than 0"),
    ({"--timeout": "soon"}, "'soon'", "--help"),
    ({"--folder-of": "huge"}, "'huge'", "choose one of smoke"),
    ({"--parms": "a.yaml"}, "--parms", "--help"),
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(write_project(tmp_path, **{NAME: []}))
    (tmp_path / "old.ipynb").write_text('{"nbformat": 3, "worksheets": []}')
    return tmp_path


def assert_refused(project, capsys, thing, mend, change={}):
    before = sorted(project.rglob("*"))
    given = {
        "notebook": f"notebooks/{NAME}.ipynb",
        "--params": f"params/smoke/{NAME}.yaml",
        "--out": "out",
    } | change
    line = [
        word
        for name, value in given.items()
        for word in ([] if name == "notebook" else [name]) + [value]
    ]
    assert main(line) == BAD_INPUT
    message = one_line(capsys.readouterr().err)
    assert message.startswith("error: ") and thing in message and mend in message
    assert sorted(project.rglob("*")) == before


@pytest.mark.parametrize("text, thing, mend", BAD_FILES, ids=[text for text, *_ in BAD_FILES])
def test_a_bad_parameter_file_is_refused(project, capsys, text, thing, mend):
    (project / f"params/smoke/{NAME}.yaml").write_text(text)
    assert_refused(project, capsys, thing, mend)


@pytest.mark.parametrize("cell, thing, mend", BAD_CELLS, ids=[thing for _, thing, _ in BAD_CELLS])
def test_a_bad_parameters_cell_is_refused(project, capsys, cell, thing, mend):
    write_notebook(project / f"notebooks/{NAME}.ipynb", parameters=cell)
    assert_refused(project, capsys, thing, mend)


@pytest.mark.parametrize(
    "change, thing, mend", BAD_ARGUMENTS, ids=[str(change)[:40] for change, *_ in BAD_ARGUMENTS]
)
def test_bad_arguments_are_refused(project, capsys, change, thing, mend):
    assert_refused(project, capsys, thing, mend, change)


def test_missing_arguments_are_refused(project, capsys):
    assert main([f"notebooks/{NAME}.ipynb"]) == BAD_INPUT
    assert "--params" in one_line(capsys.readouterr().err)


# ---- where outputs lie


def test_the_folder_of_a_profile_changes_with_its_parameters_and_with_any_grammar(project, capsys):
    (project / "params/grammars").mkdir()
    assert main(["--folder-of", "smoke"]) == 0
    assert capsys.readouterr().out == f"outputs/smoke-{version_of('smoke')}\n"
    seen = {output_folder("smoke")}
    (project / f"params/smoke/{NAME}.yaml").write_text("seed: 4\n")
    seen.add(output_folder("smoke"))
    (project / "params/grammars/bound.yaml").write_text("a: 1\n")
    seen.add(output_folder("smoke"))
    (project / "params/laptop").mkdir()
    (project / "params/laptop/01_tiny.yaml").write_text("seed: 5\n")
    seen.add(output_folder("smoke"))
    assert len(seen) == 3


def test_texts_lose_the_machine_but_nothing_else(project):
    folder, home = project / "out", Path.home()
    texts = [
        f"{folder}/a.csv",
        f"\n{project}/lib/a.py:3",
        f"\x1b[32m{project}\x1b[0m",
        f"{home}/b",
        f"{project}s/c",
        1,
    ]
    shown = without_machine({"texts": texts}, folder)["texts"]
    assert shown[:4] == ["out/a.csv", "\nlib/a.py:3", "\x1b[32m.\x1b[0m", "~/b"]
    assert shown[4].endswith(f"{project.name}s/c") and shown[5] == 1
