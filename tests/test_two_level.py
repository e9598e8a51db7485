"""The two-level process against enumeration of all its latents and sequences."""

import numpy as np
import pytest
import torch
from latentree.data.corpus import HELD_OUT, held_out
from latentree.data.two_level import (
    HIERARCHICAL,
    KINDS,
    MATCHED_FLAT,
    RELEASED_FLAT,
    TwoLevel,
    clear_segments,
    contested,
    enumerated,
    predictive,
)
from latentree.train.training import TrainingConfig, train

torch.set_num_threads(1)
TINY = {
    "segments": 3,
    "evidence": 1,
    "z0": 2,
    "z1": 4,
    "tokens": 4,
    "own": 3.0,
    "contrast": 1.0,
    "noise": 0.5,
}


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
    assert (documents.tokens.view(2000, 16, 8)[..., 6] == 64).all() and int(
        documents.tokens.max()
    ) == 64
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
    assert torch.equal(again.tokens, documents.tokens.view(2000, -1)[7]) and torch.equal(
        process.documents([7]).tokens, again.tokens
    )


def test_only_the_hierarchical_process_gains_from_earlier_segments():
    gains = {}
    for kind in (HIERARCHICAL, MATCHED_FLAT):
        process = TwoLevel(kind, seed=0)
        tokens = process.documents(HELD_OUT + torch.arange(200)).tokens.view(200, -1)
        current = (torch.arange(128) >= 120).expand(200, -1)
        losses = [
            -predictive(process, tokens, seen)[:, -1].gather(1, tokens[:, -1:])
            for seen in (current, None)
        ]
        gains[kind] = float((losses[0] - losses[1]).mean())
    assert gains[HIERARCHICAL] > 0.1 and gains[MATCHED_FLAT] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seed", [0, 3])
def test_informations_are_those_of_the_enumerated_process(seed):
    """Of one segment with one evidence token: all values of (z0, z1, evidence, query) with their probabilities."""
    process = TwoLevel(
        seed=seed, segments=1, evidence=1, z0=2, z1=4, tokens=4, own=3.0, contrast=1.0, noise=0.5
    )
    pair = (process.log_z0[:, None] + process.log_z1).exp()
    joint = torch.einsum(
        "ab,be,abq->abeq", pair, process.log_evidence.exp(), process.log_query.exp()
    )
    tokens, log_p = enumerated(process)
    assert torch.allclose(joint.sum((0, 1)).flatten(), log_p.exp(), atol=1e-12)

    def h(*kept):
        p = joint.sum([axis for axis in range(4) if axis not in kept]) if len(kept) < 4 else joint
        return float(-(p * p.log()).sum())

    want = {
        "H(z0)": h(0),
        "H(z1)": h(1),
        "I(z0; z1)": h(0) + h(1) - h(0, 1),
        "H(query)": h(3),
        "I(query; z0)": h(0) + h(3) - h(0, 3),
        "I(query; z0 | z1)": h(0, 1) + h(1, 3) - h(1) - h(0, 1, 3),
        "I(query; z1 | z0)": h(0, 1) + h(0, 3) - h(0) - h(0, 1, 3),
        "I(evidence; z0)": h(0) + h(2) - h(0, 2),
    }
    assert process.informations == pytest.approx(want, abs=1e-10)


def test_the_leak_is_the_information_in_earlier_draws():
    process = TwoLevel(RELEASED_FLAT)
    assert process.leak[0] == 0 and process.leak[-1] == pytest.approx(np.log(16))
    assert torch.allclose(process.leak, torch.tensor([np.log(16 / (16 - s)) for s in range(16)]))


def block_of(process, tokens):
    """The global latent (...) in whose block the tokens (..., length) of a segment lie, and what share of them does."""
    said = tokens[..., torch.arange(process.length) != process.evidence] // (
        process.cue // len(process.log_z0)
    )
    latent = said.mode(-1).values
    return latent, (said == latent[..., None]).double().mean(-1)


def test_clear_segments_have_their_cue_in_place_and_say_their_latent():
    process, z0 = TwoLevel(seed=0), torch.arange(4).repeat(30, 10)
    segments = clear_segments(process, z0, seed=1)
    assert (
        segments.shape == (30, 40, 8)
        and ((segments == 64).nonzero()[:, -1] == 6).all()
        and (segments == 64).sum() == 1200
    )
    latent, share = block_of(process, segments)
    assert torch.equal(latent, z0) and share.mean() > 0.99
    assert torch.equal(clear_segments(process, z0, 1), segments) and not torch.equal(
        clear_segments(process, z0, 2), segments
    )
    assert clear_segments(process, torch.tensor(3)).shape == (8,)


