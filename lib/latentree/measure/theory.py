"""Four tests of the paper's Theorem 1 on the codebook process.

Three of them ask any *predictor*, a model or an exact reader: predict(cue, answer) gives log
probabilities (sequence, segment, answer) of each answer from cues and answers (sequence, segment),
its own cue and the segments before it being known. The fourth looks into a model.
"""

from itertools import product

import numpy as np
import pandas as pd
import torch

from latentree.data.codebook import Codebook
from latentree.exact.codebook import losses, reader
from latentree.inside.trace import run


def predictions(model, book: Codebook, cue, answer, change=None) -> torch.Tensor:
    """A model's log probabilities (sequence, segment, answer), float64; `change` as trace.run's."""
    tokens = book.tokens(cue, answer)[:, :-1]
    logits = run(model, tokens, ["logits"], change)["logits"][:, ::2, book.cues :]
    return logits.double().log_softmax(-1).cpu()


def forgetting(predict, cue, answer, windows) -> torch.Tensor:
    """Excess loss in nats (window, sequence) at the last answer, of who gets the last segments.

    `windows` are numbers of earlier segments. The text begins with them; nothing is masked.
    """
    whole = losses(predict(cue, answer), answer)[:, -1]
    found = []
    for window in windows:
        part = cue[:, -window - 1 :], answer[:, -window - 1 :]
        found.append(losses(predict(*part), part[1])[:, -1] - whole)
    return torch.stack(found)


# ---------------------------------------------------------------------- distance


def donors(book: Codebook, cue, latent, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Another code's answers (sequence, segment) to the cues, and what both codes say of the last.

    Of the codes that answer the last cue otherwise than `latent` (sequence,), one at random; its
    answers are noisy as all are. Both codes' answers to the last cue are (sequence, 2), the own
    code's first. ValueError if there is no such code.
    """
    draw = torch.Generator().manual_seed(seed)
    last = book.code[:, cue[:, -1]].T  # (sequence, code)
    differ = last != last.gather(1, latent[:, None])
    if not differ.any(1).all():
        raise ValueError(f"{book.name}: all codes answer a cue alike; give more codes")
    other = torch.multinomial(differ.double(), 1, generator=draw)
    noisy = torch.rand(cue.shape, generator=draw) < book.noise
    random = torch.randint(book.answers, cue.shape, generator=draw)
    sides = last.gather(1, torch.cat([latent[:, None], other], 1))
    return torch.where(noisy, random, book.code[other, cue]), sides


def followed(predict, book: Codebook, cue, answer, latent, distances, seed=0) -> torch.Tensor:
    """How far the last prediction follows a run of segments of another code, (distance, sequence).

    A run of half of the earlier segments, the nearest of them at one of `distances` from the last,
    gets the `donors`' answers. Found is what the donor's answer to the last cue has of the sum of
    its and the own code's probability: 0 to 1. Segments are exchangeable, so that for the reader
    the distance makes no difference but by chance. ValueError for a run that does not fit.
    """
    earlier = book.segments - 1
    length = earlier // 2
    furthest = earlier - length + 1
    if min(distances) < 1 or max(distances) > furthest:
        raise ValueError(f"distances = {list(distances)}: give some from 1 to {furthest}")
    given, sides = donors(book, cue, latent, seed)
    found, place = [], torch.arange(book.segments)
    for distance in distances:
        end = earlier - distance
        exchanged = (place <= end) & (place > end - length)
        log_p = predict(cue, torch.where(exchanged, given, answer))[:, -1]
        found.append(log_p.gather(1, sides).softmax(1)[:, 1])
    return torch.stack(found)


# ---------------------------------------------------------------------- reuse


def reuse(model, book: Codebook, cue, answer, latent, recent: int = 4, seed: int = 0):
    """Whether the last prediction follows another code, patched into the stream at earlier answers.

    DataFrame (site, part, layer, followed, count): how many sequences give more to the donor's
    answer than to their own code's. Sites are `all` earlier answers and the `recent` last of them.
    The stream there, before block `layer`, is replaced by that of the same cues with the donor's
    answers (`donors`): as a `whole`, or of it only the `token` that is embedded, or what the blocks
    have `written` since, or what they write of the same answers to `other cues`, which says nothing
    of a code. Part `exact` is the exact reader of exchanged answers, site `none` is undisturbed.
    """
    given, sides = donors(book, cue, latent, seed)
    texts = (cue, answer), (cue, given), (cue.roll(1, 0), given)
    streams = [run(model, book.tokens(*text)[:, :-1], ["stream"])["stream"] for text in texts]
    change, others = (stream - streams[0] for stream in streams[1:])
    parts = {"whole": change, "token": change[:1].expand_as(change)}
    parts |= {"written": change - change[:1], "other cues": others - others[:1]}
    found = {("none", "whole", 0): predictions(model, book, cue, answer)}
    earlier = torch.arange(book.segments - 1)
    for site, segments in {"all": earlier, "recent": earlier[-recent:]}.items():
        at, exchanged = 1 + 2 * segments, answer.index_copy(1, segments, given[:, segments])
        found[site, "exact", 0] = reader(book, cue, exchanged)
        for part, layer in product(parts, range(len(change) - 1)):

            def patch(stream, added=parts[part][layer]):
                stream[:, at] += added[:, at]
                return stream

            log_p = predictions(model, book, cue, answer, {("stream", layer): patch})
            found[site, part, layer] = log_p
    rows = []
    for key, log_p in found.items():
        own, other = log_p[:, -1].gather(1, sides).T
        rows.append((*key, int((other > own).sum()), len(own)))
    return pd.DataFrame(rows, columns=["site", "part", "layer", "followed", "count"])


# ---------------------------------------------------------------------- similarity


def transfers(predict, book: Codebook) -> torch.Tensor:
    """What one answer tells of that to another cue, nats: (asked cue, earlier cue), float64.

    The mean gain of a predictor that has seen one segment over what it says with none. Of the
    reader it is the mutual information of both answers, and of a table of cues 0 between different
    cues. All pairs and answers are gone through, weighed as the process gives them.
    """
    sizes = book.cues, book.cues, book.answers
    cases = torch.cartesian_prod(*map(torch.arange, sizes))  # earlier cue, asked cue, told answer
    cue, answer = cases[:, :2], cases[:, 2:].expand(-1, 2)
    log_p = predict(cue, answer)[:, 1]  # (pair and told answer, answer)
    alone = predict(cue[:, 1:], answer[:, 1:])[:, 0]
    says = torch.nn.functional.one_hot(book.code, book.answers).double()
    each = (1 - book.noise) * says + book.noise / book.answers  # (code, cue, answer)
    joint = torch.einsum("kea,kbc->ebac", each, each) / len(each)
    return (joint * (log_p - alone).view(*sizes, -1)).sum((2, 3)).T


def alike(found, expected, draws: int = 999, seed: int = 0) -> tuple[float, float]:
    """Correlation of two square tables off their diagonals, and its p by permutation.

    Rows and columns of one are permuted together (Mantel 1967). 0 for a table without spread.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    off, draw = ~np.eye(len(found), dtype=bool), np.random.default_rng(seed)
    if np.ptp(found[off]) < 1e-12:
        return 0.0, 1.0
    own = np.corrcoef(found[off], expected[off])[0, 1]
    orders = [draw.permutation(len(found)) for _ in range(draws)]
    chance = [np.corrcoef(found[np.ix_(o, o)][off], expected[off])[0, 1] for o in orders]
    return float(own), (1 + sum(c >= own for c in chance)) / (1 + draws)
