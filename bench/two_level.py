"""Whether the recipe learns the paper's two-level process: `python bench/two_level.py`.

A document is a sequence of that process: sixteen segments of six clues and a query. Prints, for
each contrast and seed, the loss of the last query beside the exact losses of a reader who sees
only the last segment, and of one who sees all.
"""

import tempfile
from pathlib import Path

import pandas as pd
import torch
from latentree.data.corpus import HELD_OUT, Corpus, Documents
from latentree.exact.two_level import TwoLevel, losses
from latentree.series.checkpoints import LocalSeries
from latentree.train.jobs import train_all
from latentree.train.settings import TrainingConfig
from latentree.train.training import evaluate

SEGMENTS, CLUES, TOKENS = 16, 6, 64
LENGTH = SEGMENTS * (CLUES + 1)
HELD = 1024  # sequences
CONTRASTS, SEEDS = (4.0, 1.0, 0.25), (0, 1, 2)


class Segments(Corpus):
    """The two-level process as text, without an end token."""

    def __init__(self, contrast):
        super().__init__("two-level", "two-level", TOKENS, None, LENGTH, [contrast])
        self.process = TwoLevel(0, contrast)

    def drawn(self, number):
        """Clues (1, segment, place) and queries (1, segment) of a document, by its number."""
        return self.process.draw(1, SEGMENTS, CLUES, number)

    def documents(self, ids, device="cpu", detail=True):
        """Documents by number, `ids` (documents,)."""
        both = [self.drawn(number) for number in torch.as_tensor(ids).tolist()]
        rows = [torch.cat([clues[0], query[0][:, None]], 1).flatten() for clues, query in both]
        document = torch.arange(len(rows)).repeat_interleave(LENGTH)
        token = {"tokens": torch.cat(rows), "document": document}
        return Documents({name: value.to(device) for name, value in token.items()}, len(rows))

    def exact(self):
        """Loss of the last query, of a reader of the last segment and of one of all: (2,)."""
        parts = zip(*(self.drawn(number) for number in range(HELD_OUT, HELD_OUT + HELD)))
        return losses(self.process, *map(torch.cat, parts), [0, SEGMENTS - 1]).mean(1)


def main():
    """Train one model for each contrast and seed, and print the table."""
    corpora = {contrast: Segments(contrast) for contrast in CONTRASTS}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for contrast, corpus in corpora.items():
            unseen = corpus.documents(HELD_OUT + torch.arange(HELD)).tokens.view(HELD, LENGTH)
            for seed in SEEDS:
                config = TrainingConfig(context=LENGTH, seed=seed)
                jobs[Path(folder, f"{contrast:g}", str(seed))] = config, corpus, unseen
        train_all(jobs, "cpu")
        exact = {contrast: corpus.exact().tolist() for contrast, corpus in corpora.items()}
        for place, (config, corpus, unseen) in jobs.items():
            series = LocalSeries(place)
            last = evaluate(series.load(series.steps[-1]), unseen)[:, -1].mean().item()
            segment, text = exact[float(place.parent.name)]
            gained = (segment - last) / (segment - text)
            rows.append([place.parent.name, config.seed, last, segment, text, gained])
    columns = ["contrast", "seed", "model", "last segment", "all segments", "share"]
    print(pd.DataFrame(rows, columns=columns).round(4).to_markdown(index=False))


if __name__ == "__main__":
    main()
