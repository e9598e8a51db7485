"""The ladder of exact rungs: each is found by a model that is it, and a mixture climbs no rung."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from latentree.data.corpus import held_out, load_corpus
from latentree.measure.rungs import attention_by_distance, climb, climbed, ladder
from latentree.train.model import build_model

torch.set_num_threads(1)
PROCESS = load_corpus("filtered-0")
TOKENS = held_out(PROCESS, 300, 17)["tokens"]
LAWS = ladder(PROCESS, TOKENS[:, 1:])


def points(table, quantity):
    totals = table[table["quantity"] == quantity].groupby("name")[["sum", "count"]].sum()
    return totals["sum"] / totals["count"]


def test_a_model_that_is_a_rung_is_nearest_to_it_at_no_distance():
    for number, law in enumerate(LAWS):
        far = points(climb(law.log(), LAWS), "distance")
        assert far.idxmin() == number and far[number] == pytest.approx(0, abs=1e-12)
        assert far.drop(number).min() > 0.015


def test_a_rung_has_the_levels_up_to_it_and_none_above():
    for number in range(6):
        share = points(climb(LAWS[number].log(), LAWS), "share")
        assert share.loc[:number].between(0.7, 1.01).all()
        assert share.loc[number + 1 :].abs().max() < 0.12 if number < 5 else True


@pytest.mark.parametrize("pace", [0.0, 0.2, 0.6, 1.0])
def test_who_takes_all_levels_at_one_pace_has_the_same_share_of_each(pace):
    """All rungs in parallel: the geometric mixture of knowing nothing and knowing all."""
    parallel = (pace * LAWS[-1].log()).log_softmax(-1)
    share = points(climb(parallel, LAWS), "share")
    assert share.to_numpy() == pytest.approx(pace)


def test_a_models_distance_is_its_excess_loss_over_its_own_rung():
    model = build_model("llama", 9, 1, 16, 2, 17).eval()
    table = climbed(model, TOKENS, LAWS)
    log_p = model(TOKENS).logits.log_softmax(-1)[:, :-1, :8].double()
    entropy = -(LAWS[-1] * LAWS[-1].log()).sum(-1).mean()
    expected = -(LAWS[-1] * log_p).sum(-1).mean() - entropy
    assert points(table, "distance")[5] == pytest.approx(float(expected), abs=1e-5)
    assert set(table["sequence"]) == set(range(300))


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
    found = found.pivot(index="layer", columns="distance", values="value")
    assert isinstance(found, pd.DataFrame) and list(found.columns) == [1, 2, 3, 4]
    assert found.loc[1].to_numpy() == pytest.approx(1)
    assert found.loc[0, 1] > 5 and (found.loc[0, [2, 3, 4]] == 0).all()
