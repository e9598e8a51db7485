"""A pack of trained models for a course, so that nobody must train.

    python -m latentree.run.pack RUN FILE

It holds what notebooks 02 and 03 read of a run's trainings with seed 0: of each the last
checkpoint, the first one of those that 03 measures along training, and three more of its main
corpus, for the curves. Unpacked in a clone, the models lie where a run of that profile would have
left them.
"""

import argparse
import os
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from latentree.data.files import read_yaml
from latentree.run.record import project_root
from latentree.run.trainings import pool
from latentree.series.checkpoints import CARD, IDENTITY, LocalSeries

SHARES = (1 / 3, 1 / 9, 1 / 27)  # of a training on the main corpus: where checkpoints are kept, too
FILES = (IDENTITY, CARD, "losses.csv", "held_out.csv")


def pack(run: Path, file: Path) -> None:
    """Write the pack of the run in a folder, which is named by its profile, as a zip `file`.

    ValueError if a training has not been finished.
    """
    run = run.resolve()
    params = project_root() / "params" / run.name
    jobs, _ = pool(params, run, "0[23]_*", seed=0)
    for folder in jobs:
        if not (folder / CARD).exists():
            raise ValueError(f"{folder}: is not finished; run `make run PROFILE={run.name}`")
    measured = read_yaml(params / "03_induction_heads.yaml")["corpora"]
    partial = file.with_name(f".{file.name}.partial")  # what was packed before stays until the end
    with ZipFile(partial, "w", ZIP_DEFLATED, compresslevel=9) as packed:
        for folder, (_, corpus, _) in jobs.items():
            steps = LocalSeries(folder).steps
            kept = {steps[-1]}
            if corpus.name in measured:
                kept.add(steps[0])
            if corpus.name == measured[0]:
                for share in SHARES:
                    kept.add(min(steps, key=lambda step: abs(step - share * steps[-1])))
            files = [folder / name for name in FILES]
            for step in sorted(kept):
                files += sorted((folder / f"step-{step:08d}").iterdir())
            for path in files:
                packed.write(path, Path("outputs", run.name, path.relative_to(run)))
    os.replace(partial, file)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m latentree.run.pack", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("run", type=Path, help="folder of a finished run, such as outputs/evening")
    parser.add_argument("file", type=Path, help="the zip file that is written")
    given = parser.parse_args(arguments)
    try:
        pack(given.run, given.file)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    print(f"{given.file}: {given.file.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
