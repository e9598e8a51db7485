"""What the past is worth where words call for words, by readers that need only who called for what.

Each of a role's words calls for one of `options` words, all alike before anything was seen; that
one follows with probability `binding`, else any of the options does. So all that tells of it is
what followed the word since its habits were drawn: a mask (sequence, query, key) of earlier words.
The loss of a query is that of the next token, in nats: (sequence, position), as `tokens`.
"""

import math

import numpy as np
import torch
from torch.nn.functional import one_hot, pad


def ideal_losses(tokens, fresh, options: int, binding: float) -> torch.Tensor:
    """Loss of the reader who knows which earlier words still count.

    `fresh` are the keys since the habits were drawn. By Bayes' rule an option seen c times weighs
    (1 + options binding / (1 - binding))^c: exact.
    """
    seen, next_seen = _counts(tokens, fresh)
    odds = 1 + options * binding / (1 - binding)
    evidence = options + (odds**seen - 1).sum(-1)
    return -(binding * odds**next_seen / evidence + (1 - binding) / options).log()


def inherited_losses(words, seen, part, within, redrawn: float, options: int, binding: float):
    """Loss of the ideal reader where parts inherit a whole's habits.

    A sequence is a whole of `within[0]` parts, each again of `within[1]`, and so on. A part has the
    habits of what it is a part of, but draws each anew with probability `redrawn`. `words` numbers
    a token within its role; `part` is the number of its smallest part, from 0. `seen` are all
    earlier keys of the query's word, expired or not. Exact: messages go up the tree, and Bayes'
    rule compares the evidence with and without the next token.
    """
    odds = 1 + options * binding / (1 - binding)
    said = one_hot(part)[..., None] * one_hot(words, options)[:, :, None].double()

    def evidence(keys):  # of each query: (sequence, query)
        message = odds ** torch.einsum("bqk,bkpw->bqpw", keys.double(), said)
        for parts in reversed(within):
            message = (1 - redrawn) * message + redrawn * message.mean(-1, keepdim=True)
            message = message.unflatten(2, (-1, parts)).prod(3)
        return message.mean(-1)[..., 0]

    following = torch.eye(words.shape[1], dtype=torch.bool).roll(1, 1)
    gained = evidence(seen | following) / evidence(seen)
    return -((1 - binding) / options * gained).log()


def even_losses(tokens, seen, options: int, asked) -> torch.Tensor:
    """Loss of counting all `seen` keys alike, expired ones too.

    An option seen c times of n has probability (c + prior / options) / (n + prior), with the prior
    (of a grid) that makes the loss over the queries `asked` (sequence, position) least.
    """
    counts, next_seen = _counts(tokens, seen)
    total = counts.sum(-1)
    tried = []
    for prior in np.geomspace(0.02, 200, 81):
        tried.append(-((next_seen + prior / options) / (total + prior)).log())
    return min(tried, key=lambda losses: float(losses[asked].sum()))


def gains(losses, asked, options: int) -> torch.Tensor:
    """What is gained over who knows no habit, in nats a token, of each sequence (sequence,)."""
    return ((math.log(options) - losses) * asked).mean(1)


def _counts(tokens, keys):
    """How often each word stands among a query's keys, and how often the next token does."""
    words = one_hot(tokens).double()
    counts = keys.double() @ words
    following = pad(tokens[:, 1:], (0, 1))[..., None]
    return counts, counts.gather(2, following)[..., 0]
