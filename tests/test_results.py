"""A verdict follows from a claim's numbers, and a claim without evidence is refused."""

import json
import math

import numpy
import pytest
from IPython.core.interactiveshell import InteractiveShell
from latentree.evidence.claims_old import RULES, Claim, show, verdict, write_results
from latentree.run.record import version_of
from tiny import write_project

GOOD = {
    "id": "induction-on-pcfg",
    "source": "Figure 3",
    "statement": "Induction heads form",
    "definition": "field",
    "corpus": "bound",
    "value": 0.5,
    "low": 0.4,
    "high": 0.6,
    "null": 0.1,
    "n": 20,
    "seeds": [0, 1],
    "rule": "low > null + margin",
}


@pytest.mark.parametrize(
    "rule, numbers, expected",
    [
        ("low > null + margin", (0.4, 0.6, 0.1, 0.2, None), "reproduced"),
        ("low > null + margin", (0.25, 0.6, 0.1, 0.2, None), "not reproduced"),
        ("high < null - margin", (0.1, 0.2, 0.4, 0.1, None), "reproduced"),
        ("high < null - margin", (0.1, 0.35, 0.4, 0.1, None), "not reproduced"),
        ("high < null + margin", (0.0, 0.2, 0.1, 0.2, None), "reproduced"),
        ("high < null + margin", (0.0, 0.9, 0.1, 0.2, None), "not reproduced"),
        ("null - margin < low and high < null + margin", (0.0, 0.2, 0.1, 0.2, None), "reproduced"),
        (
            "null - margin < low and high < null + margin",
            (-0.5, 0.2, 0.1, 0.2, None),
            "not reproduced",
        ),
        ("low >= threshold", (0.5, 0.6, None, 0.0, 0.5), "reproduced"),
        ("low >= threshold", (0.4, 0.6, None, 0.0, 0.5), "not reproduced"),
        ("high <= threshold", (0.4, 0.5, None, 0.0, 0.5), "reproduced"),
        ("high <= threshold", (0.4, 0.6, None, 0.0, 0.5), "not reproduced"),
    ],
)
def test_each_rule_decides_both_ways(rule, numbers, expected):
    low, high, null, margin, threshold = numbers
    assert verdict((low + high) / 2, low, high, null, rule, margin, threshold) == expected


def test_a_wide_interval_reproduces_nothing():
    for rule in RULES:
        assert verdict(0.0, -9.0, 9.0, 0.0, rule, margin=1.0, threshold=0.5) == "not reproduced"


def test_a_claim_without_a_value_gives_its_reason():
    claim = Claim(**GOOD | {"value": None, "low": None, "high": None, "reason": "needs 16 layers"})
    assert claim.verdict == "not testable here"
    with pytest.raises(ValueError, match="reason"):
        Claim(**GOOD | {"value": None})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"value": math.nan}, "value = nan"),
        ({"low": math.inf}, "low = inf"),
        ({"low": None}, "low is missing"),
        ({"null": None}, "null is missing"),
        ({"rule": "low >= threshold"}, "threshold is missing"),
        ({"low": 0.7}, "above high"),
        ({"rule": "looks right"}, "rule = 'looks right'"),
        ({"verdict": "reproduced"}, "verdict"),
        ({"definition": "mine"}, "definition = 'mine'"),
        ({"seeds": []}, "seeds"),
        ({"n": 0}, "n = 0"),
        ({"margin": -1.0}, "margin"),
        ({"id": "Two Words"}, "id = 'Two Words'"),
    ],
    ids=str,
)
def test_a_claim_without_evidence_is_refused(change, words):
    with pytest.raises(ValueError) as refusal:
        Claim(**GOOD | change)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_results_are_written_whole_with_profile_and_version(tmp_path, monkeypatch):
    monkeypatch.chdir(write_project(tmp_path, **{"03_induction_heads": []}))
    claim = Claim(**GOOD | {"value": numpy.float32(0.5), "n": numpy.int64(20)})
    file = write_results("out", "03_induction_heads", "smoke", [claim])
    results = json.loads(file.read_text())
    assert file.as_posix() == "out/results/03.json"
    assert (results["notebook"], results["profile"]) == ("03_induction_heads", "smoke")
    assert results["version"] == version_of("smoke")
    assert results["claims"] == [
        GOOD
        | {"margin": 0.0, "threshold": None, "reason": "", "cell": None, "verdict": "reproduced"}
    ]
    assert [path.name for path in file.parent.iterdir()] == ["03.json"]


def test_two_claims_with_one_id_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="there twice"):
        write_results(tmp_path, "03_induction_heads", "smoke", [Claim(**GOOD), Claim(**GOOD)])
    assert not list(tmp_path.iterdir())


def test_show_has_a_row_for_each_claim():
    table = show([Claim(**GOOD)])
    assert table.loc["induction-on-pcfg", "verdict"] == "reproduced"


def test_a_claim_knows_the_cell_that_made_it():
    shell = InteractiveShell.instance()
    shell.user_ns |= {"Claim": Claim, "GOOD": GOOD}
    shell.run_cell("first = 1", store_history=True)
    shell.run_cell("claim = Claim(**GOOD)", store_history=True)
    assert shell.user_ns["claim"].cell == 2 and Claim(**GOOD | {"cell": None}).cell is None
    InteractiveShell.clear_instance()
