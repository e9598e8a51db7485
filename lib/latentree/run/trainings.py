"""All trainings of a profile in one pool, before its notebooks, which then find them finished.

    python -m latentree.run.trainings --params params/laptop --out outputs/laptop

or `accelerate launch -m latentree.run.trainings ...` for several GPUs. What a notebook trains is
said by itself: its cells with the tag `plan` leave it in `jobs`.
"""

import argparse
import sys
from pathlib import Path

from papermill.iorw import load_notebook_node

from latentree.data.files import read_yaml
from latentree.run.parameters import check, declared
from latentree.run.record import project_root
from latentree.train.jobs import train_all


def planned(notebook: Path, params: Path, out: Path) -> dict:
    """What a notebook trains, {folder: (TrainingConfig, corpus, held-out tokens)}; {} for nothing.

    ValueError for parameters that are wrong.
    """
    cells = load_notebook_node(str(notebook)).cells
    code = [cell.source for cell in cells if "plan" in cell.metadata.get("tags", [])]
    if not code:
        return {}
    values = check(read_yaml(params), declared(notebook))
    values["checkpoints"] = values["checkpoints"] or str(out.resolve() / "checkpoints")
    for source in code:
        exec(source, values)
    return values["jobs"]


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m latentree.run.trainings", description=__doc__)
    parser.add_argument("--params", type=Path, required=True, help="folder of a profile's files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--notebook", default="*", help="only what this one trains, by its name")
    parser.add_argument("--corpus", help="only on this corpus")
    parser.add_argument("--seed", type=int, help="only with this seed")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    given = parser.parse_args(arguments)
    jobs = {}
    for params in sorted(given.params.glob(f"{given.notebook}.yaml")):
        notebook = project_root() / "notebooks" / f"{params.stem}.ipynb"
        for folder, job in planned(notebook, params, given.out).items():
            config, corpus, _ = job
            if given.corpus in (None, corpus.name) and given.seed in (None, config.seed):
                jobs[folder] = job
    try:
        train_all(jobs, given.device)
    except ValueError as error:
        print("error:", error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
