"""Where a notebook reads and writes: the first line of every notebook makes its workspace."""

import json
from pathlib import Path

import pandas as pd

from latentree.data.corpus import load_corpus
from latentree.data.files import write_text
from latentree.evidence import figures
from latentree.evidence.claims import claims_table
from latentree.run.record import output_folder, project_root, version_of
from latentree.series.checkpoints import LocalSeries


class NotTrained(ValueError):
    """There is no trained model to read; shown in a notebook as one line."""

    def _render_traceback_(self):
        return [f"NotTrained: {self}"]


class Workspace:
    """The folders of one notebook.

    `out` is written to: figures, tables and results. `checkpoints` is read from, and trained into
    by the notebooks that train; empty, it is that of the profile's run,
    outputs/PROFILE/checkpoints. Relative folders are those of the project, wherever Jupyter was
    started.
    Raises NotTrained, which says what to do, unless there is a model of each of the corpora
    `trained` (names), with this seed.
    """

    def __init__(
        self,
        notebook: str,
        profile: str,
        out: str,
        checkpoints="",
        grammars="params/grammars",
        trained=(),
        seed=0,
    ):
        root = project_root()
        self.notebook, self.profile = notebook, profile
        self.out = root / out
        self.checkpoints = root / (checkpoints or output_folder(profile) / "checkpoints")
        self.grammars = root / grammars
        pd.set_option("display.max_colwidth", None)  # statements are read, not glanced at
        figures.set_style()
        for name in trained:
            self._run_folder(name, seed)

    def corpus(self, name: str, seed: int = 0):
        """The corpus of the grammar file NAME.yaml, with this seed."""
        return load_corpus(name, self.grammars, seed)

    def series(self, corpus, seed: int = 0) -> LocalSeries:
        """The checkpoints of the model trained on a corpus with this seed.

        Raises NotTrained if there is none, and ValueError if it was trained on another grammar.
        """
        folder = self._run_folder(corpus.name, seed)
        series = LocalSeries(folder)
        theirs = series.identity.get("grammar")
        if theirs != corpus.digest:
            raise ValueError(
                f"{folder}: was trained on another grammar {corpus.name} ({theirs}, this one is "
                f"{corpus.digest}); train again in another folder, or restore the grammar file"
            )
        return series

    def save(self, shown, name: str) -> None:
        """Write a figure to out/figures/NAME.png, or a DataFrame to out/tables/NAME.csv."""
        if isinstance(shown, pd.DataFrame):
            folder = self._folder("tables")
            shown.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
        else:
            figures.write(shown, self._folder("figures") / f"{name}.png")

    def finish(self, claims) -> pd.DataFrame:
        """Write the claims to out/results/NN.json, whole or not at all; returns the table of them.

        Raises ValueError if two claims have the same id.
        """
        ids = pd.Series([claim.id for claim in claims])
        if ids.duplicated().any():
            raise ValueError(f"claim {ids[ids.duplicated()].iloc[0]} is there twice; rename one")
        results = {
            "notebook": self.notebook,
            "profile": self.profile,
            "version": version_of(self.profile),
            "claims": [claim.as_dict() for claim in claims],
        }
        text = json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False)
        number = self.notebook.split("_")[0]
        write_text(self._folder("results") / f"{number}.json", text + "\n")
        return claims_table(claims)

    def _run_folder(self, name: str, seed: int) -> Path:
        folder = self.checkpoints / name / f"seed-{seed}"
        if not (folder / "run_card.json").exists():
            raise NotTrained(
                f"{folder}: there is no trained model of {name}; run `make run "
                f"PROFILE={self.profile}` or notebook 02 first, or give the folder of another run "
                "as `checkpoints`"
            )
        return folder

    def _folder(self, name: str) -> Path:
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder
