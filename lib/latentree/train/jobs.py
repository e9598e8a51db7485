"""All trainings of a profile. On a CPU small models train fastest side by side, on one thread each.

Notebook 02 trains in this way. On a cluster its trainings run outside of it, before it:

    python -m latentree.train.jobs --params params/paper/02_training.yaml --out outputs/paper

(or `accelerate launch -m latentree.train.jobs ...` for several GPUs). The notebook, executed
afterwards with the same parameters and folder, finds them finished.
"""

import argparse
import ast
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing.connection import wait as wait_for
from pathlib import Path

import torch
from tqdm.auto import tqdm

from latentree.data.corpus import held_out, load_corpus
from latentree.data.files import read_yaml
from latentree.train.training import CARD, TrainingConfig, check_run, train


def plan(corpora, tokens, seeds, folder, held_out_sequences, **settings) -> dict:
    """What is to be trained: {folder/CORPUS/seed-N: (TrainingConfig, corpus, held-out tokens)}.

    Each of the `corpora` is trained on its number of `tokens`, once for each of the `seeds`.
    """
    jobs = {}
    for corpus, count in zip(corpora, tokens, strict=True):
        unseen = held_out(corpus, held_out_sequences, settings["context"])["tokens"]
        for seed in seeds:
            config = TrainingConfig(tokens=count, seed=seed, **settings)
            jobs[Path(folder) / corpus.name / f"seed-{seed}"] = config, corpus, unseen
    return jobs


def train_all(jobs: dict, device: str = "auto") -> None:
    """Train every job {folder: (TrainingConfig, corpus, held-out tokens)} as `training.train` does.

    On a CPU as many at a time as torch has threads, each in a process of its own with one thread,
    so that weights do not depend on the number of cores; on a GPU one after the other. All are
    checked before any starts, one that fails does not stop the others, and what is finished is not
    repeated. ValueError as from `train`, of the first that failed.
    """
    for folder, (config, corpus, unseen) in jobs.items():
        check_run(config, corpus, unseen, folder)
    left = {folder: job for folder, job in jobs.items() if not (folder / CARD).exists()}
    together = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if together or device == "cuda" or device == "auto" and torch.cuda.is_available():
        for folder, job in left.items():
            train(*job, folder, device)
    elif left:
        _side_by_side(left)


def _side_by_side(jobs):
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    total = sum(config.steps * config.step_tokens for config, _, _ in jobs.values())
    bar = tqdm(desc=f"{len(jobs)} models", total=total, unit=" tokens", unit_scale=True)
    workers = min(len(jobs), torch.get_num_threads())
    with ProcessPoolExecutor(workers, context, _begin, (done,)) as pool:
        futures = [pool.submit(_train_one, *job, folder) for folder, job in jobs.items()]
        while wait(futures, timeout=2).not_done:
            bar.update(done.value - bar.n)
    bar.update(done.value - bar.n)
    bar.close()
    for future in futures:
        future.result()


# ---------------------------------------------------------------------- in a training process

_done = None  # tokens of all trainings, which the parent shows


def _begin(done):
    global _done
    _done = done
    torch.set_num_threads(1)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _tell(tokens):
    with _done.get_lock():
        _done.value += tokens


def _follow_parent():
    """End as soon as the parent has ended, however: two processes must not train in one folder."""
    wait_for([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _train_one(config, corpus, unseen, folder):
    train(config, corpus, unseen, folder, "cpu", _tell)


# ---------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> None:
    """The command `python -m latentree.train.jobs`, run in the project's folder."""
    parser = argparse.ArgumentParser(prog="python -m latentree.train.jobs")
    parser.add_argument("--params", required=True, help="YAML file with notebook 02's parameters")
    parser.add_argument("--out", required=True, help="folder of the run, as for notebook 02")
    parser.add_argument("--corpus", help="only this one of the corpora")
    parser.add_argument("--seed", type=int, help="only this one of the seeds")
    given = parser.parse_args(arguments)
    import papermill  # takes seconds, which training processes would wait for

    values = {}
    for name, declared in papermill.inspect_notebook("notebooks/02_training.ipynb").items():
        values[name] = ast.literal_eval(declared["default"])
    changes = read_yaml(given.params)
    unknown = sorted(set(changes) - set(values))
    if unknown:
        raise ValueError(f"{given.params}: {unknown} are no parameters of notebook 02")
    values |= changes
    counts = dict(zip(values["corpora"], values.pop("tokens"), strict=True))
    names = [given.corpus] if given.corpus else values["corpora"]
    seeds = values["seeds"] if given.seed is None else [given.seed]
    corpora = [load_corpus(name, values["grammars"], values["corpus_seed"]) for name in names]
    settings = {name: values[name] for name in TrainingConfig.model_fields if name in values}
    settings["checkpoints_even"] = settings["checkpoints_log"] = values["checkpoint_count"]
    jobs = plan(
        corpora,
        tokens=[counts[name] for name in names],
        seeds=seeds,
        folder=Path(given.out) / "checkpoints",
        held_out_sequences=values["held_out_sequences"],
        **settings,
    )
    train_all(jobs, values["device"])


if __name__ == "__main__":
    main()
