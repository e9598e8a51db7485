"""Mutual information between two tokens of a document, against their distance, in nats: estimated and exact."""

import numpy as np
import torch
from scipy.sparse import csr_matrix

LARGEST_JOINT = 4.0  # gigabytes


def estimated(documents, distances, labels):
    """Mutual information of tokens d apart in the same document, corrected for bias: (distances,); distances from 1 up.

    `labels` (vocabulary,) says what is compared: the tokens themselves (0, 1, 2, ...), or their roles. The plug-in
    estimate is too high by an amount that falls as 1 / documents. Tokens of a document share latents, so the usual
    correction by the number of pairs (Miller 1955) is too small; halving the documents measures the excess instead
    (Quenouille 1956, "Notes on bias in estimation"): I = 2 I(all) - (I(even documents) + I(odd documents)) / 2.
    """
    labels = torch.as_tensor(labels)
    size, label, document = (
        int(labels.max()) + 1,
        labels[documents.tokens],
        documents.token["document"],
    )
    values = []
    for distance in distances:
        same = document[distance:] == document[:-distance]
        if not same.any():
            raise ValueError(
                f"distance = {distance}: no two tokens of a document are so far apart; give a smaller one"
            )
        cell = ((document[distance:] % 2 * size + label[:-distance]) * size + label[distance:])[
            same
        ]
        halves = torch.bincount(cell, minlength=2 * size**2).double().view(2, size, size)
        whole, even, odd = (
            mutual_information(table / table.sum()) for table in (halves.sum(0), *halves)
        )
        values.append(float(2 * whole - (even + odd) / 2))
    return np.array(values)


def mutual_information(joint):
    """Mutual information of a joint distribution (rows, columns), in nats."""
    joint = torch.as_tensor(joint)
    expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    seen = joint > 0
    return (joint[seen] * (joint[seen] / expected[seen]).log()).sum()


def exact(grammar, distances, words=True):
    """Exact mutual information of tokens d apart in a document, for a grammar that redraws all at one level; distances from 1 up.

    Under uniformly random maps the pair's words tell something beyond their roles only if the roles are the same: the
    words are then equal with a probability e that follows from Zipf's law and the habits, and
        I = I(roles) + sum over roles of P(r, r) KL([e, 1 - e] || [1/n, 1 - 1/n]).
    Without `words`, I(roles) alone.
    ValueError unless `redraw` is {document: 1.0} or {sentence: 1.0} and no token is shared.
    """
    redraw = {level: share for level, share in grammar.file.redraw.items() if share > 0}
    if (
        redraw not in ({"document": 1.0}, {"sentence": 1.0})
        or grammar.file.shared > 0
        or grammar.shapes is None
    ):
        raise ValueError(
            f"grammar {grammar.name}: the exact information needs redraw {{document: 1.0}} or {{sentence: 1.0}}, "
            "no shared token and shapes that can be enumerated; use `estimated`"
        )
    states = [
        (s, place) for s, shape in enumerate(grammar.shapes) for place in range(len(shape.roles))
    ]
    number = {state: i for i, state in enumerate(states)}
    role = np.array([grammar.roles.index(grammar.shapes[s].roles[place]) for s, place in states])
    inside, begin = np.zeros((len(states),) * 2), np.zeros(len(states))
    ends = np.array([place == len(grammar.shapes[s].roles) - 1 for s, place in states])
    for s, place in states:
        if (s, place + 1) in number:
            inside[number[s, place], number[s, place + 1]] = 1
        if place == 0:
            begin[number[s, place]] = grammar.shapes[s].probability
    start = np.array(
        [grammar.shapes[s].probability for s, _ in states]
    )  # expected visits in a sentence
    sentences = grammar.file.document.per_document("sentence")
    equal = np.array(
        [
            [
                _equal(grammar, grammar.shapes[s], a, grammar.shapes[t], b)
                if role[i] == role[j]
                else 0
                for j, (t, b) in enumerate(states)
            ]
            for i, (s, a) in enumerate(states)
        ]
    )
    same_word = np.where(
        redraw.get("document", 0) == 1,
        equal,
        (1 / grammar.sizes[role])[:, None] * (role[:, None] == role),
    )
    reached = np.zeros(
        (sentences, *inside.shape)
    )  # pairs `distance` apart whose sentences are k apart, k = 0, 1, ...
    reached[0] = np.diag(start)
    left = sentences - np.arange(sentences)[:, None, None]
    found, membership = {}, np.eye(len(grammar.roles))[role]
    for distance in range(1, max(distances) + 1):
        crossing = reached[:-1] @ np.outer(ends, begin)
        reached = reached @ inside
        reached[1:] += crossing
        total = (left * reached).sum()
        if total == 0:
            raise ValueError(
                f"distance = {distance}: no document of {grammar.name} is so long; give a smaller one"
            )
        within, across = sentences * reached[0] / total, (left * reached)[1:].sum(0) / total
        pairs = membership.T @ (within + across) @ membership
        information = float(mutual_information(pairs))
        agree = np.diag(membership.T @ (within * equal + across * same_word) @ membership)
        for r, size in enumerate(grammar.sizes):
            if words and size > 1 and pairs[r, r] > 0:
                e = agree[r] / pairs[r, r]
                information += pairs[r, r] * (_term(e, 1 / size) + _term(1 - e, 1 - 1 / size))
        found[distance] = information
    return np.array([found[d] for d in distances])


def _term(p, q):
    return p * np.log(p / q) if p > 0 else 0.0


def _equal(grammar, shape, a, other, b):
    """Probability that words at place a of one sentence and b of another of the same latents have equal ranks."""
    law = grammar.frequencies[grammar.roles.index(shape.roles[a])]
    chance = float((law**2).sum())
    parents = shape.binds_to[a], other.binds_to[b]
    if min(parents) < 0:
        return chance
    both_follow = grammar.file.binding**2 * _equal(grammar, shape, parents[0], other, parents[1])
    return both_follow + (1 - both_follow) * chance


def exact_chain(chain, distances, labels):
    """Exact mutual information of tokens d apart in a stationary order-n chain (ngrams.Chain): (distances,).

    `labels` as in `estimated`. ValueError if the joint of a token and a context takes more than LARGEST_JOINT gigabytes.
    """
    size = chain.vocabulary_size
    context, nexts = chain.grams // size, chain.grams % size
    following = context % size ** (chain.order - 1) * size + nexts
    known, start = torch.unique(context, return_inverse=True)
    if (needed := 8e-9 * size * len(known)) > LARGEST_JOINT:
        raise ValueError(
            f"{chain.name}: {size} tokens and {len(known):,} contexts take {needed:.0f} GB; choose a corpus of fewer tokens"
        )
    target = torch.searchsorted(known, following)
    counts = torch.bincount(start, minlength=len(known)).double()
    step = csr_matrix(
        (1 / counts[start].numpy(), (start.numpy(), target.numpy())), shape=(len(known),) * 2
    )
    last = (known % size).numpy()
    now = np.zeros(
        (size, len(known))
    )  # joint probability of the first token and the context that ends `distance` later
    now[last, np.arange(len(known))] = (counts / counts.sum()).numpy()
    labels = np.asarray(labels)
    now = np.eye(labels.max() + 1)[labels].T @ now
    values, ending = {}, np.eye(labels.max() + 1)[labels[last]]
    for distance in range(1, max(distances) + 1):
        now = (step.T @ now.T).T
        values[distance] = float(mutual_information(now @ ending))
    return np.array([values[d] for d in distances])
