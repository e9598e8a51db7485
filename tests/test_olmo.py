"""Notebook 07 on a series of the hub and a text: the road that the real OLMo takes, with a tiny model from a local cache."""

import json
import os
import subprocess
import sys

import yaml
from hub import lay_out
from latentree.series.checkpoints import IDENTITY, save_checkpoint
from latentree.train.model import build_model
from test_text import lines, tokenizer

MODEL = "maker/words"


def lay_out_series(tmp_path):
    """A repository of three revisions in a cache: a model whose vocabulary is larger than its tokenizer's, which lies beside."""
    run = tmp_path / "run"
    run.mkdir()
    (run / IDENTITY).write_text(json.dumps({"architecture": "gpt_neox", "vocabulary_size": 24}))
    for step in (1000, 2000, 4000):
        save_checkpoint(build_model("gpt_neox", 24, 3, 32, 4, 64, seed=step), run, step)
        tokenizer(eos_token="<end>").save_pretrained(run / f"step-{step:08d}")
    revisions = {}
    for step in (1000, 2000, 4000):
        revisions[f"step{step}-tokens{step}M"] = run / f"step-{step:08d}"
    lay_out(revisions, MODEL, tmp_path / "cache")


def run_07(tmp_path, **values):
    (tmp_path / "story.txt").write_text("\n\n".join(lines(400)))
    given = {
        "profile": "smoke",
        "series": MODEL,
        "count": 3,
        "text": str(tmp_path / "story.txt"),
        "documents": 400,
        "sequences": 12,
        "context": 48,
        "state": [],
        "latents": 6,
    }
    (tmp_path / "07.yaml").write_text(yaml.safe_dump(given | values))
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "latentree.run",
            "notebooks/07_olmo.ipynb",
            "--params",
            str(tmp_path / "07.yaml"),
            "--out",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def test_a_series_of_the_hub_is_measured_on_a_text(tmp_path):
    lay_out_series(tmp_path)
    done = run_07(tmp_path, precision="bfloat16")
    assert done.returncode == 0, done.stderr[-2000:]
    claims = {
        c["id"]: c
        for c in json.loads((tmp_path / "out" / "results" / "07.json").read_text())["claims"]
    }
    assert (
        claims["series-induction"]["corpus"] == "maker/words, on story"
        and claims["series-induction"]["value"] is not None
    )
    assert (
        claims["series-function-vector"]["reason"].startswith("on a text")
        and claims["olmo-induction"]["value"] is None
    )
    assert "20 are needed" in claims["series-hydra"]["reason"]  # of 12 windows
    shown = json.loads((tmp_path / "out" / "run.json").read_text())["notebooks"]["07_olmo"][
        "series"
    ]
    assert list(shown["revisions"]) == [
        "step1000-tokens1000M",
        "step2000-tokens2000M",
        "step4000-tokens4000M",
    ]
    executed = (tmp_path / "out" / "07_olmo.ipynb").read_text()
    assert "nothing, for notebooks 02 to 05" in executed and "Warning" not in json.dumps(
        [c.get("outputs") for c in json.loads(executed)["cells"]]
    )


def test_what_cannot_be_is_told_in_one_line(tmp_path):
    lay_out_series(tmp_path)
    for values, told in (
        ({"memory_limit_gb": 1.0e-6}, "memory_limit_gb = 1e-06: one sequence of 48 tokens takes"),
        ({"series": "maker/other"}, "maker/other: is not in"),
        ({"context": 128}, "context = 128: give at most the 64 tokens"),
    ):
        done = run_07(tmp_path, **values)
        assert (
            done.returncode == 3
            and told in done.stderr
            and not (tmp_path / "out" / "results" / "07.json").exists()
        )
