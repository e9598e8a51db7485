"""The trainings of notebook 02 outside of it, on several GPUs or machines: accelerate launch -m latentree.train.launch --params FILE --out FOLDER

Each training runs in all processes together; notebook 02, executed afterwards with the same parameters and folder, finds them
finished. Interrupted, the same command goes on, also with another number of processes.
"""

import argparse
import sys
from pathlib import Path

from latentree.data.corpus import held_out, load_corpus
from latentree.data.files import read_yaml
from latentree.run.parameters import check, declared
from latentree.run.record import project_root
from latentree.train.training import TrainingConfig, check_run, train

NOTEBOOK = "notebooks/02_training.ipynb"
SETTINGS = (
    "architecture layers width heads context batch_sequences micro_batches optimizer learning_rate muon_learning_rate "
    "schedule precision compiled"
).split()


def jobs_of(parameters: dict) -> dict:
    """What notebook 02 trains with these parameters: {folder: (TrainingConfig, process, held-out tokens)}."""
    settings = {name: parameters[name] for name in SETTINGS}
    settings |= {
        "checkpoints_even": parameters["checkpoint_count"],
        "checkpoints_log": parameters["checkpoint_count"],
    }
    jobs, corpora, counts = {}, parameters["corpora"], parameters["tokens"]
    if len(corpora) != len(counts):
        raise ValueError(
            f"tokens = {counts}: {len(counts)} numbers for {len(corpora)} corpora; give one for each"
        )
    for corpus, tokens in zip(corpora, counts, strict=True):
        process = load_corpus(corpus, parameters["grammars"], parameters["corpus_seed"])
        unseen = held_out(process, parameters["held_out_sequences"], parameters["context"])[
            "tokens"
        ]
        for seed in parameters["seeds"]:
            folder = Path(parameters["out"]) / "checkpoints" / corpus / f"seed-{seed}"
            jobs[folder] = TrainingConfig(tokens=tokens, seed=seed, **settings), process, unseen
    return jobs


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m latentree.train.launch", description=__doc__
    )
    parser.add_argument(
        "--params", type=Path, required=True, help="YAML file with notebook 02's parameters"
    )
    parser.add_argument(
        "--out", required=True, help="folder for the checkpoints, as in notebook 02"
    )
    parser.add_argument("--corpus", help="only this one of the corpora")
    parser.add_argument("--seed", type=int, help="only this one of the seeds")
    given = parser.parse_args(arguments)
    try:
        parameters = check(read_yaml(given.params), declared(project_root() / NOTEBOOK))
        parameters["out"] = given.out
        jobs = {
            folder: job
            for folder, job in jobs_of(parameters).items()
            if given.corpus in (None, folder.parent.name) and given.seed in (None, job[0].seed)
        }
        if not jobs:
            raise ValueError(
                f"--corpus {given.corpus} --seed {given.seed}: not in {given.params.name}; its corpora are "
                f"{', '.join(parameters['corpora'])}, its seeds {parameters['seeds']}"
            )
        for folder, job in jobs.items():
            check_run(*job, folder, parameters["device"])
        for folder, job in jobs.items():
            train(*job, folder, device=parameters["device"])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
