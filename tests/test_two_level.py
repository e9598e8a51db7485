"""The two-level process against enumeration of all its latents."""

import pytest
import torch
from latentree.exact.two_level import TwoLevel, losses

torch.set_num_threads(1)
TINY = {"z0": 2, "z1": 4, "tokens": 4, "own": 3.0, "contrast": 1.0, "noise": 0.5}


def enumerated(process, segments):
    """All evidence and queries (sequence, segment) of one clue each, and probabilities (sequence,)."""
    size = process.log_evidence.shape[1]
    drawn = torch.cartesian_prod(*[torch.arange(size)] * 2 * segments)
    clues, query = drawn[:, :segments], drawn[:, segments:]
    of_pair = process.log_z1[:, :, None, None] + process.log_evidence[None, :, :, None]
    of_pair = (of_pair + process.log_query[:, :, None]).exp().sum(1)  # (z0, clue, query)
    whole = of_pair[:, clues, query].prod(-1)
    return clues, query, (process.log_z0.exp()[:, None] * whole).sum(0)


def test_the_loss_of_who_forgets_equals_enumeration():
    process = TwoLevel(seed=1, **TINY)
    clues, query, p = enumerated(process, 3)
    assert p.sum() == pytest.approx(1)
    found = losses(process, clues[..., None], query, [0, 1, 2, 9])
    table = p.view([4] * 6)  # three clues, then three queries
    for window, gone in enumerate(([0, 1, 3, 4], [0, 3], [])):
        joint = table.sum(gone, keepdim=True) if gone else table
        expected = -(joint / joint.sum(5, keepdim=True)).log().expand(table.shape).flatten()
        assert torch.allclose(found[window], expected, atol=1e-10)
    assert torch.equal(found[3], found[2])


def test_samples_follow_the_law():
    process = TwoLevel(seed=2, **TINY)
    clues, query = process.draw(40000, segments=2, evidence=1)
    _, _, p = enumerated(process, 2)
    number = torch.stack([*clues[..., 0].T, *query.T])
    number = (number * torch.tensor([64, 16, 4, 1])[:, None]).sum(0)
    found = torch.bincount(number, minlength=256) / 40000
    assert ((found - p).abs() < 5 * (p / 40000).sqrt() + 1e-4).all()


def test_one_segment_tells_nearly_all_at_the_papers_contrast_and_little_at_a_lower_one():
    left = {}
    for contrast in (4.0, 0.25):
        process = TwoLevel(contrast=contrast)
        none, one, every = losses(process, *process.draw(4000), [0, 1, 15]).mean(1)
        left[contrast] = (one - every) / (none - every)
    assert left[4.0] < 0.1 and left[0.25] > 0.5


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="z1 = 6"):
        TwoLevel(z1=6)