def test_clear_segments_are_drawn_from_the_latents_own_local_latents():
    """How often each evidence and query come together is known exactly."""
    process, count = TwoLevel(seed=1, **TINY), 20000
    for z0 in (0, 1):
        drawn = clear_segments(process, torch.full((count,), z0))
        own = process.log_z1[z0].exp() * (process.parent == z0)
        evidence, query = process.log_evidence.exp(), process.log_query[z0].exp()
        expected = torch.einsum("l,le,lq->eq", own / own.sum(), evidence, query)
        found = torch.bincount(drawn[:, 0] * 4 + drawn[:, 2], minlength=16).view(4, 4) / count
        assert ((found - expected).abs() < 4 * (expected / count).sqrt()).all()


@pytest.mark.parametrize(
    "segments", [2, 3, 4, 6, 7, 16]
)  # of z0 = 4: what is left over is none, one, two or three
def test_contested_sequences_share_all_but_the_deciding_segment(segments):
    process, earlier = TwoLevel(seed=0, segments=segments), segments - 1
    distances = [*range(1, segments)]
    tokens, sides = contested(process, 20, distances, seed=3)
    assert (
        tokens.shape == (earlier, 2, 20, segments * 8)
        and sides.shape == (2, 20)
        and (sides[0] != sides[1]).all()
    )
    split = tokens.unflatten(-1, (segments, 8))
    rest = torch.stack(
        [
            torch.cat([one[:, :, : earlier - d], one[:, :, earlier - d + 1 :]], 2)
            for d, one in zip(distances, split)
        ]
    )
    assert (
        rest == rest[0, 0]
    ).all()  # the same segments in the same order, for all distances and both sides
    deciding = torch.stack([one[:, :, earlier - d] for d, one in zip(distances, split)])
    assert (deciding == deciding[0]).all() and (deciding[:, 0] != deciding[:, 1]).any(-1).all()
    assert torch.equal(block_of(process, deciding[0])[0], sides)
    latent, row = block_of(process, rest[0, 0])[0], torch.arange(20)
    last, count = latent[:, -1], torch.nn.functional.one_hot(latent[:, :-1], 4).sum(1)
    assert (last != sides).all()
    even, others = count[row, sides[0]], count.scatter(1, sides.T, 99)
    assert torch.equal(even, count[row, sides[1]]) and (others.min(1).values >= even - 1).all()
    assert (
        count.max(1).values - even <= (earlier % 4 == 2)
    ).all()  # none has more than a side, but for a single one left over
    assert torch.equal(count[row, last], count.scatter(1, sides.T, -1).max(1).values)
    again = contested(process, 20, distances[-1:], seed=3)
    assert torch.equal(again[0][0], tokens[-1]) and torch.equal(again[1], sides)
    assert not torch.equal(contested(process, 20, distances, seed=4)[0], tokens)


@pytest.mark.parametrize(
    "seed, decided", [(0, 0.4), (2, 1.0)]
)  # tables differ in how far one segment can outweigh others
def test_the_deciding_segment_moves_the_exact_predictor_alike_at_any_distance(seed, decided):
    process = TwoLevel(seed=seed)
    tokens, sides = contested(process, 24, [1, 2, 7, 14, 15])
    log_p = predictive(process, tokens.flatten(0, 2))[:, -1].view(5, 2, 24, 65)
    masses = log_p[..., :64].exp().unflatten(-1, (4, 16)).sum(-1).log()
    towards = [masses.gather(-1, side.expand(5, 2, -1)[..., None])[..., 0] for side in sides]
    odds = towards[1] - towards[0]
    assert (odds - odds[0]).abs().max() < 1e-9
    moved = (odds[0, 1] - odds[0, 0]) / 2
    assert (moved > 0).all() and moved.mean() > 2
    assert ((odds[0, 1] > 1) & (odds[0, 0] < -1)).double().mean() >= decided


@pytest.mark.parametrize(
    "fields, distances", [({"z0": 2}, [1]), ({}, [0]), ({}, [1, 16]), ({"segments": 4}, [4])]
)
def test_contests_that_cannot_be_are_refused(fields, distances):
    process = TwoLevel(**fields)
    with pytest.raises(
        ValueError,
        match=rf"distances = .*: give some from 1 to {process.segments - 1}, in a process of 3",
    ):
        contested(process, 4, distances)


def test_the_process_can_be_trained_on(tmp_path):
    process = TwoLevel(seed=0)
    unseen = held_out(process, 8, 128)["tokens"]
    config = TrainingConfig(
        layers=1,
        width=16,
        heads=2,
        context=128,
        batch_sequences=8,
        tokens=4096,
        checkpoints_even=1,
        checkpoints_log=0,
    )
    assert len(train(config, process, unseen, tmp_path / "run", device="cpu", progress=False)) > 0
    assert (unseen.view(8, 16, 8)[..., 6] == 64).all()  # every window is one sequence
    assert predictive(process, unseen).shape == (8, 128, 65)


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"kind": "flat"}, "unknown"),
        ({"z1": 6}, "multiples"),
        ({"kind": RELEASED_FLAT, "segments": 17}, "at most z1"),
    ],
)
def test_processes_that_cannot_be_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        TwoLevel(**fields)
    with pytest.raises(ValueError, match="too many to enumerate"):
        enumerated(TwoLevel())
