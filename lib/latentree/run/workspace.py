"""Where a notebook reads and writes: the first line of every notebook makes its workspace."""

import json
from pathlib import Path

import pandas as pd
from IPython import get_ipython
from IPython.display import Image, Markdown, display

from latentree.data.corpus import load_corpus
from latentree.data.files import read_yaml, write_text
from latentree.evidence import figures
from latentree.evidence.claims import claims_table
from latentree.run.parameters import check, declared
from latentree.run.record import project_root, version_of
from latentree.series.checkpoints import CARD, LocalSeries, seed_folder
from latentree.train.settings import TrainingConfig


class NotTrained(ValueError):
    """There is no trained model to read; shown in a notebook as one line."""

    def _render_traceback_(self):
        return [f"NotTrained: {self}"]


class Workspace:
    """The folders of one notebook.

    `out` is written to: figures, tables and results. `checkpoints` is read from, and trained into
    by the notebooks that train; empty, it is that of the profile's run,
    outputs/PROFILE/checkpoints. Relative folders are those of the project, wherever Jupyter was
    started. ValueError for a parameter in the notebook that is not of its declared type.
    """

    def __init__(self, notebook, profile, out, checkpoints="", grammars="params/grammars"):
        self._root = project_root()
        self.notebook, self.profile = notebook, profile
        file = next(self._root.glob(f"notebooks/**/{notebook}.ipynb"), None)
        if get_ipython() and file:  # what papermill -p, or a hand, has put into the first cell
            fields, here = declared(file), get_ipython().user_ns
            check({name: here[name] for name in fields.model_fields if name in here}, fields)
        self.out = self._path(out)
        self.checkpoints = self._path(checkpoints or f"outputs/{profile}/checkpoints")
        self.grammars = self._path(grammars)
        self._answered = None  # by finish(), once answer() has made room for it
        pd.set_option("display.max_colwidth", None)  # statements are read, not glanced at
        figures.set_style()

    def _path(self, given) -> Path:
        return self._root / Path(given).expanduser()

    def folder(self, given: str) -> Path | None:
        """The folder of this path; None if it is a name, as of a package, and not a path.

        ValueError for a path where there is no folder.
        """
        if self._path(given).is_dir():
            return self._path(given)
        if given.startswith(("/", "~", ".", "outputs/")):
            raise ValueError(f"{given}: there is no such folder; give one, or a name")
        return None

    def corpus(self, name: str, seed: int = 0):
        """The corpus of the grammar file NAME.yaml, with this seed."""
        return load_corpus(name, self.grammars, seed)

    def recipe(self, file: str = "", **changes) -> dict:
        """The settings of a TrainingConfig with which notebook 02 trains, some of them changed.

        They are read from a `file` of its parameters; empty, from the profile's.
        """
        given = read_yaml(self._path(file or f"params/{self.profile}/02_training.yaml"))
        values = check(given, declared(self._root / "notebooks/02_training.ipynb"))
        known = [name for name in TrainingConfig.model_fields if name in values]
        return {name: values[name] for name in known if name != "tokens"} | changes

    def needs(self, corpora, seed: int = 0) -> None:
        """Raise NotTrained, which says what to do, unless each of the corpora has its model."""
        for name in corpora:
            self._run_folder(name, seed)

    def series(self, corpus, seed: int = 0, variant: str = "") -> LocalSeries:
        """The checkpoints of the model trained on a corpus with this seed.

        Raises NotTrained if there is none, and ValueError if it was trained on another grammar.
        """
        series = LocalSeries(self._run_folder(corpus.name, seed, variant))
        self.same_grammar(series, corpus)
        return series

    def same_grammar(self, series: LocalSeries, corpus) -> None:
        """ValueError if a series was not trained on this corpus."""
        theirs = series.identity.get("grammar"), series.identity.get("corpus_seed", 0)
        if theirs != (corpus.digest, corpus.seed):
            raise ValueError(
                f"{series.folder}: was trained on another grammar {corpus.name} ({theirs[0]}, seed "
                f"{theirs[1]}; this one is {corpus.digest}, seed {corpus.seed}); train in another "
                "folder, or restore the grammar file or corpus_seed"
            )

    def all_series(self, corpus, seeds, variant: str = "") -> dict:
        """{seed: series} of those of the `seeds` with which a model was trained on a corpus.

        Raises NotTrained if there is none with the first of them.
        """
        found = {}
        for seed in seeds:
            try:
                found[seed] = self.series(corpus, seed, variant)
            except NotTrained:
                if seed == seeds[0]:
                    raise
        return found

    def save(self, shown, name: str) -> None:
        """Write a figure to out/figures/NAME.png, or a DataFrame to out/tables/NAME.csv."""
        if isinstance(shown, pd.DataFrame):
            folder = self._folder("tables")
            shown.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
        else:
            figures.write(shown, self._folder("figures") / f"{name}.png")

    def save_film(self, shown, name: str) -> Image:
        """Write figures as a moving picture, out/figures/NAME.webp; returns it, to be shown."""
        path = self._folder("figures") / f"{name}.webp"
        figures.write_film(shown, path)
        return Image(path.read_bytes(), format="webp")

    def answer(self, figure: str, *ids: str) -> None:
        """Make room for this notebook's answer; finish() fills it, and the reader finds it here.

        It is the saved `figure` of this name, and what was found of the claims with these `ids`, as
        far as they are made: some are on corpora that a profile does not have.
        """
        room = Markdown("*The answer stands here when the notebook has run to its end.*")
        shown = display(room, display_id=True), display(Markdown(""), display_id=True)
        self._answered = figure, ids, shown

    def finish(self, claims) -> pd.DataFrame:
        """Write the claims to out/results/NN.json, whole or not at all; returns the table of them.

        Raises ValueError if two claims have the same id.
        """
        ids = pd.Series([claim.id for claim in claims])
        if ids.duplicated().any():
            raise ValueError(f"claim {ids[ids.duplicated()].iloc[0]} is there twice; rename one")
        if self._answered:
            self._fill_answer({claim.id: claim for claim in claims})
        results = {
            "notebook": self.notebook,
            "profile": self.profile,
            "version": version_of(self.profile),
            "claims": [claim.as_dict() for claim in claims],
        }
        text = json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False)
        write_text(self._folder("results") / f"{self.notebook[:2]}.json", text + "\n")
        return claims_table(claims)

    def _fill_answer(self, claim_of: dict) -> None:
        figure, ids, (words, picture) = self._answered
        found = [claim_of[id] for id in ids if id in claim_of]
        words.update(Markdown("\n".join(f"- {claim.in_words}" for claim in found)))
        file = self.out / f"figures/{figure}.png"
        if file.exists():
            picture.update(Image(file))

    def _run_folder(self, name: str, seed: int, variant: str = "") -> Path:
        folder = self.checkpoints / name / seed_folder(seed, variant)
        if not (folder / CARD).exists():
            raise NotTrained(
                f"{folder}: there is no trained model of {name}; run `make run PROFILE="
                f"{self.profile}` or notebook 02, or give another run's folder as `checkpoints`"
            )
        return folder

    def _folder(self, name: str) -> Path:
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder
