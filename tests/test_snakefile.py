"""Snakemake goes on after a failure or a kill, and executes again only what a change touches."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import WAIT_ONCE, nothing_runs_in, start, write_project

ROOT = Path(__file__).parents[1]
FIRST, SECOND = "01_grammar_design", "02_training"
LINE = [sys.executable, "-m", "snakemake", "--nolock", "--printshellcmds"]
SNAKEMAKE = [*LINE, "--profile", "profiles/local", "--config", "profile=smoke"]


@pytest.fixture
def project(tmp_path):
    """A function that makes a project with this Snakefile, in a folder with a space."""

    def make(first: list[str], second: list[str]) -> Path:
        root = tmp_path / "a project"
        shutil.copytree(ROOT / "profiles", root / "profiles")
        shutil.copy(ROOT / "Snakefile", root)
        return write_project(root, **{FIRST: first, SECOND: second})

    return make


def snakemake(root: Path, *more: str) -> subprocess.CompletedProcess:
    line = [*SNAKEMAKE, *more]
    return subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=200)


def test_a_failure_goes_on_with_the_others_and_once_mended_only_it_is_executed(project):
    root = project(["raise ValueError('broken')"], [])
    ran = snakemake(root)
    assert ran.returncode != 0 and f"error: {FIRST}: In [3]" in ran.stderr
    told = ran.stderr.splitlines()  # at the end, one line each
    assert f"{FIRST}: FAILED, see outputs/smoke/{FIRST}.failed.ipynb" in told
    assert f"{SECOND}: done" in told
    write_project(root, **{FIRST: []})
    again = snakemake(root)
    assert again.returncode == 0 and FIRST in again.stdout and SECOND not in again.stdout
    assert (root / "outputs/smoke/results/01.json").exists()
    nothing = snakemake(root)
    assert nothing.returncode == 0 and "Nothing to be done" in nothing.stderr and not nothing.stdout


def test_where_the_home_folder_cannot_be_written_in_it_needs_no_cache(project, monkeypatch):
    root = project([], [])
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc")
    ran = snakemake(root, "--until", FIRST)
    assert ran.returncode == 0 and f"{FIRST}: done" in ran.stderr.splitlines(), ran.stderr


def test_killed_in_the_middle_and_started_again_it_finishes(project):
    root = project([], [WAIT_ONCE])
    assert snakemake(root, "--until", FIRST).returncode == 0
    start(SNAKEMAKE, root).kill()
    assert nothing_runs_in(root)
    ran = snakemake(root)
    assert ran.returncode == 0, ran.stderr
    assert SECOND in ran.stdout and FIRST not in ran.stdout


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """This project, with stamps as if all notebooks had been executed."""
    root = tmp_path_factory.mktemp("all")
    for name in ("lib", "notebooks", "params", "profiles", "Snakefile"):
        copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copied(ROOT / name, root / name)
    for path in root.rglob("*"):
        os.utime(path, (1e9, 1e9))
    for path in (root / "notebooks").glob("*.ipynb"):
        stamp = root / f"outputs/smoke/.{path.stem}.done"
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
        os.utime(stamp, (1.1e9, 1.1e9))  # all at once, after their inputs
    return root


@pytest.mark.parametrize(
    "changed, numbers",
    [
        ("notebooks/01_grammar_design.ipynb", "01"),
        ("params/smoke/03_induction_heads.yaml", "03"),
        ("params/grammars/sectioned.yaml", "01 06"),
        ("lib/latentree/exact/two_level.py", "08"),
        ("lib/latentree/run/execution.py", ""),
    ],
)
def test_a_change_executes_again_only_what_it_touches(executed, changed, numbers):
    before = (executed / changed).stat()
    os.utime(executed / changed, (1.2e9, 1.2e9))
    planned = snakemake(executed, "--dry-run", "--quiet", "host")
    os.utime(executed / changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    told = re.findall(r"^rule (\d\d)_", planned.stdout + planned.stderr, re.MULTILINE)
    assert " ".join(sorted(told)) == numbers


def test_on_a_cluster_every_training_is_a_job_with_a_gpu_and_notebooks_follow(tmp_path):
    talkative = (ROOT / "profiles/slurm/config.yaml").read_text().replace("quiet:", "# quiet:")
    (tmp_path / "config.yaml").write_text(talkative)
    settings = ["profile=gpu", "gpus=2", "account=ours", "partition=a100"]
    line = [*LINE, "--profile", str(tmp_path), "--dry-run", "--config", *settings]
    planned = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert planned.returncode == 0, planned.stderr
    told = planned.stdout + planned.stderr
    job = r"rule train:.*?wildcards: corpus=([\w-]+), seed=(\d)\n.*?resources: ([^\n]*)"
    trainings = re.findall(job, told, re.DOTALL)
    assert len(trainings) == 19 and len(set(trainings)) == 19
    needed = ("gpu=2", "slurm_account=ours", "slurm_partition=a100", "runtime=240")
    assert all(need in needs for *_, needs in trainings for need in needed)
    launch = "accelerate.commands.launch --num_processes 2 -m latentree.run.trainings"
    assert told.count(launch) == 19
    notebook = re.search(r"rule 02_training:\n\s+input: ([^\n]*)", told)[1]
    assert notebook.count("run_card.json") == 19
    assert len(re.findall(r"rule 0[1-9]_\w+:", told)) == 9


def test_a_training_that_is_finished_stays_so_when_an_input_is_newer_or_its_job_fails(project):
    """Snakemake removes the output of a job before it starts, and of one that fails."""
    root = project([], [])
    (root / "params/smoke/02_training.yaml").write_text("corpora: [bound]\nseeds: [0]\n")
    (root / "params/grammars").mkdir()
    (root / "params/grammars/bound.yaml").write_text("name: bound\n")  # which no job could read
    card = root / "outputs/smoke/checkpoints/bound/seed-0/run_card.json"
    card.parent.mkdir(parents=True)
    card.write_text("{}")
    os.utime(card, (1e9, 1e9))
    for force in ([], ["--forcerun", "train"]):
        ran = snakemake(root, "gpus=1", "--until", "train", *force)
        assert (ran.returncode != 0) == bool(force) and card.read_text() == "{}", ran.stderr


def test_grammars_that_are_each_others_parents_do_not_hang(project):
    root = project([], [])
    (root / "params/grammars").mkdir()
    for name, parent in (("bound", "other"), ("other", "bound")):
        (root / f"params/grammars/{name}.yaml").write_text(f"name: {name}\nparent: {parent}\n")
    with (root / f"params/smoke/{FIRST}.yaml").open("a") as file:
        file.write("corpora: [bound]\n")
    assert snakemake(root, "--dry-run").returncode == 0


def test_a_job_on_a_cluster_begins_with_this_python_though_its_path_has_a_space(
    project, tmp_path, monkeypatch
):
    root, programs = project([], []), tmp_path / "slurm"
    (root / ".venv").symlink_to(sys.prefix)
    programs.mkdir()
    sbatch = f"printf '%s\\n' \"$@\" >> '{tmp_path}/told'; exit 1"
    for name in ("sbatch", "sacct", "squeue", "sacctmgr", "scontrol"):
        (programs / name).write_text(f"#!/bin/sh\n{sbatch if name == 'sbatch' else 'echo ours'}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    line = [root / ".venv/bin/python", *LINE[1:], "--profile", "profiles/slurm", "--retries", "0"]
    line += ["--slurm-init-seconds-before-status-checks", "1"]
    line += ["--config", "profile=smoke", "gpus=0", "account=ours", "partition=a100"]
    ran = subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=200)
    assert (tmp_path / "told").exists(), ran.stderr
    calls = re.findall(r"^-D\n(.*)\n--wrap=(.*)$", (tmp_path / "told").read_text(), re.MULTILINE)
    assert len(calls) == 2
    for folder, wrapped in calls:
        assert folder == str(root) and Path(root, shlex.split(wrapped)[0]).samefile(sys.executable)


@pytest.mark.parametrize(
    "late", ["params/smoke/02_training.yaml", "notebooks/01_grammar_design.ipynb"]
)
def test_an_input_dated_in_the_future_is_refused_before_anything_runs(project, late):
    root = project([], [])
    ahead = time.time() + 7200
    os.utime(root / late, (ahead, ahead))
    ran = snakemake(root)
    assert ran.returncode != 0 and f"error: {late}: is dated in the future" in ran.stderr
    assert not (root / "outputs").exists()


def test_a_result_dated_in_the_future_is_refused_for_no_change_would_be_seen(project):
    root, ahead = project([], []), time.time() + 7200
    done = root / f"outputs/smoke/.{FIRST}.done"
    done.parent.mkdir(parents=True)
    done.touch()
    os.utime(done, (ahead, ahead))
    ran = snakemake(root)
    assert ran.returncode != 0 and f"{done.relative_to(root)}: is dated in the future" in ran.stderr
