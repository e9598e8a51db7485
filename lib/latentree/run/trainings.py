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


def planned(notebook: Path, params: Path, out: Path) -> tuple[dict, str]:
    """What a notebook trains, {folder: (TrainingConfig, corpus, held-out tokens)}, and its device.

    {} for a notebook that trains nothing. ValueError for parameters that are wrong.
    """
    cells = load_notebook_node(str(notebook)).cells
    code = [cell.source for cell in cells if "plan" in cell.metadata.get("tags", [])]
    if not code:
        return {}, "auto"
    values = check(read_yaml(params), declared(notebook))
    values["checkpoints"] = values["checkpoints"] or str(out.resolve() / "checkpoints")
    for source in code:
        exec(source, values)
    return values["jobs"], values.get("device", "auto")


def pool(params: Path, out: Path, notebook="*", corpus=None, seed=None) -> tuple[dict, str]:
    """What the notebooks of a profile train, and the device that one of them asks for, or auto.

    `notebook`, `corpus` and `seed` choose some. ValueError for wrong parameters, two devices, or
    where nothing is trained.
    """
    jobs, devices = {}, {"auto"}
    for file in sorted(params.glob(f"{notebook}.yaml")):
        found, device = planned(project_root() / "notebooks" / f"{file.stem}.ipynb", file, out)
        devices |= {device} if found else set()
        for folder, job in found.items():
            config, text, _ = job
            if corpus in (None, text.name) and seed in (None, config.seed):
                jobs[folder] = job
    if not jobs:
        told = f"{params}/{notebook}.yaml, {corpus = }, {seed = }"
        raise ValueError(f"{told}: no such training; choose others")
    asked = sorted(devices - {"auto"})
    if len(asked) > 1:
        raise ValueError(f"{params}: notebooks ask for device = {' and '.join(asked)}; give one")
    return jobs, asked[0] if asked else "auto"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m latentree.run.trainings", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("--params", type=Path, required=True, help="folder of a profile's files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--notebook", default="*", help="only what this one trains, by its name")
    parser.add_argument("--corpus", help="only on this corpus")
    parser.add_argument("--seed", type=int, help="only with this seed")
    given = parser.parse_args(arguments)
    try:
        train_all(*pool(given.params, given.out, given.notebook, given.corpus, given.seed))
    except (ValueError, RuntimeError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
