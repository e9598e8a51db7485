"""The order of the notebooks; `make run` starts it. A notebook is executed again when one of its inputs is newer.

A notebook's output is a stamp, .NN_name.done, that git ignores, beside its result. git gives the files of a fresh
clone arbitrary times, and the reading copy under outputs/ comes with its results; but a clone has no stamps, so its
first run executes every notebook, and the next one executes none. The executed notebook is neither an output nor a log:
Snakemake deletes a failed job's outputs and fills in its missing logs with empty files, while latentree.run.execution leaves
either NN_name.ipynb or NN_name.failed.ipynb.
"""

import sys
from pathlib import Path

from latentree.data.files import read_yaml
from latentree.run.execution import output_folder, summary

# notebook: the notebooks that must be executed before it
NOTEBOOKS = {
    "01_grammar_design": [],
    "02_training": [],
    "03_induction_heads": ["02_training"],
    "04_function_vectors": ["02_training"],
    "05_hydra_effect": ["02_training"],
    "06_hierarchy_in_stages": ["02_training"],
    "07_olmo": ["03_induction_heads", "04_function_vectors", "05_hydra_effect"],
    "08_theory_sanity_checks": [],
}
LIGHT = {"01_grammar_design"}  # needs no GPU
FIRST = ["01", "02", "06", "03", "04", "05", "08", "07"]  # started in this order: the longest early, so that others fill the other cores

PROFILE = config.get("profile", "laptop")
GPUS = int(config.get("gpus", 0 if PROFILE in ("laptop", "smoke") else 1))  # for each job
CORES = workflow.cores or 2  # a cluster does not say how many it has
try:
    OUT = output_folder(PROFILE).as_posix()
except ValueError as error:
    sys.exit(f"error: {error}")  # in one line, where Snakemake would show where it was raised
HERE = {name: after for name, after in NOTEBOOKS.items() if Path(f"notebooks/{name}.ipynb").exists()}


# With GPUs each training of notebook 02 is a job of its own, so that a cluster runs them in parallel; 02 finds them finished.
TRAINED = read_yaml(f"params/{PROFILE}/02_training.yaml") if GPUS else {"corpora": [], "seeds": []}
CARD = f"{OUT}/checkpoints/{{corpus}}/seed-{{seed}}/run_card.json"


def stamp(name):
    return f"{OUT}/.{name}.done"


def result(name):
    return f"{OUT}/results/{name.split('_')[0]}.json"


def tell():
    print(*summary(Path(OUT), {name: Path(stamp(name)).exists() for name in HERE}), sep="\n", file=sys.stderr)


onsuccess:
    tell()


onerror:
    tell()


rule all:
    input:
        [file(name) for name in HERE for file in (result, stamp)],
    default_target: True


rule train:
    input:
        params=f"params/{PROFILE}/02_training.yaml",
        others=sorted(map(str, Path("params/grammars").glob("*.yaml"))),
    output:
        CARD,
    threads: 8
    resources:
        gpu=GPUS,
    params:
        launch=f"{sys.executable} -m" + (f" accelerate.commands.launch --num_processes {GPUS} -m" if GPUS > 1 else ""),
        out=OUT,
    shell:
        "{params.launch} latentree.train.launch --params {input.params:q} --out {params.out:q} --corpus {wildcards.corpus:q} --seed {wildcards.seed}"


for name, after in HERE.items():

    rule:
        name:
            name
        input:
            after=[stamp(other) for other in after],
            trained=expand(CARD, corpus=TRAINED["corpora"], seed=TRAINED["seeds"]) if name == "02_training" else [],
            notebook=f"notebooks/{name}.ipynb",
            params=f"params/{PROFILE}/{name}.yaml",
            others=sorted(map(str, [*Path("params/grammars").glob("*.yaml"), *Path("lib/latentree").glob("**/*.py")])),
        output:
            result=result(name),
            stamp=touch(stamp(name)),
        # 02 trains many models side by side, and nothing may hold a core that it waits for; the others run side by side
        threads: CORES if name[:2] in ("01", "02") else max(1, CORES // 2)
        resources:
            gpu=0 if name in LIGHT else min(GPUS, 1),
        priority: -FIRST.index(name[:2])
        params:
            python=sys.executable,
            out=OUT,
        # exec and --follow-parent: when Snakemake is killed the run notices it, and the next one finds the folder free
        shell:
            "exec {params.python:q} -m latentree.run {input.notebook:q} --params {input.params:q}"
            " --out {params.out:q} --follow-parent"
