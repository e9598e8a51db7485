"""The two-level process against enumeration of all its latents and sequences."""

import numpy as np
import pytest
import torch
from latentree.corpus import held_out
from latentree.errors import UserError
from latentree.sampler import HELD_OUT
from latentree.training import TrainingConfig, train
from latentree.two_level import HIERARCHICAL, KINDS, MATCHED_FLAT, RELEASED_FLAT, TwoLevel, enumerated, exchanged, predictive, window_losses

torch.set_num_threads(1)
TINY = {"segments": 3, "evidence": 1, "z0": 2, "z1": 4, "tokens": 4, "own": 3.0, "contrast": 1.0, "noise": 0.5}


@pytest.mark.parametrize("kind", KINDS)
def test_the_filter_equals_enumeration_and_probabilities_sum_to_one(kind):
    process = TwoLevel(kind, seed=1, **TINY)
    tokens, log_p = enumerated(process)
    assert torch.logsumexp(log_p, 0) == pytest.approx(0, abs=1e-10)
    exact = predictive(process, tokens)
    assert torch.allclose(exact.exp().sum(-1), torch.ones(1, dtype=torch.float64))
    found = exact.gather(-1, tokens[..., None])[..., 0].sum(1)
    assert (found - log_p).abs().max() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_unseen_tokens_are_summed_over(kind):
    process = TwoLevel(kind, seed=2, **TINY)
    tokens, log_p = enumerated(process)
    seen = torch.ones_like(tokens, dtype=torch.bool)
    seen[:, [0, 5]] = False
    found = predictive(process, tokens, seen)[:, -1]
    known = tokens[:, [2, 3, 8]]  # all that is left before the last query, and the query itself
    joint = {}
    keys = [tuple(row) for row in torch.cat([known, tokens[:, [6]]], 1).tolist()]
    for key, p in zip(keys, log_p.exp().tolist()):
        joint[key] = joint.get(key, 0.0) + p
    context = {}
    for (a, b, x, c), p in joint.items():
        context[a, b, c] = context.get((a, b, c), 0.0) + p
    for row in range(0, len(tokens), 97):
        a, b, x, c = keys[row]
        assert found[row, x].exp() == pytest.approx(joint[keys[row]] / context[a, b, c], abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_exact_law_and_cost_what_they_should(kind):
    process = TwoLevel(kind, seed=3, **TINY)
    tokens, log_p = enumerated(process)
    entropy = float(-(log_p.exp() * log_p).sum())
    drawn = process.documents(HELD_OUT + torch.arange(4000)).tokens.view(4000, -1)
    losses = -predictive(process, drawn).gather(-1, drawn[..., None])[..., 0].sum(1)
    assert abs(losses.mean() - entropy) < 3 * losses.std() / 4000**0.5


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_what_the_kind_says(kind):
    process = TwoLevel(kind, seed=4)
    documents = process.documents(torch.arange(2000))
    z0, z1 = (documents.token[name].view(2000, 16, 8)[..., 0] for name in ("z0", "z1"))
    assert (documents.tokens.view(2000, 16, 8)[..., 6] == 64).all() and int(documents.tokens.max()) == 64
    if kind == HIERARCHICAL:
        assert (z0 == z0[:, :1]).all()
    if kind == MATCHED_FLAT:
        assert (z0 != z0[:, :1]).any(1).float().mean() > 0.5
    if kind == RELEASED_FLAT:
        assert (z1.sort(1).values == torch.arange(16)).all() and torch.equal(z0, process.parent[z1])
    else:
        share = torch.bincount(z0[:, 0], minlength=4) / 2000
        assert (share - process.log_z0.exp()).abs().max() < 4 * (0.25 / 2000) ** 0.5
        own = (process.parent[z1] == z0).double().mean()
        assert 0.8 < own < 1
    again = process.documents(torch.arange(2000)[[7]])
    assert torch.equal(again.tokens, documents.tokens.view(2000, -1)[7]) and torch.equal(process.documents([7]).tokens, again.tokens)


def test_only_the_hierarchical_process_gains_from_earlier_segments():
    losses = {}
    for kind in (HIERARCHICAL, MATCHED_FLAT):
        process = TwoLevel(kind, seed=0)
        tokens = process.documents(HELD_OUT + torch.arange(200)).tokens.view(200, -1)
        losses[kind] = window_losses(process, tokens, [7, 15, 127])
        full = -predictive(process, tokens).gather(-1, tokens[..., None])[..., 0][:, process.queries]
        assert torch.allclose(losses[kind][2], full)
    assert torch.allclose(losses[MATCHED_FLAT][0], losses[MATCHED_FLAT][2])
    late = losses[HIERARCHICAL][..., 8:].mean((1, 2))
    assert late[0] > late[1] > late[2]


def test_the_leak_is_the_information_in_earlier_draws():
    process = TwoLevel(RELEASED_FLAT)
    assert process.leak[0] == 0 and process.leak[-1] == pytest.approx(np.log(16))
    assert torch.allclose(process.leak, torch.tensor([np.log(16 / (16 - s)) for s in range(16)]))


def test_an_exchanged_segment_moves_the_exact_predictor_alike_at_any_distance():
    process = TwoLevel(seed=0)
    documents = process.documents(HELD_OUT + torch.arange(300))
    tokens, z0 = documents.tokens.view(300, -1), documents.token["z0"].view(300, -1)[:, 0]
    row, last = torch.arange(300), tokens[:, -1]
    before = predictive(process, tokens)[row, -1, last]
    effects = []
    for distance in (1, 8, 15):
        new = exchanged(process, tokens, z0, distance)
        changed = (new != tokens).any(0).nonzero()[:, 0]
        assert changed.min() >= (15 - distance) * 8 and changed.max() < (16 - distance) * 8
        effects.append(float((before - predictive(process, new)[row, -1, last]).mean()))
    assert max(effects) - min(effects) < 0.02


def test_the_process_can_be_trained_on(tmp_path):
    process = TwoLevel(seed=0)
    unseen = held_out(process, 8, 128)["tokens"]
    config = TrainingConfig(layers=1, width=16, heads=2, context=128, batch_sequences=8, tokens=4096, checkpoints_even=1, checkpoints_log=0)
    assert len(train(config, process, unseen, tmp_path / "run", device="cpu", progress=False)) > 0
    assert (unseen.view(8, 16, 8)[..., 6] == 64).all()  # every window is one sequence
    assert predictive(process, unseen).shape == (8, 128, 65)


@pytest.mark.parametrize("fields, match", [({"kind": "flat"}, "unknown"), ({"z1": 6}, "multiples"), ({"kind": RELEASED_FLAT, "segments": 17}, "at most z1")])
def test_processes_that_cannot_be_are_refused(fields, match):
    with pytest.raises(UserError, match=match):
        TwoLevel(**fields)
    with pytest.raises(UserError, match="too many to enumerate"):
        enumerated(TwoLevel())
