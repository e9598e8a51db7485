"""A claim asks about its whole interval; two runs are compared claim by claim."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentree.evidence.claims import Claim, claims_table
from latentree.evidence.compare import claims_of, differences, main

NUMBERS = st.floats(-10, 10)


def claim(id="a-claim", interval=(0.5, 0.4, 0.6), above=0.3, **more):
    given = {"source": "Figure 2", "statement": "it holds", "corpus": "bound", "n": 8, "seeds": [0]}
    return Claim(id=id, interval=interval, above=above, **given | more)


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_the_verdict_asks_about_the_whole_interval(one, other, above, below):
    low, high = sorted((one, other))
    made = claim(interval=((low + high) / 2, low, high), above=above, below=below)
    inside, outside = low > above and high < below, high <= above or low >= below
    told = "as predicted" if inside else "contradicted" if outside else "undecided"
    assert made.verdict == told and made.holds == inside


def test_a_wide_interval_decides_nothing():
    assert claim(interval=(0.5, -9.0, 9.0)).verdict == "undecided"
    assert claim(interval=(0.5, -9.0, 9.0), above=None, below=1.0).verdict == "undecided"


@pytest.mark.parametrize(
    "whose, words", [("paper", "present absent"), ("ours", "as_predicted contradicted")]
)
def test_a_phenomenon_is_present_or_absent_and_a_prediction_holds_or_not(whose, words):
    verdicts = [claim(above=at, whose=whose).verdict for at in (0.3, 0.7)]
    assert verdicts == [word.replace("_", " ") for word in words.split()]
    assert claim(above=None, below=0.7, whose="control").verdict == "as predicted"
    assert claim(above=None, below=0.3, whose="control").verdict == "contradicted"


def test_what_was_not_measured_needs_a_reason():
    assert claim(interval=None, reason="no network").verdict == "not tested"
    with pytest.raises(ValueError, match="a-claim: interval is None; give the reason"):
        claim(interval=None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"above": None}, "has no region"),
        ({"interval": (0.5, 0.6, 0.4)}, "interval 0.6 to 0.4 is none"),
        ({"interval": (float("nan"),) * 3}, "interval nan to nan is none"),
        ({"n": 0}, "n = 0"),
        ({"seeds": []}, r"seeds = \[\]"),
    ],
)
def test_a_claim_without_evidence_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        claim(**change)


def test_a_table_of_claims_has_their_verdicts():
    table = claims_table([claim(), claim("another", above=0.45)])
    assert list(table.index) == ["a-claim", "another"]
    assert list(table.verdict) == ["present", "undecided"]


def write(folder, *claims):
    (folder / "results").mkdir(parents=True)
    content = {"notebook": "03_x", "claims": [one.as_dict() for one in claims]}
    (folder / "results" / "03.json").write_text(json.dumps(content))
    return folder


def test_compare_lists_what_differs(tmp_path, capsys):
    one = write(tmp_path / "one", claim(), claim("gone"), claim("same", (0.5 + 1e-9, 0.4, 0.6)))
    other = write(tmp_path / "other", claim(interval=(0.5, 0.2, 0.6)), claim("same"), claim("new"))
    found = differences(claims_of(one), claims_of(other))
    rows = set(zip(found.claim, found.what))
    assert rows == {("a-claim", "low"), ("a-claim", "verdict"), ("gone", "claim"), ("new", "claim")}
    assert main([str(one), str(other)]) == 1
    assert "3 of 4 claims differ" in capsys.readouterr().out
    assert main([str(one), str(one)]) == 0


def test_compare_needs_results(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path)])
    assert "has no results/*.json" in capsys.readouterr().err
