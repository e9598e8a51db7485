"""Many trainings at once: small models train fastest side by side, on a CPU and on a GPU."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing.connection import wait as wait_for
from pathlib import Path

import torch

from latentree.data.corpus import held_out
from latentree.series.checkpoints import CARD, seed_folder
from latentree.train.processes import Bar, launched
from latentree.train.settings import TrainingConfig
from latentree.train.training import check_run, train

# A container's time on processors, in a period: of control groups 2, and 1.
_QUOTAS = "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"
_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_THREADS = "OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "SLURM_CPUS_PER_TASK", "NSLOTS", "PBS_NCPUS"


def plan(corpora, tokens, seeds, folder, held_out_sequences, variant="", **settings) -> dict:
    """What is to be trained: {folder/CORPUS/seed-N: (TrainingConfig, corpus, held-out tokens)}.

    Each of the `corpora` is trained on its number of `tokens`, once for each of the `seeds`; the
    folder of another kind of model begins with its `variant` (VARIANT-seed-N).
    """
    jobs = {}
    for corpus, count in zip(corpora, tokens, strict=True):
        unseen = held_out(corpus, held_out_sequences, settings["context"])["tokens"]
        for seed in seeds:
            config = TrainingConfig(tokens=count, seed=seed, **settings)
            jobs[Path(folder) / corpus.name / seed_folder(seed, variant)] = config, corpus, unseen
    return jobs


def train_all(jobs: dict, device: str = "auto") -> None:
    """Train every job {folder: (TrainingConfig, corpus, held-out tokens)} as `training.train` does.

    The longest begin, each in a process of its own with one thread, so that weights do not depend
    on the number of cores: on a CPU as many at a time as there are cores to use, on a GPU up to
    six, one for each 16 GB. Where a launcher started several processes, they train together, one
    model after the other. All are checked before any starts, one that fails does not stop the
    others, and what is finished is not repeated. ValueError of the first that failed.
    """
    for folder, (config, corpus, unseen) in jobs.items():
        check_run(config, corpus, unseen, folder)
    left = {folder: job for folder, job in jobs.items() if not (folder / CARD).exists()}
    if launched():
        for folder, job in left.items():
            train(*job, folder, device)
    elif left:
        _side_by_side(dict(sorted(left.items(), key=_work, reverse=True)), device)


def _work(job) -> int:
    """About how long one of the jobs takes: tokens times blocks times their width."""
    _, (config, _, _) = job
    return config.tokens * config.layers * config.width


def _side_by_side(jobs, device):
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    total = sum(config.steps * config.step_tokens for config, _, _ in jobs.values())
    bar = Bar(desc=f"{len(jobs)} models", total=total)
    workers = usable_cores()
    if device != "cpu" and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        workers = max(1, min(6, int(memory / 16e9)))  # a small model leaves most of a GPU idle
    workers = min(len(jobs), workers)
    with ProcessPoolExecutor(workers, context, _begin, (done,)) as pool:
        futures = [pool.submit(train, *job, folder, device, _tell) for folder, job in jobs.items()]
        while wait(futures, timeout=2).not_done:
            bar.update(done.value - bar.n)
    bar.update(done.value - bar.n)
    bar.close()
    for future in futures:
        future.result()


def usable_cores() -> int:
    """How many cores this process may use.

    The least of those that it is bound to, a container's quota of time, what a scheduler gives to a
    task, and OMP_NUM_THREADS (the first, if it is a list).
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for name in _THREADS:
        asked = os.environ.get(name, "").split(",")[0].strip()
        if asked.isdigit() and int(asked):
            bound = min(bound, int(asked))
    for group in _control_groups():
        said = [(group / file).read_text() for file in _QUOTAS if (group / file).exists()]
        quota = " ".join(said).split()  # microseconds, of microseconds; max or -1: no limit
        if len(quota) == 2 and quota[0].isdigit():
            bound = min(bound, max(1, int(quota[0]) // int(quota[1])))
    return bound


def _control_groups() -> set[Path]:
    """The folders of those that this process is in, and of all above them."""
    lines = _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.exists() else []
    own = [Path("cpu"), *(Path(line.split(":", 2)[2].strip("/")) for line in lines)]
    own += [Path("cpu") / path for path in own]
    return {_GROUPS / group for path in own for group in (path, *path.parents)}


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
