"""A run succeeds as a whole, or fails with one line and leaves what was finished before."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from latentree.data.files import locked
from latentree.run.execution import _publish, main
from latentree.run.record import describe
from tiny import (
    WAIT_ONCE,
    command,
    nothing_runs_in,
    run,
    start,
    write_notebook,
    write_project,
)

NAME = "01_tiny"
IPC = """\
from ipykernel.kernelapp import IPKernelApp
assert IPKernelApp.instance().transport == 'ipc'"""
BAR = """\
import tqdm.auto, sys
for _ in tqdm.auto.tqdm(range(2), file=sys.stdout, bar_format='{n} of 2'): pass"""
SAY = """\
import pathlib, sys
print('in', out)
print('\\x1b[32m' + out + '/a.csv', file=sys.stderr)
figures = pathlib.Path(out, 'figures')
figures.mkdir()
(figures / '01_a.png').touch()"""


def files_of(folder: Path) -> dict:
    """Name and text of every file but locks."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"]
    return {file.relative_to(folder).as_posix(): file.read_text() for file in files}


def one_line(text: str) -> str:
    assert text.count("\n") == 1 and text.startswith("error: "), text
    return text


@pytest.fixture(scope="module")
def succeeded(tmp_path_factory):
    """A project whose notebook ran once, where earlier runs had left their traces."""
    root = tmp_path_factory.mktemp("project")
    write_project(root, **{NAME: [IPC, SAY, BAR, "", "pathlib.Path(checkpoints).mkdir()"]})
    (root / f"params/smoke/{NAME}.yaml").write_text("seed: 3\nlearning_rate: 1\nout: ignored\n")
    for left in (f"{NAME}.failed.ipynb", "results/01.json", "figures/01_old.png", "figures/02.png"):
        (root / "out" / left).parent.mkdir(parents=True, exist_ok=True)
        (root / "out" / left).write_text("old")
    (root / f"out/.{NAME}.partial").mkdir()  # of a run that was killed
    ran = run(root, NAME)
    assert ran.returncode == 0, ran.stderr
    return root, ran


def test_success_replaces_what_an_earlier_run_left(succeeded):
    root, ran = succeeded
    left = files_of(root / "out")
    expected = {f"{NAME}.ipynb", "results/01.json", "figures/01_a.png", "figures/02.png"}
    assert left.keys() == expected | {"run.json"}
    assert json.loads(left["results/01.json"]) == {"claims": []}
    assert (root / "out/checkpoints").is_dir()
    assert ran.stderr == "" and f"{NAME}: in {root}/out" in ran.stdout


def test_the_executed_notebook_names_no_machine(succeeded):
    root, _ = succeeded
    text = (root / "out" / f"{NAME}.ipynb").read_text()
    cells = nbformat.reads(text, as_version=4).cells
    assert str(root) not in text and str(Path.home()) not in text and "partial" not in text
    injected = next(cell for cell in cells if "injected-parameters" in cell.metadata.tags)
    assert 'out = "out"' in injected.source and "seed = 3" in injected.source
    assert 'checkpoints = "out/checkpoints"' in injected.source and "corpora" not in injected.source
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    said = {output.name: output.text for output in outputs}
    assert said.pop("stderr") == "\x1b[32mout/a.csv\n"
    texts = [output.text for output in outputs if output.get("name") == "stdout"]
    assert texts == ["in out\n", "2 of 2\n"]  # a bar as text, at its end


def test_the_record_says_what_was_run(succeeded):
    root, _ = succeeded
    text = (root / "out/run.json").read_text()
    assert str(root) not in text and os.uname().nodename not in text
    entry = json.loads(text)[NAME]
    assert entry["parameters"]["seed"] == 3 and entry["parameters"]["learning_rate"] == 1.0
    assert entry["parameters"]["corpora"] == ["bound", "bound-flat"]  # a default
    assert entry["seeds"] == [3] and entry["version"].startswith("0.1.0-")
    assert entry["wall_seconds"] > 0 and 0.01 < entry["peak_memory_gb"] < 4
    assert entry["versions"]["papermill"] and entry["device"]["cpu"]


