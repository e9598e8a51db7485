"""The table of claims in the README is that of the committed run."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from latentree.run.execution import output_folder
from latentree.run.report import BEGIN, END, as_markdown, claims_of, main


def test_the_readme_shows_the_committed_claims():
    shown = Path("README.md").read_text().split(BEGIN)[1].split(END)[0].strip()
    assert shown == as_markdown(output_folder("laptop")), "stale: run make report"


def test_every_claim_is_in_the_table_with_its_verdict_and_interval():
    folder = output_folder("laptop")
    claims, text = claims_of(folder), as_markdown(folder)
    count = sum(
        len(json.loads(file.read_text())["claims"]) for file in (folder / "results").glob("*.json")
    )
    assert (
        len(claims)
        == count
        == sum(
            line.startswith("| 0") and len(re.findall(r"(?<!\\)\|", line)) == 12
            for line in text.splitlines()
        )
    )
    kept = pd.read_csv(folder / "claims.csv")
    assert list(kept.claim) == list(claims.claim) and list(kept.verdict) == list(claims.verdict)


def test_what_is_outside_the_markers_stays_and_a_missing_run_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "params").mkdir()
    shutil.copytree(output_folder("laptop") / "results", tmp_path / "run" / "results")
    shutil.copy(output_folder("laptop") / "run.json", tmp_path / "run")
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter")
    monkeypatch.chdir(tmp_path)
    assert main(["run"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert (
        text.startswith("before\n")
        and text.endswith(f"{END}\nafter")
        and "old" not in text
        and (tmp_path / "run" / "claims.csv").exists()
    )
    assert (
        main(["nowhere"]) == 2
        and "nowhere: has no results/*.json; name the folder" in capsys.readouterr().err
    )
    (tmp_path / "README.md").write_text("no markers")
    assert main(["run"]) == 2 and (tmp_path / "README.md").read_text() == "no markers"


@pytest.mark.parametrize("arguments", [[], ["a", "b"]])
def test_usage_is_told(arguments, capsys):
    assert main(arguments) == 2 and "usage" in capsys.readouterr().err
