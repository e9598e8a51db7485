"""Exact predictors of the codebook process: the reader and the copier.

Cues and answers are (sequence, segment). What is predicted are log probabilities (sequence,
segment, answer), float64, of each segment's answer, given its cue and the segments before it.
"""

import torch
from torch.nn.functional import one_hot

from latentree.data.codebook import Codebook


def reader(book: Codebook, cue, answer, seen=None) -> torch.Tensor:
    """Bayes' rule over all codes: the floor for every predictor that sees no more.

    `seen` (sequence, segment, earlier segment), or what broadcasts to it, says which of the earlier
    segments are read; by default all are.
    """
    says = one_hot(book.code, book.answers)[:, cue]  # (code, sequence, segment, answer)
    each = _noisy(book, says)
    told = each.gather(3, answer.expand(len(each), *answer.shape)[..., None])[..., 0].log()
    earlier = torch.ones(answer.shape[1], answer.shape[1]).double().tril(-1)
    if seen is not None:
        earlier = earlier * seen
    earlier = earlier.expand(len(answer), -1, -1)
    posterior = torch.einsum("knt,nst->kns", told, earlier).softmax(0)
    return torch.einsum("kns,knsa->nsa", posterior, each).log()


def copier(book: Codebook, cue, answer) -> torch.Tensor:
    """Bayes' rule for endlessly many codes: only what this very cue was answered tells anything."""
    each = _noisy(book, torch.eye(book.answers))  # (true answer, answer)
    same = (cue[:, :, None] == cue[:, None]).double().tril(-1)
    posterior = (same @ each.log().T[answer]).softmax(2)
    return (posterior @ each).log()


def _noisy(book, says):
    """Probabilities of answers (..., answer), of what is said as one-hot of the same shape."""
    return (1 - book.noise) * says.double() + book.noise / book.answers


def losses(log_p, answer) -> torch.Tensor:
    """The loss (sequence, segment) in nats of predictions (sequence, segment, answer)."""
    return -log_p.gather(2, answer[..., None])[..., 0]
