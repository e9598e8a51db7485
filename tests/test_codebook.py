"""The codebook process and its exact predictors against enumeration of all codes and sequences."""

import numpy as np
import pytest
import torch
from latentree.data.codebook import Codebook
from latentree.data.corpus import HELD_OUT, Stream, held_out
from latentree.exact.codebook import copier, losses, reader

torch.set_num_threads(1)
TINY = Codebook(codes=3, cues=2, answers=2, segments=3, seed=4)


def enumerated(book):
    """All cues and answers (sequence, segment), and probabilities (sequence,) of the answers."""
    sizes = [book.cues] * book.segments + [book.answers] * book.segments
    cue, answer = torch.cartesian_prod(*map(torch.arange, sizes)).split(book.segments, 1)
    p = 0.0
    for code in book.code:
        right = code[cue] == answer
        each = (1 - book.noise) * right.double() + book.noise / book.answers
        p = p + each.prod(1) / len(book.code)
    return cue, answer, p


def given(cue, answer, p, kept):
    """P(last answer | cues, the answers of the segments in `kept`), (sequence,), by summing."""
    found = []
    for row in range(len(cue)):
        same = (cue == cue[row]).all(1) & (answer[:, kept] == answer[row, kept]).all(1)
        found.append(p[same & (answer[:, -1] == answer[row, -1])].sum() / p[same].sum())
    return torch.stack(found)


def test_the_reader_equals_enumeration():
    cue, answer, p = enumerated(TINY)
    log_p = reader(TINY, cue, answer)
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(1, dtype=torch.float64))
    assert torch.allclose(-losses(log_p, answer).sum(1), p.log(), atol=1e-12)


def test_who_forgets_a_segment_sums_over_it():
    cue, answer, p = enumerated(TINY)
    for kept in ([], [0], [1], [0, 1]):
        seen = torch.zeros(3, 3)
        seen[2, kept] = 1
        found = -losses(reader(TINY, cue, answer, seen), answer)[:, -1]
        assert torch.allclose(found.exp(), given(cue, answer, p, kept), atol=1e-12)


def test_the_copier_is_the_reader_of_all_codes_there_can_be():
    book = Codebook(codes=1, cues=3, answers=2, segments=6)
    book.code = torch.cartesian_prod(*[torch.arange(2)] * 3)
    drawn = torch.Generator().manual_seed(0)
    cue, answer = (torch.randint(n, (50, 6), generator=drawn) for n in (3, 2))
    assert torch.allclose(copier(book, cue, answer), reader(book, cue, answer), atol=1e-12)


def test_samples_follow_the_law_and_cost_what_they_should():
    fields = held_out(TINY, 4000, 6)
    cue, answer = TINY.split(fields["tokens"])
    assert torch.equal(TINY.tokens(cue, answer), fields["tokens"])
    said = TINY.code[fields["latent"][:, ::2], cue]
    assert abs((said == answer).double().mean() - 0.875) < 0.015  # right, or by chance
    assert abs(torch.bincount(cue.flatten()) / 12000 - 0.5).max() < 0.02
    assert abs(torch.bincount(fields["latent"][:, 0]) / 4000 - 1 / 3).max() < 0.03
    _, _, p = enumerated(TINY)
    entropy = float(-(p / 8 * p.log()).sum())  # there are 8 rows of cues, all alike
    cost = losses(reader(TINY, cue, answer), answer).sum(1)
    assert abs(cost.mean() - entropy) < 3 * cost.std() / 4000**0.5


def test_a_sequence_is_a_function_of_its_number_and_a_window():
    book = Codebook(codes=5, segments=16)
    many = book.documents(HELD_OUT + torch.arange(20)).tokens.view(20, 32)
    assert torch.equal(book.documents(torch.tensor([HELD_OUT + 7])).tokens, many[7])
    batch = Stream(book, rows=4, context=32).next_batch()
    assert (batch[:, ::2] < 16).all() and (batch[:, 1::2] >= 16).all()
    other = Codebook(codes=5, segments=16, seed=1)
    assert not torch.equal(other.code, book.code) and other.digest == book.digest
    assert Codebook(codes=6, segments=16).digest != book.digest


@pytest.mark.parametrize("codes", [8, 64])
def test_looking_up_and_inferring_lie_apart(codes):
    """The copier knows nothing of a cue that is new; the reader knows it by the others."""
    book = Codebook(codes)
    cue, answer = book.split(held_out(book, 300, 64)["tokens"])
    new = ~(cue[:, :, None] == cue[:, None]).tril(-1).any(2)
    late = new & (torch.arange(32) > 12)
    assert np.allclose(losses(copier(book, cue, answer), answer)[new], np.log(4))
    assert losses(reader(book, cue, answer), answer)[late].mean() < 1.2
