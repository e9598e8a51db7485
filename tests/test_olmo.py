"""Notebook 07 on a repository and a text, as with the real OLMo: a tiny model from a cache."""

import json

import pandas as pd
import pytest
import yaml
from hub import lay_out
from latentree.run.execution import main
from latentree.series.checkpoints import IDENTITY, save_checkpoint
from latentree.train.model import build_model
from test_text import lines, tokenizer

VALUES = {
    "profile": "smoke",
    "published": "stand-in",
    "series": "maker/words",
    "replicas": ["maker/words-2", "maker/words-3"],
    "count": 3,
    "documents": 400,
    "windows": 4,
    "few": 4,
    "short": 24,
    "sequences": 24,
    "context": 48,
    "named": {"1000": "early", "4000": "late"},
    "precision": "bfloat16",
}


@pytest.fixture
def out(tmp_path):
    """The folder of a run, in whose cache lie three repositories of two revisions each.

    Their names do not say their step. The model's vocabulary is larger than the tokenizer's.
    """
    for seed, repository in enumerate([VALUES["series"], *VALUES["replicas"]]):
        run, revisions = tmp_path / f"trained-{seed}", {}
        run.mkdir()
        (run / IDENTITY).write_text(json.dumps({"architecture": "gpt_neox"}))
        for step, name in VALUES["named"].items():
            step = int(step)
            model = build_model("gpt_neox", 24, 3, 32, 4, 64, seed=step + seed)
            save_checkpoint(model, run, step)
            revisions[name] = run / f"step-{step:08d}"
            tokenizer().save_pretrained(revisions[name])
        lay_out(revisions, repository, tmp_path / "out" / "checkpoints" / "hub")
    return tmp_path / "out"


def test_a_series_of_the_hub_is_measured_on_a_text(out, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text, parameters = tmp_path / "story.txt", tmp_path / "07.yaml"
    text.write_text("\n\n".join(lines(400)))
    parameters.write_text(yaml.safe_dump(VALUES | {"text": str(text)}))
    notebook = ["notebooks/07_olmo.ipynb", "--params", str(parameters), "--out", str(out)]
    assert main(notebook) == 0
    results = json.loads((out / "results" / "07.json").read_text())["claims"]
    claims = {claim["id"]: claim for claim in results}
    assert claims["series-lookup"]["corpus"] == "maker/words, on story"
    assert claims["series-lookup"]["value"] is not None
    assert claims["series-lookup"]["seeds"] == [0, 1, 2]  # a band over trainings
    assert claims["real-lookup"]["reason"] == "the package stand-in is not installed"
    measured = pd.read_csv(out / "tables" / "07_along_training.csv")
    assert sorted(measured.tokens.unique()) == [1000, 4000]  # steps, for nothing tells tokens