def test_only_this_projects_commit_is_told(tmp_path, monkeypatch):
    """Not that of a repository which a project without git happens to lie in."""
    root = write_project(tmp_path / "outer/project", **{NAME: []})
    monkeypatch.chdir(root)

    def git(folder, *arguments):
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        line = ["git", *name, *arguments]
        ran = subprocess.run(line, cwd=folder, check=True, capture_output=True, text=True)
        return ran.stdout.strip()

    git(root.parent, "init")
    assert describe({"profile": "smoke"})["commit"] is None
    elsewhere = git(root.parent, "rev-parse", "--absolute-git-dir")
    for arguments in (("init",), ("add", "."), ("commit", "-m", "a")):
        git(root, *arguments)
    entry = describe({"profile": "smoke"})
    assert len(entry["commit"]) == 40 and entry["dirty"] is False
    for variable in ("GIT_DIR", "GIT_INDEX_FILE"):  # as a hook of another repository has them
        with monkeypatch.context() as hook:
            hook.setenv(variable, elsewhere)
            told = describe({"profile": "smoke"})
            assert (told["commit"], told["dirty"]) == (entry["commit"], False)
    Path("a.txt").touch()
    assert describe({"profile": "smoke"})["dirty"] is True


# ---- failures while it runs


@pytest.fixture
def finished(tmp_path):
    """A function that makes a project with a finished run, which a failure must leave alone."""

    def make(*cells: str) -> Path:
        root = write_project(tmp_path, **{NAME: list(cells)})
        for name in (f"{NAME}.ipynb", "results/01.json", "figures/01_a.png", "run.json"):
            (root / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "out" / name).write_text("{}")
        return root

    return make


def assert_failed(root: Path, before: str = "{}") -> str:
    """What was finished is there as it was; the text of the notebook that failed."""
    left = files_of(root / "out")
    failed = left.pop(f"{NAME}.failed.ipynb")
    expected = {f"{NAME}.ipynb", "results/01.json", "figures/01_a.png", "run.json"}
    assert left == dict.fromkeys(expected, before)
    nbformat.validate(nbformat.reads(failed, as_version=4))
    return failed


@pytest.mark.parametrize(
    "cell, words",
    [
        ("raise ValueError('too\\nfew')", ["In [3] `raise", "ValueError: too few"]),
        ("import sys; sys.exit(0)", ["In [3] `import sys", "SystemExit: 0"]),
        ("import os; os.kill(os.getpid(), 9)", ["In [3] `import os", "Kernel died"]),
    ],
    ids=["error", "exit-0", "killed"],
)
def test_a_failed_cell_is_told_and_leaves_what_was_finished(finished, cell, words):
    root = finished(cell)
    ran = run(root, NAME)
    assert ran.returncode == 1
    for word in [f"error: {NAME}: ", f"see out/{NAME}.failed.ipynb", *words]:
        assert word in one_line(ran.stderr)
    assert_failed(root)


def test_a_notebook_that_writes_no_result_has_not_succeeded(finished):
    root = finished()
    write_notebook(root / f"notebooks/{NAME}.ipynb", "print('all is well')")
    ran = run(root, NAME)
    assert ran.returncode == 1 and "without results/01.json" in one_line(ran.stderr)
    assert_failed(root)


def test_a_second_run_is_refused_and_sigterm_ends_the_first(finished):
    root = finished(WAIT_ONCE)
    first = start(command(NAME), root)
    second = run(root, NAME)
    assert second.returncode == 2 and "another run" in one_line(second.stderr)
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 1
    assert "In [3] `import pathlib, time`: stopped by SIGTERM" in one_line(first.stderr.read())
    assert '"waiting\\n"' in assert_failed(root)  # what was done is kept
    assert nothing_runs_in(root)


def test_kill_9_leaves_no_kernel_and_the_next_run_works(finished):
    root = finished(WAIT_ONCE)
    start(command(NAME), root).kill()
    assert nothing_runs_in(root)
    assert run(root, NAME).returncode == 0
    assert "partial" not in " ".join(files_of(root / "out"))


def test_a_run_that_follows_its_parent_ends_with_it(finished):
    root = finished(WAIT_ONCE)
    line = command(NAME, "--follow-parent")
    parent = start([sys.executable, "-c", f"import subprocess; subprocess.run({line!r})"], root)
    parent.kill()
    assert nothing_runs_in(root)
    assert_failed(root)


# ---- what is around it: a fault there never ends a run, and is told as what it is


