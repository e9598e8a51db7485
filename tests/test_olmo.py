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
    "series": "maker/words",
    "count": 3,
    "documents": 400,
    "sequences": 12,
    "context": 48,
    "state": [],
    "latents": 6,
    "precision": "bfloat16",
}


@pytest.fixture
def out(tmp_path):
    """The folder of a run, in whose cache lie three revisions and their tokenizer.

    The model's vocabulary is larger than the tokenizer's.
    """
    run = tmp_path / "trained"
    run.mkdir()
    (run / IDENTITY).write_text(json.dumps({"architecture": "gpt_neox", "vocabulary_size": 24}))
    revisions = {}
    for step in (1000, 2000, 4000):
        save_checkpoint(build_model("gpt_neox", 24, 3, 32, 4, 64, seed=step), run, step)
        folder = run / f"step-{step:08d}"
        tokenizer().save_pretrained(folder)
        revisions[f"step{step}-tokens{step}M"] = folder
    lay_out(revisions, VALUES["series"], tmp_path / "out" / "checkpoints" / "hub")
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
    assert claims["series-induction"]["corpus"] == "maker/words, on story"
    assert claims["series-induction"]["value"] is not None
    assert claims["series-function-vector"]["reason"].startswith("on a text")
    assert "20 are needed" in claims["series-repair"]["reason"]  # of 12 windows
    assert claims["olmo-induction"]["value"] is None
    measured = pd.read_csv(out / "tables" / "07_measurements.csv")
    assert sorted(measured.tokens.unique()) == [1e9, 2e9, 4e9]
