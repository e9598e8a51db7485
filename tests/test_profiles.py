"""The paper's profile, its corpora and settings, through all notebooks that train on them: every size made tiny, on a CPU."""

import json
from pathlib import Path

import pytest
import yaml
from latentree.run.execution import main as run

SMOKE = Path("params/smoke")
SAME = {
    "tokens": [8192] * 6,
    "seeds": [0],
    "layers": 2,
    "width": 16,
    "heads": 2,
    "batch_sequences": 8,
    "checkpoints": 1,
    "device": "cpu",
    "compiled": False,
    "deep_layers": 3,
    "furthest": 2,
    "shortest": 20,
    "context": 64,
    "sequences": 96,
    "sequences_at_end": 96,
}


def tiny(file: Path) -> dict:
    """The paper's parameters, with the sizes of the smoke profile where it has one, and of SAME."""
    paper, smoke = (yaml.safe_load(path.read_text()) for path in (file, SMOKE / file.name))
    sizes = {
        name: value for name, value in smoke.items() if name in paper and isinstance(value, int)
    }
    return paper | sizes | {name: value for name, value in SAME.items() if name in paper}


@pytest.mark.parametrize("profile", ["paper"])
def test_the_papers_profile_runs_through_all_notebooks(profile, tmp_path):
    for number in ("01", "02", "03", "04", "05", "06"):
        (file,) = Path("params", profile).glob(f"{number}_*.yaml")
        params = tmp_path / file.name
        params.write_text(yaml.safe_dump(tiny(file)))
        assert (
            run(
                [
                    f"notebooks/{file.stem}.ipynb",
                    "--params",
                    str(params),
                    "--out",
                    str(tmp_path / "out"),
                ]
            )
            == 0
        ), number
        results = json.loads((tmp_path / "out" / "results" / f"{number}.json").read_text())
        assert results["profile"] == profile and results["claims"]


def test_the_second_recipe_takes_a_tenth_of_the_tokens_and_nothing_else_differs():
    for name in sorted(path.name for path in Path("params/paper").glob("*.yaml")):
        released, ours = (
            yaml.safe_load(Path("params", profile, name).read_text())
            for profile in ("paper", "paper-muon")
        )
        other = {key for key in released | ours if released.get(key) != ours.get(key)}
        assert other <= {"profile", "tokens", "optimizer", "learning_rate", "muon_learning_rate"}
        if "tokens" in other:
            assert all(
                10 * few <= many
                for few, many in zip(ours["tokens"], released["tokens"], strict=True)
            )
