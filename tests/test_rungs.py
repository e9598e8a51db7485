"""The ladder of exact rungs: each is found by a model that is it, and a mixture climbs no rung."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from latentree.data.corpus import HELD_OUT, held_out, load_corpus
from latentree.evidence.curves import curves, successive
from latentree.measure.rungs import (
    attention_by_distance,
    climb,
    climbed,
    ladder,
    level_names,
    tops,
    without_model,
)
from latentree.train.model import build_model

torch.set_num_threads(1)
PROCESS = load_corpus("filtered-0")
TOKENS = held_out(PROCESS, 200, 17)["tokens"]
LAWS = ladder(PROCESS, TOKENS[:, 1:])


def points(table, quantity):
    totals = table[table["quantity"] == quantity].groupby("name")[["sum", "count"]].sum()
    return totals["sum"] / totals["count"]


def test_a_model_that_is_a_rung_is_nearest_to_it_at_no_distance():
    for number, law in LAWS.items():
        far = points(climb(law.log(), LAWS), "distance")
        assert far.idxmin() == number and far[number] == pytest.approx(0, abs=1e-12)
        assert far.drop(number).min() > 0.015


def test_a_rung_has_the_levels_up_to_it_and_none_above():
    for number, law in enumerate(LAWS.values()):
        share = points(climb(law.log(), LAWS), "share")[level_names(LAWS)]
        assert share[:number].between(0.7, 1.01).all()
        assert (share[number:].abs() < 0.12).all()


@pytest.mark.parametrize("pace", [0.0, 0.2, 0.6, 1.0])
def test_who_takes_all_levels_at_one_pace_has_the_same_share_of_each(pace):
    """All rungs in parallel: the geometric mixture of knowing nothing and knowing all."""
    parallel = (pace * LAWS["filter 0"].log()).log_softmax(-1)
    share = points(climb(parallel, LAWS), "share")
    assert share.to_numpy() == pytest.approx(pace)


def test_a_models_distance_is_its_excess_loss_over_its_own_rung():
    model = build_model("llama", 9, 1, 16, 2, 17).eval()
    table = climbed(model, TOKENS, LAWS)
    log_p = model(TOKENS).logits.detach().log_softmax(-1)[:, :-1, :8].double()
    entropy = -(LAWS["filter 0"] * LAWS["filter 0"].log()).sum(-1).mean()
    expected = -(LAWS["filter 0"] * log_p).sum(-1).mean() - entropy
    assert points(table, "distance")["filter 0"] == pytest.approx(float(expected), abs=1e-5)
    assert set(table["sequence"]) == set(range(200))


def test_attention_is_told_apart_by_the_distance_in_the_tree(monkeypatch):
    place = torch.arange(16)
    to_sister = torch.zeros(17, 17)
    to_sister[0, 0] = 1
    to_sister[1 + place, torch.where(place % 2 == 1, place, 0)] = 1
    even = torch.ones(17, 17).tril()
    even = even / even.sum(1, keepdim=True)
    shown = torch.stack([to_sister, even])[:, None, None]
    monkeypatch.setattr("latentree.measure.rungs.patterns", lambda model, tokens: shown)
    found = attention_by_distance(SimpleNamespace(), TOKENS[:1])
    found = found.pivot(index="block", columns="distance", values="value")
    assert isinstance(found, pd.DataFrame) and list(found.columns) == [1, 2, 3, 4]
    assert found.loc[2].to_numpy() == pytest.approx(1)
    assert found.loc[1, 1] > 5 and (found.loc[1, [2, 3, 4]] == 0).all()


def test_what_stands_without_a_model_is_what_the_subtree_shows():
    rows = held_out(PROCESS, 5, 17)
    top, ends = tops(PROCESS, rows, 2)
    assert ends[0].nonzero()[:, 0].tolist() == [4, 8, 12]
    leaves, place = TOKENS[3, 1:], 8  # of subtrees of four the second
    assert top[3, place] == PROCESS.documents([HELD_OUT + 6]).token["level2"][place]
    known = without_model(PROCESS, rows, 2)
    shown = known["its symbols"][3, place, 17:].view(4, 9).argmax(1)
    assert shown.tolist() == leaves[4:8].flip(0).tolist()
    pairs = known["its pairs"][3, place, 17:].view(2, 81).argmax(1)
    one, other = leaves[4:6], leaves[6:8]
    assert pairs.tolist() == [int(pair[1] * 9 + pair[0]) for pair in (other, one)]
    assert known["place"][3, place].argmax() == place


FEW = {name: law[:60] for name, law in LAWS.items()}


def steps_of(predictions):
    tables = [climb(log_p, FEW).assign(step=2**n) for n, log_p in enumerate(predictions)]
    table = pd.concat(tables)
    found = curves(table[table["quantity"] == "share"], "name", 1)
    return successive({name: found[name] for name in level_names(FEW)}, 0.5)


def test_rung_after_rung_passes_the_rule_for_stages_and_all_in_parallel_does_not():
    steps = steps_of(torch.stack(list(FEW.values())).repeat_interleave(3, 0).log())
    assert len(steps) == 4 and all(low > 0.5 for _, low, _ in steps.values())
    paces = 2.0 ** torch.linspace(-5, 0, 12)
    steps = steps_of([(pace * FEW["filter 0"].log()).log_softmax(-1) for pace in paces])
    assert len(steps) == 4 and all(abs(value) < 0.01 for value, _, _ in steps.values())
    assert not any(low > 0.01 for _, low, _ in steps.values())
