"""The order of the notebooks; `make run` starts it, and `make labs` the labs. A notebook is executed again when one of its inputs
is newer.

Inputs are the notebook, its parameter file, the grammars that these name, and the modules of lib that it imports, directly or
through others. The output is a stamp, .NN_name.done: `latentree.run` itself moves what a notebook writes into its place, and
leaves what was finished before where it is if the notebook fails, while Snakemake deletes a failed job's outputs.
"""

import ast
import json
import os
import re
import sys
import time
from pathlib import Path

from latentree.data.files import read_yaml

# notebook: the notebooks that must be executed before it
NOTEBOOKS = {
    "01_grammar_design": [],
    "02_training": [],
    "03_induction_heads": ["02_training"],
    "04_function_vectors": ["02_training"],
    "05_hydra_effect": ["02_training"],
    "06_hierarchy_in_stages": ["02_training"],
    "07_olmo": ["02_training"],
    "08_theory_sanity_checks": [],
    "09_is_hierarchy_the_cause": [],
}
LIGHT = {"01_grammar_design"}  # needs no GPU
FIRST = ["02", "07", "09", "06", "03", "04", "05", "08", "01"]  # started in this order: the longest early, so that others fill the other cores

# Relative, for Snakemake does not quote it in jobs on SLURM, which begin in this folder; its own path may have spaces.
sys.executable = os.path.relpath(sys.executable)

PROFILE = config.get("profile", "laptop")
if not Path(f"params/{PROFILE}").is_dir():
    sys.exit(f"error: profile = {PROFILE!r}: no folder params/{PROFILE}")
OUT = f"outputs/{PROFILE}"
GPUS = int(config.get("gpus", 0 if PROFILE in ("smoke", "laptop", "evening") else 1))  # for each job
CORES = workflow.resource_settings.cores or 2  # a cluster does not say how many it has
SLURM = {f"slurm_{name}": config[name] for name in ("account", "partition") if name in config}
HERE = {name: after for name, after in NOTEBOOKS.items() if Path(f"notebooks/{name}.ipynb").exists()}
LABS = {f"labs/{file.stem}": [] for file in sorted(Path(f"params/{PROFILE}/labs").glob("*.yaml"))}

# `make run` has trained all models of all notebooks in one pool before (latentree.run.trainings). With GPUs each training of notebook 02
# is a job of its own, so that a cluster runs them in parallel; the other notebooks then train by themselves.
CARD = f"{OUT}/checkpoints/{{corpus}}/seed-{{seed}}/run_card.json"
GRAMMARS = {file.stem: file for file in sorted(Path("params/grammars").glob("*.yaml"))}


def stamp(name):
    return str(Path(OUT, name).with_name(f".{Path(name).name}.done"))


def code_of(name):
    cells = json.loads(Path(f"notebooks/{name}.ipynb").read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def cards():
    """The trainings of notebook 02."""
    values = read_yaml(f"params/{PROFILE}/02_training.yaml")
    found = []
    for corpus in values["corpora"]:
        seeds = values["seeds"][:1] if corpus in values.get("once", []) else values["seeds"]
        found += expand(CARD, corpus=corpus, seed=seeds)
    return found


def grammars_of(text):
    """The grammar files that a text names, with their controls and their parents."""
    words = re.findall(r"[\w-]+", text)
    wanted = [word + control for word in words for control in ("", "-flat", "-static", "-order3")]
    files = set()
    for name in wanted:
        while name in GRAMMARS and str(GRAMMARS[name]) not in files:
            files.add(str(GRAMMARS[name]))
            name = read_yaml(GRAMMARS[name]).get("parent")
    return sorted(files)


def modules_of(code):
    """The files of lib/latentree that Python code imports, directly or through others."""
    found, unread = set(), [code]
    while unread:
        for node in ast.walk(ast.parse(unread.pop())):
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                files = {Path("lib", *name.split(".")).with_suffix(".py") for name in names}
                new = {file for file in files - found if file.exists()}
                found |= new
                unread += [file.read_text() for file in new]
    return sorted(map(str, found))


def tell():
    """One line for each notebook: done, or failed and where to look."""
    for name in LABS if "labs" in sys.argv else HERE:
        failed, done = Path(OUT, f"{name}.failed.ipynb"), Path(stamp(name)).exists()
        told = f"FAILED, see {failed}" if failed.exists() else "done" if done else "not executed"
        print(f"{name}: {told}", file=sys.stderr)


onsuccess:
    tell()


onerror:
    tell()


rule all:
    input:
        [stamp(name) for name in HERE],
    default_target: True


rule labs:
    input:
        [stamp(name) for name in LABS],


rule train:
    # A finished training stays so: its inputs do not age it, and a job that fails leaves its card.
    input:
        params=ancient(f"params/{PROFILE}/02_training.yaml"),
        grammars=lambda wildcards: [ancient(file) for file in grammars_of(wildcards.corpus)],
    output:
        update(CARD),
    threads: 8
    resources:
        gpu=GPUS,
        **SLURM,
    params:
        python=sys.executable,
        launch=f"-m accelerate.commands.launch --num_processes {GPUS}" if GPUS > 1 else "",
        profile=f"params/{PROFILE}",
        out=OUT,
    shell:
        "{params.python:q} {params.launch} -m latentree.run.trainings --params {params.profile:q} --out {params.out:q}"
        " --notebook 02_training --corpus {wildcards.corpus:q} --seed {wildcards.seed}"


def not_later(files):
    """The files, unless one is dated in the future: what is made now would look older for ever."""
    for file in files:
        if Path(file).stat().st_mtime > time.time() + 60:
            sys.exit(f"error: {file}: is dated in the future; set the clock, or `touch {file}`")
    return files


for done in filter(Path.exists, map(Path, map(stamp, HERE | LABS))):
    if done.stat().st_mtime > time.time() + 60:
        sys.exit(f"error: {done}: is dated in the future, so that no change would be seen; set the clock, or move it elsewhere")

for name, after in (HERE | LABS).items():
    settings = f"params/{PROFILE}/{name}.yaml"
    code = code_of(name)

    rule:
        name:
            name.replace("/", "_")
        input:
            after=[stamp(other) for other in after],
            trained=cards() if GPUS and name == "02_training" else [],
            notebook=not_later([f"notebooks/{name}.ipynb"]),
            params=not_later([settings]),
            others=not_later(grammars_of(code + Path(settings).read_text()) + modules_of(code)),
        output:
            touch(stamp(name)),
        threads: max(1, CORES // 2)  # two run side by side
        resources:
            gpu=0 if name in LIGHT else min(GPUS, 1),
            **SLURM,
        priority: -FIRST.index(name[:2]) if name in HERE else 0
        params:
            python=sys.executable,
            out=str(Path(OUT, name).parent),
        # exec and --follow-parent: when Snakemake is killed the run notices it, and the next one finds the folder free
        shell:
            "exec {params.python:q} -m latentree.run {input.notebook:q} --params {input.params:q}"
            " --out {params.out:q} --follow-parent"
