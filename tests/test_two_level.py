"""The two-level process against enumeration of all its latents and sequences."""

import pytest
import torch
from latentree.data.corpus import HELD_OUT, Stream
from latentree.data.two_level import KINDS, TwoLevel, clear_segments, contested
from latentree.exact.two_level import forgetting, informations, losses, predictive

torch.set_num_threads(1)
TINY = {"segments": 3, "evidence": 1, "z0": 2, "z1": 4, "tokens": 4, "own": 3.0}
TINY |= {"contrast": 1.0, "noise": 0.5}


def enumerated(process):
    """All sequences, tokens (sequence, position), and their log probabilities, over all latents."""
    segments, size = process.segments, len(process.parent)
    free = [torch.arange(process.cue)] * segments * (process.evidence + 1)
    drawn = torch.cartesian_prod(*free).view(-1, segments, process.evidence + 1)
    tokens = torch.full((len(drawn), segments, process.length), process.cue)
    tokens[..., : process.evidence], tokens[..., -1] = drawn[..., :-1], drawn[..., -1]
    parts = []
    for z1 in torch.cartesian_prod(*[torch.arange(size)] * segments).view(-1, segments):
        told = process.log_evidence[z1[:, None], drawn[..., :-1]].sum(-1)  # (sequence, segment)
        query = process.log_query[:, z1[None], drawn[..., -1]]  # (z0, sequence, segment)
        prior = process.log_z1[:, z1][:, None]  # (z0, 1, segment)
        if process.kind == "released flat":
            if len(z1.unique()) == segments:
                ways = torch.arange(size, size - segments, -1).double().log().sum()
                own = query[process.parent[z1], :, torch.arange(segments)].T
                parts.append((told + own).sum(-1) - ways)
        elif process.kind == "hierarchical":
            whole = (told + query + prior).sum(-1)
            parts.append(torch.logsumexp(process.log_z0[:, None] + whole, 0))
        else:
            each = process.log_z0[:, None, None] + told + query + prior
            parts.append(torch.logsumexp(each, 0).sum(-1))
    return tokens.flatten(1), torch.logsumexp(torch.stack(parts), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_filter_equals_enumeration_and_probabilities_sum_to_one(kind):
    process = TwoLevel(kind, seed=1, **TINY)
    tokens, log_p = enumerated(process)
    assert torch.logsumexp(log_p, 0) == pytest.approx(0, abs=1e-10)
    exact = predictive(process, tokens)
    assert torch.allclose(exact.exp().sum(-1), torch.ones(1, dtype=torch.float64))
    assert (-losses(process, tokens).sum(1) - log_p).abs().max() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_unseen_tokens_are_summed_over(kind):
    """Left unread: the first evidence and a later query. The last query is asked for."""
    process = TwoLevel(kind, seed=2, **TINY)
    tokens, log_p = enumerated(process)
    seen = torch.ones_like(tokens, dtype=torch.bool)
    seen[:, [0, 5]] = False
    found = predictive(process, tokens, seen)[:, -1]
    table = torch.zeros(4, 4, 4, 4, dtype=torch.float64)  # query, evidence, evidence, last query
    known = (tokens[:, 2], tokens[:, 3], tokens[:, 6], tokens[:, 8])
    table.index_put_(known, log_p.exp(), accumulate=True)
    expected = (table / table.sum(-1, keepdim=True))[known[:3]]
    assert torch.allclose(found[:, :4].exp(), expected, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_exact_law_and_cost_what_they_should(kind):
    process = TwoLevel(kind, seed=3, **TINY)
    log_p = enumerated(process)[1]
    entropy = float(-(log_p.exp() * log_p).sum())
    drawn = process.documents(HELD_OUT + torch.arange(4000)).tokens.view(4000, -1)
    cost = losses(process, drawn).sum(1)
    assert abs(cost.mean() - entropy) < 3 * cost.std() / 4000**0.5


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_what_the_kind_says(kind):
    process = TwoLevel(kind, seed=4)
    documents = process.documents(torch.arange(2000))
    z0, z1 = (documents.token[name].view(2000, 16, 8)[..., 0] for name in ("z0", "z1"))
    if kind == "hierarchical":
        assert (z0 == z0[:, :1]).all()
    if kind == "matched flat":
        assert (z0 != z0[:, :1]).any(1).float().mean() > 0.5
    if kind == "released flat":
        assert (z1.sort(1).values == torch.arange(16)).all()
        assert torch.equal(z0, process.parent[z1])
    else:
        share = torch.bincount(z0[:, 0], minlength=4) / 2000
        assert (share - process.log_z0.exp()).abs().max() < 4 * (0.25 / 2000) ** 0.5
        assert 0.8 < (process.parent[z1] == z0).double().mean() < 1
    again = process.documents(torch.tensor([7]))
    assert torch.equal(again.tokens, documents.tokens.view(2000, -1)[7])


def test_a_window_as_long_as_a_sequence_is_one():
    """Training reads the stream, whose rows must not be cut elsewhere."""
    stream = Stream(TwoLevel(seed=0), rows=4, context=128)
    for _ in range(3):
        cues = stream.next_batch().view(4, 16, 8) == 64
        assert cues[..., 6].all() and cues.sum() == 64


def test_only_the_hierarchical_process_gains_from_earlier_segments():
    gains = {}
    for kind in ("hierarchical", "matched flat"):
        process = TwoLevel(kind, seed=0)
        tokens = process.documents(HELD_OUT + torch.arange(200)).tokens.view(200, -1)
        gains[kind] = float(forgetting(process, tokens, [7]).mean())
    assert gains["hierarchical"] > 0.1 and gains["matched flat"] == pytest.approx(0, abs=1e-12)


def test_informations_are_those_of_the_enumerated_process():
    """Of one segment with one evidence token: all values of (z0, z1, evidence, query)."""
    process = TwoLevel(seed=3, **TINY | {"segments": 1})
    pair = (process.log_z0[:, None] + process.log_z1).exp()
    given = (pair, process.log_evidence.exp(), process.log_query.exp())
    joint = torch.einsum("ab,be,abq->abeq", *given)
    assert torch.allclose(joint.sum((0, 1)).flatten(), enumerated(process)[1].exp(), atol=1e-12)

    def h(*kept):
        gone = [axis for axis in range(4) if axis not in kept]
        p = joint.sum(gone)
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
    assert informations(process) == pytest.approx(want, abs=1e-10)


# ---------------------------------------------------------------------- made for a question


def block_of(process, tokens):
    """The global latent (...) in whose block most tokens (..., length) of a segment lie."""
    said = tokens[..., torch.arange(process.length) != process.evidence]
    return (said // (process.cue // len(process.log_z0))).mode(-1).values


def test_clear_segments_have_their_cue_in_place_and_say_their_latent():
    process, z0 = TwoLevel(seed=0), torch.arange(4).repeat(30, 10)
    segments = clear_segments(process, z0, seed=1)
    assert (segments[..., 6] == 64).all() and (segments == 64).sum() == 1200
    assert torch.equal(block_of(process, segments), z0)
    assert not torch.equal(clear_segments(process, z0, 2), segments)


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


def test_contested_sequences_share_all_but_the_deciding_segment():
    for segments in (4, 5, 6, 7):  # before the last two, none to three are left over by z0 = 4
        process, earlier = TwoLevel(seed=0, segments=segments), segments - 1
        distances = [*range(1, segments)]
        tokens, sides = contested(process, 20, distances, seed=3)
        assert tokens.shape == (earlier, 2, 20, segments * 8) and (sides[0] != sides[1]).all()
        split, rest, deciding = tokens.unflatten(-1, (segments, 8)), [], []
        for distance, one in zip(distances, split):
            at = earlier - distance
            rest.append(torch.cat([one[:, :, :at], one[:, :, at + 1 :]], 2))
            deciding.append(one[:, :, at])
        rest, deciding = torch.stack(rest), torch.stack(deciding)
        assert (rest == rest[0, 0]).all() and (deciding == deciding[0]).all()
        assert torch.equal(block_of(process, deciding[0]), sides)
        latent, row = block_of(process, rest[0, 0]), torch.arange(20)
        votes = torch.nn.functional.one_hot(latent[:, :-1], 4).sum(1)
        even = votes[row, sides[0]]
        assert (latent[:, -1] != sides).all() and torch.equal(even, votes[row, sides[1]])
        assert (votes.scatter(1, sides.T, 99).min(1).values >= even - 1).all()
        assert (votes.max(1).values - even <= (earlier % 4 == 2)).all()  # but for one left over


def test_the_deciding_segment_moves_the_exact_predictor_alike_at_any_distance():
    process = TwoLevel(seed=2)
    tokens, sides = contested(process, 24, [1, 2, 7, 14, 15])
    log_p = predictive(process, tokens.flatten(0, 2))[:, -1].view(5, 2, 24, 65)
    masses = log_p[..., :64].exp().unflatten(-1, (4, 16)).sum(-1).log()
    row = torch.arange(24)
    odds = masses[:, :, row, sides[1]] - masses[:, :, row, sides[0]]
    assert (odds - odds[0]).abs().max() < 1e-9
    assert (odds[0, 1] > 1).all() and (odds[0, 0] < -1).all()


def test_contests_and_processes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"distances = \[0\]: give some from 1 to 15"):
        contested(TwoLevel(), 4, [0])
    with pytest.raises(ValueError, match="kind = 'flat': is unknown; use one of hierarchical"):
        TwoLevel("flat")
    with pytest.raises(ValueError, match="z1 = 6"):
        TwoLevel(z1=6)