def test_a_lock_that_is_left_names_itself_and_nothing_is_lost(finished, monkeypatch):
    """On a file system without flock a lock is a file, which a copied folder brings along."""
    root = finished()
    shim = root / "shim/sitecustomize.py"
    shim.parent.mkdir()
    shim.write_text(
        "import errno, fcntl\n"
        "def flock(fd, operation):\n"
        "    raise OSError(errno.ENOSYS, 'Function not implemented')\n"
        "fcntl.flock = flock\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{shim.parent}:{os.environ.get('PYTHONPATH', '')}")
    for name in (f".{NAME}.lock", ".run.lock"):
        left = root / "out" / name
        left.touch()
        ran = run(root, NAME)
        told = f"{left}: another run holds it; wait, or stop that run; if none is, remove it"
        assert ran.returncode == 2 and told in ran.stderr
        left.unlink()
    assert files_of(root / "out") == dict.fromkeys(
        [f"{NAME}.ipynb", "results/01.json", "figures/01_a.png", "run.json"], "{}"
    )


@pytest.mark.parametrize("kind", ["figures", "results"])
def test_a_folder_that_cannot_be_written_in_is_told_before_a_kernel_starts(finished, kind):
    root = finished()
    shutil.rmtree(root / "out" / kind)
    (root / "out" / kind).symlink_to("/nowhere/there")  # a disk that is not mounted
    before = files_of(root / "out")
    ran = run(root, NAME)
    told = f"{root}/out/{kind}: is no folder to write in; give rights, or another --out"
    assert ran.returncode == 1 and told in one_line(ran.stderr) and "cells" not in ran.stdout
    assert files_of(root / "out") == before


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_that_is_a_link_to_another_disk_gets_all_or_nothing(tmp_path, monkeypatch, fails):
    staging, folder, moved = tmp_path / "staging", tmp_path / "out", os.replace
    for file in ("figures/01_a.png", "results/01.json", "01_a.ipynb"):
        for at, text in ((staging, "new"), (folder, "old")):
            (at / file).parent.mkdir(parents=True, exist_ok=True)
            (at / file).write_text(text)

    def across_disks(source, target):
        if Path(source).parent != Path(target).parent:
            raise OSError(18, "Invalid cross-device link")
        moved(source, target)

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", across_disks)
    monkeypatch.setattr(os, "replace", across_disks)
    if fails:
        monkeypatch.setattr(shutil, "move", full)
        with pytest.raises(OSError, match="No space left"):
            _publish(staging, folder, "01")
    else:
        _publish(staging, folder, "01")
    expected = "old" if fails else "new"
    names = ["01_a.ipynb", "figures/01_a.png", "results/01.json"]
    assert files_of(folder) == dict.fromkeys(names, expected)


@pytest.mark.parametrize("error", ["ENOLCK", "EOPNOTSUPP"])
def test_where_locks_are_refused_a_file_is_the_lock(tmp_path, monkeypatch, error):
    """NFS without its lock service, and file systems in user space."""

    def refuse(file, operation):
        raise OSError(getattr(errno, error), error)

    monkeypatch.setattr(fcntl, "flock", refuse)
    held = tmp_path / ".a.held"
    with locked(tmp_path / ".a.lock"):
        with pytest.raises(TimeoutError, match=rf"{held}: another run \(process {os.getpid()}, on"):
            with locked(tmp_path / ".a.lock"):
                pass
    with locked(tmp_path / ".a.lock"):
        assert held.exists()
    assert not held.exists()


@pytest.mark.parametrize("damaged", ["{", "[]"])
def test_a_damaged_record_is_told_before_a_kernel_starts_and_nothing_is_lost(finished, damaged):
    root = finished()
    (root / "out/run.json").write_text(damaged)
    ran = run(root, NAME)
    assert ran.returncode == 2 and f"{root}/out/run.json: is damaged" in one_line(ran.stderr)
    left = files_of(root / "out")
    assert left.pop("run.json") == damaged
    assert left == dict.fromkeys([f"{NAME}.ipynb", "results/01.json", "figures/01_a.png"], "{}")


@pytest.mark.parametrize("closed", [">&- 2>&-", ">&-", "2>&-"])
def test_a_run_without_standard_output_and_error(finished, closed):
    root = finished("print('said')")
    line = ["sh", "-c", f'exec "$@" {closed}', "sh", *command(NAME)]
    assert subprocess.run(line, cwd=root, timeout=120).returncode == 0
    assert json.loads((root / "out/results/01.json").read_text()) == {"claims": []}


