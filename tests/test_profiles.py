"""The paper's profile, its corpora and settings, through the notebooks, every size made tiny."""

import json
from pathlib import Path

import yaml
from tiny import execute_all

NOTEBOOKS = sorted(Path("notebooks").glob("0[2-6]_*.ipynb"))
SAME = {
    "tokens": [8192] * 6,
    "seeds": [0],
    "layers": 2,
    "width": 16,
    "heads": 2,
    "batch_sequences": 8,
    "checkpoints_even": 1,
    "checkpoints_log": 1,
    "device": "cpu",
    "compiled": False,
    "deep_layers": 3,
    "deep_seeds": [0],
    "deep_tokens": [8192] * 3,
    "furthest": 2,
    "shortest": 20,
    "context": 64,
    "sequences": 96,
    "sequences_at_end": 96,
}


def parameters(profile, name):
    return yaml.safe_load(Path(f"params/{profile}/{name}.yaml").read_text())


def test_the_papers_profile_runs_through_the_notebooks(tmp_path):
    """The paper's parameters, with the sizes of the smoke profile and of SAME."""
    params = tmp_path / "params"
    params.mkdir()
    for name in (path.stem for path in NOTEBOOKS):
        paper, smoke = parameters("paper", name), parameters("smoke", name)
        sizes = {n: v for n, v in smoke.items() if n in paper and isinstance(v, int)}
        values = paper | sizes | {n: value for n, value in SAME.items() if n in paper}
        if "trees" in paper:
            values["tree_tokens"] = [8192] * len(paper["trees"])
        if name[:2] in ("03", "04", "05", "06"):
            values["recipe"] = str(params / "02_training.yaml")
        (params / f"{name}.yaml").write_text(yaml.safe_dump(values))
    execute_all(NOTEBOOKS, params, tmp_path / "out")
    for path in NOTEBOOKS:
        results = json.loads((tmp_path / f"out/results/{path.stem[:2]}.json").read_text())
        assert results["profile"] == "paper" and results["claims"]


def test_the_second_recipe_takes_a_tenth_of_the_tokens_and_nothing_else_differs():
    other = {}
    for file in Path("params/paper").glob("*.yaml"):
        released, ours = parameters("paper", file.stem), parameters("paper-muon", file.stem)
        changed = {n for n in released | ours if released.get(n) != ours.get(n)}
        other |= {name: (released.get(name), ours.get(name)) for name in changed}
    of_muon = {
        "optimizer",
        "learning_rate",
        "muon_learning_rate",
        "query_key_rate",
        "muon_momentum",
    }
    assert other.keys() <= {"profile", "tokens"} | of_muon
    assert all(10 * few <= many for many, few in zip(*other["tokens"], strict=True))
