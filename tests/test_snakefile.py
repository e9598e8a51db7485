"""Snakemake executes every notebook of a fresh clone once, in order, and goes on after a failure or a kill."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import WAIT_ONCE, nothing_runs_in, start, write_project

ROOT = Path(__file__).parents[1]
FIRST, SECOND = "01_grammar_design", "02_training"
SNAKEMAKE = [
    sys.executable,
    "-m",
    "snakemake",
    "--profile",
    "profiles/local",
    "--config",
    "profile=smoke",
]


@pytest.fixture
def project(tmp_path):
    """A function that makes a project with this Snakefile and the cells of two tiny notebooks."""

    def make(first: list[str], second: list[str]) -> Path:
        shutil.copy(ROOT / "Snakefile", tmp_path)
        shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
        return write_project(tmp_path, **{FIRST: first, SECOND: second})

    return make


def snakemake(root: Path) -> subprocess.CompletedProcess:
    return subprocess.run(SNAKEMAKE, cwd=root, capture_output=True, text=True, timeout=200)


def folder_of(root: Path) -> Path:
    line = [sys.executable, "-m", "latentree.run", "--folder-of", "smoke"]
    return (
        root
        / subprocess.run(line, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    )


def test_a_fresh_clone_executes_everything_once(project):
    root = project([], [])
    out = folder_of(root)
    (out / "results").mkdir(parents=True)
    for name in (
        FIRST,
        SECOND,
    ):  # the reading copy, with times that a clone may have: later than all inputs
        for file in (out / f"{name}.ipynb", out / "results" / f"{name[:2]}.json"):
            file.write_text("of the clone")
            os.utime(file, (4e9, 4e9))
    ran = snakemake(root)
    assert ran.returncode == 0, ran.stderr
    assert FIRST in ran.stdout and SECOND in ran.stdout
    assert ran.stdout.index(FIRST) < ran.stdout.index(SECOND)
    assert (
        "of the clone"
        not in (out / f"{FIRST}.ipynb").read_text() + (out / "results/02.json").read_text()
    )
    again = snakemake(root)
    assert again.returncode == 0 and "Nothing to be done" in again.stderr and again.stdout == ""


def test_a_failure_keeps_the_failed_notebook_and_goes_on_with_the_others(project):
    root = project(["raise ValueError('broken')"], [])
    out = folder_of(root)
    ran = snakemake(root)
    assert ran.returncode != 0 and f"error: {FIRST}: In [4]" in ran.stderr
    told = ran.stderr.splitlines()  # at the end, one line each
    assert any(
        re.fullmatch(
            rf"{FIRST}: FAILED: In \[4\].*ValueError: broken; see .*{FIRST}.failed.ipynb", line
        )
        for line in told
    )
    assert any(re.fullmatch(rf"{SECOND}: done in \d\.\d min, \d\.\d GB", line) for line in told)
    assert (out / f"{FIRST}.failed.ipynb").exists() and not (out / f"{FIRST}.ipynb").exists()
    assert sorted(path.name for path in (out / "results").iterdir()) == ["02.json"]


def test_killed_in_the_middle_and_started_again_it_finishes(project):
    root = project([], [WAIT_ONCE])
    killed = start(SNAKEMAKE, root)
    killed.kill()
    assert nothing_runs_in(root)
    ran = snakemake(root)
    assert ran.returncode == 0, ran.stderr
    assert SECOND in ran.stdout and FIRST not in ran.stdout
    assert sorted(path.name for path in (folder_of(root) / "results").iterdir()) == [
        "01.json",
        "02.json",
    ]


def test_on_a_cluster_every_training_is_a_job_with_a_gpu_and_notebooks_follow(tmp_path):
    talkative = [
        text
        for text in (ROOT / "profiles/slurm/config.yaml").read_text().splitlines()
        if not text.startswith("quiet")
    ]
    (tmp_path / "config.yaml").write_text("\n".join(talkative))
    line = [
        sys.executable,
        "-m",
        "snakemake",
        "--profile",
        str(tmp_path),
        "--dry-run",
        "--printshellcmds",
        "--config",
        "profile=gpu",
        "gpus=2",
    ]
    planned = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert planned.returncode == 0, planned.stderr
    told = planned.stdout + planned.stderr
    trainings = re.findall(
        r"rule train:.*?wildcards: corpus=([\w-]+), seed=(\d)\n.*?resources: ([^\n]*)",
        told,
        re.DOTALL,
    )
    assert len(trainings) == 21 and len(set(trainings)) == 21
    assert all(
        "gpu=2" in needs and "slurm_partition=gpu" in needs and "runtime=240" in needs
        for *_, needs in trainings
    )
    assert (
        told.count("accelerate.commands.launch --num_processes 2 -m latentree.train.jobs") == 21
    )
    notebook = re.search(r"rule 02_training:\n\s+input: ([^\n]*)", told).group(1)
    assert notebook.count("run_card.json") == 21
    assert len(re.findall(r"rule 0[1-8]_\w+:", told)) == 8
