"""Mutual information of two tokens of a document by their distance, in nats."""

import numpy as np
import torch
from scipy.sparse import csr_matrix


def estimated(documents, distances, labels):
    """Estimated information of tokens d apart in a document, corrected for bias: (distances,).

    Distances are from 1 up. `labels` (vocabulary,) says what is compared: the tokens themselves (0,
    1, 2, ...), or their roles. The plug-in estimate is too high by an amount that falls as 1 /
    documents. Tokens of a document share latents, so the usual correction by the number of pairs
    (Miller 1955) is too small; halving the documents measures the excess instead (Quenouille 1956,
    "Notes on bias in estimation"): I = 2 I(all) - (I(even documents) + I(odd documents)) / 2.
    """
    labels = torch.as_tensor(labels)
    size, label = int(labels.max()) + 1, labels[documents.tokens]
    document = documents.token["document"]
    values = []
    for distance in distances:
        same = document[distance:] == document[:-distance]
        cell = (document[distance:] % 2 * size + label[:-distance]) * size + label[distance:]
        counts = torch.bincount(cell[same], minlength=2 * size**2).double().view(2, size, size)
        if not counts.any():
            raise ValueError(f"distance = {distance}: documents are shorter; give a smaller one")
        whole, even, odd = [
            _mutual_information(table / table.sum()) for table in (counts.sum(0), *counts)
        ]
        values.append(float(2 * whole - (even + odd) / 2))
    return np.array(values)


def _mutual_information(joint):
    """Mutual information of a joint distribution (rows, columns), in nats."""
    joint = torch.as_tensor(joint)
    expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    seen = joint > 0
    return (joint[seen] * (joint[seen] / expected[seen]).log()).sum()


def exact(grammar, distances, words=True):
    """Exact mutual information of tokens d apart in a document: (distances,); distances from 1 up.

    Under uniformly random maps the pair's words tell something beyond their roles only if the roles
    are the same: the words are then equal with a probability e that follows from Zipf's law and the
    habits, and I = I(roles) + sum over roles of P(r, r) KL([e, 1 - e] || [1/n, 1 - 1/n]). Without
    `words`, I(roles) alone. Raises ValueError unless `redraw` is {document: 1.0} or {sentence: 1.0}
    without a bank, and shapes can be enumerated.
    """
    redraw = {level: share for level, share in grammar.file.redraw.items() if share > 0}
    known = redraw in ({"document": 1.0}, {"sentence": 1.0}) and not grammar.file.bank
    if not known or grammar.shapes is None:
        raise ValueError(
            f"grammar {grammar.name}: the exact information needs redraw {{document: 1.0}} or "
            "{sentence: 1.0}, no bank, and shapes that can be enumerated; use `estimated`"
        )
    # A state is a place of a shape: (shape, place).
    states = [(shape, place) for shape in grammar.shapes for place in range(len(shape.roles))]
    role = np.array([grammar.roles.index(shape.roles[place]) for shape, place in states])
    visits = np.array([shape.probability for shape, _ in states])  # in a sentence
    begins = np.array([place == 0 for _, place in states])
    ends = np.append(begins[1:], True)
    inside = np.diag(~ends[:-1], 1).astype(float)  # from each place to the next
    equal = _equal_words(grammar, states)
    apart = equal  # of words in two sentences
    if "sentence" in redraw:
        apart = (role[:, None] == role) / grammar.sizes[role]
    sentences = grammar.file.document.per_document("sentence")
    left = sentences - np.arange(sentences)[:, None, None]
    reached = np.zeros((sentences, *inside.shape))  # pairs whose sentences are 0, 1, ... apart
    reached[0] = np.diag(visits)
    found, by_role = {}, np.eye(len(grammar.roles))[role]
    for distance in range(1, max(distances) + 1):
        crossing = reached[:-1] @ np.outer(ends, visits * begins)
        reached = reached @ inside
        reached[1:] += crossing
        pairs = left * reached
        if not pairs.any():
            raise ValueError(f"distance = {distance}: documents are shorter; give a smaller one")
        within, across = pairs[0] / pairs.sum(), pairs[1:].sum(0) / pairs.sum()
        p = by_role.T @ (within + across) @ by_role
        same_word = np.diag(by_role.T @ (within * equal + across * apart) @ by_role)
        found[distance] = float(_mutual_information(p))
        for r, size in enumerate(grammar.sizes):
            if words and size > 1 and p[r, r] > 0:
                e = same_word[r] / p[r, r]
                divergence = _term(e, 1 / size) + _term(1 - e, 1 - 1 / size)
                found[distance] += p[r, r] * divergence
    return np.array([found[distance] for distance in distances])


def _term(p, q):
    return p * np.log(p / q) if p > 0 else 0.0


def _equal_words(grammar, states):
    """P(words of two states have equal ranks under the same latents), 0 for unequal roles."""
    equal = np.zeros((len(states), len(states)))
    for i, (shape, a) in enumerate(states):
        for j, (other, b) in enumerate(states):
            if shape.roles[a] == other.roles[b]:
                equal[i, j] = _equal(grammar, shape, a, other, b)
    return equal


def _equal(grammar, shape, a, other, b):
    """Probability of equal ranks at place a of a sentence and b of another, of equal roles."""
    law = grammar.frequencies[grammar.roles.index(shape.roles[a])]
    chance = float((law**2).sum())
    parents = shape.binds_to[a], other.binds_to[b]
    if min(parents) < 0:
        return chance
    both_follow = grammar.file.binding**2 * _equal(grammar, shape, parents[0], other, parents[1])
    return both_follow + (1 - both_follow) * chance


def exact_chain(chain, distances, labels):
    """Exact information of tokens d apart in a stationary chain (ngrams.Chain): (distances,).

    `labels` as in `estimated`. The joint of a label and a context is held: 8 bytes x labels x
    contexts.
    """
    size = chain.vocabulary_size
    context, following = chain.grams // size, chain.grams % size
    known, start = torch.unique(context, return_inverse=True)
    reached = context % size ** (chain.order - 1) * size + following
    target = torch.searchsorted(known, reached)
    counts = torch.bincount(start).double()
    step = csr_matrix(
        (1 / counts[start].numpy(), (start.numpy(), target.numpy())), shape=(len(known),) * 2
    )
    labels = torch.as_tensor(labels)
    last = labels[known % size]  # of each context
    ending = torch.nn.functional.one_hot(last, int(labels.max()) + 1).double()
    # The joint of the first token's label and the context that ends `distance` later.
    joint = (ending * (counts / counts.sum())[:, None]).T.numpy()
    found = {}
    for distance in range(1, max(distances) + 1):
        joint = (step.T @ joint.T).T
        found[distance] = float(_mutual_information(joint @ ending.numpy()))
    return np.array([found[distance] for distance in distances])