def test_nobody_listens_and_there_is_no_home(finished, monkeypatch):
    root = finished("print('said')")
    monkeypatch.delenv("HOME", raising=False)
    line = [*command(NAME), "--follow-parent"]
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(line, cwd=root, stdout=writer, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((root / "out/results/01.json").read_text()) == {"claims": []}


def test_a_user_whom_nobody_knows_has_no_home_either(tmp_path, monkeypatch):
    """As a container's random number for a user: nltk asks for a home folder on import."""
    (tmp_path / "sitecustomize.py").write_text("import pwd\npwd.getpwuid = {}.__getitem__\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    line = [sys.executable, "-c", "import latentree.data.grammar"]
    ran = subprocess.run(line, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("program", ["git", "nvidia-smi"])
def test_a_program_that_fails_says_nothing_of_a_run(tmp_path, monkeypatch, program):
    """git that distrusts the folder's owner, nvidia-smi without a driver: told on stdout."""
    monkeypatch.chdir(write_project(tmp_path, **{NAME: []}))
    Path(".git").mkdir()
    (tmp_path / program).write_text("#!/bin/sh\necho failed: no such thing; exit 9\n")
    (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    entry = describe({"profile": "smoke"})
    assert entry["commit"] is None and entry["dirty"] is None and entry["device"]["gpus"] == []


def test_another_folder_is_told_as_such(tmp_path, monkeypatch):
    (tmp_path / "params").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not in .*params; start in a clone of the project"):
        describe({"profile": "smoke"})


# ---- bad input: refused before a kernel starts

BAD_FILES = [
    ("sede: 1", "sede is not a parameter", "did you mean seed?"),
    ("learning_rate: 1e-3", "learning_rate = '1e-3'", "write 1.0e-3"),
    ("seed: true", "seed = True", "valid integer"),
    ("seed: -1", "seed = -1", "0 or more"),
    ("corpora: []", "corpora = []", "at least one"),
    ("corpora: [a, a]", "corpora = ['a', 'a']", "only once"),
    ("profile: huge", "profile = 'huge'", "choose one of smoke"),
    ("seed: 1\nseed: 2", "seed", "twice"),
    ("seed: 010", "010 would be read as 8", "'010' in quotes"),  # YAML 1.1
    ("seed: 1:30", "1:30 would be read as 90", "'1:30' in quotes"),
    ("corpora: [no]", "no would be read as False", "'no' in quotes"),
    ("corpora: [null]", "null would be read as None", "'null' in quotes"),
    ("corpora: [2026-11-26]", "would be read as 2026", "'2026-11-26' in quotes"),
    ("seed: 08", "seed = '08'", "write 8"),
    ("on: 3", "on would be read as True", "'on' in quotes"),
    ("corpora:", "nothing would be read as None", "line 1, column 9"),
    ("seed: 1__0", "1__0 would be read as 10", "'1__0' in quotes"),
]


@pytest.mark.parametrize("text, thing, mend", BAD_FILES, ids=[text for text, *_ in BAD_FILES])
def test_a_bad_parameter_file_is_refused(tmp_path, monkeypatch, capsys, text, thing, mend):
    monkeypatch.chdir(write_project(tmp_path, **{NAME: []}))
    Path(f"params/smoke/{NAME}.yaml").write_text(text)
    assert main(command(NAME)[3:]) == 2
    message = one_line(capsys.readouterr().err)
    assert f"params/smoke/{NAME}.yaml" in message and thing in message and mend in message
    assert not Path("out").exists()


def test_a_terminal_that_cannot_print_a_sign_does_not_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    root = write_project(tmp_path, **{NAME: ["print('loss \u2588 \u2192')"]})
    ran = run(root, NAME)
    assert ran.returncode == 0, ran.stderr
    assert f"{NAME}: loss ? ?" in ran.stdout


def test_what_a_shell_says_of_warnings_and_of_bars_does_not_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    monkeypatch.setenv("TQDM_MININTERVAL", "often")
    warns = ["import warnings", "warnings.warn('of a library')", "import seaborn"]
    ran = run(write_project(tmp_path, **{NAME: warns}), NAME)
    assert ran.returncode == 0, ran.stderr
    assert "ignored in the environment: " in ran.stderr
