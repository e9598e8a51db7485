"""What a linear map can read from states: trees of sentences, and latents of documents.

Probes are trained on the first half of the windows and scored on the second.
"""

from dataclasses import dataclass
from os.path import commonprefix

import pandas as pd
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.stats import rankdata
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from latentree.evidence.curves import sequence_sums


@dataclass
class Sentences:
    """Whole sentences in windows, without their end token, and their trees.

    row (sentence,) numbers the window, column (sentence, word) a word's place in it (else -1).
    distance (sentence, word, word) and depth (sentence, word) count edges of the generator's own
    derivation, between two words and from the root to a word; NaN past the end.
    """

    row: torch.Tensor
    column: torch.Tensor
    distance: torch.Tensor
    depth: torch.Tensor

    def shuffled(self, seed: int = 0) -> "Sentences":
        """Each with the tree of another one as long, a control: what length and place tell."""
        length = (self.column >= 0).sum(1)
        draw = torch.rand(len(length), generator=torch.Generator().manual_seed(seed))
        order = (length + 0.5 * draw).argsort()
        donor = torch.empty_like(length).scatter(0, length.argsort(stable=True), order)
        return Sentences(self.row, self.column, self.distance[donor], self.depth[donor])


def whole_sentences(rows: dict, shapes: list, longest: int = 24) -> Sentences:
    """The sentences of at most `longest` words in windows `rows` (fields place, shape of `shapes`).

    Those whose words all have equal distances are left out, for any tree over words fits them.
    ValueError if no sentence is left: the grammar has no structure that a tree could show.
    """
    trees, found = {}, []
    for number, shape in enumerate(shapes):
        if len(shape.roles) - 1 <= longest:
            distance, depth = _edges(shape.tree)
            if len(distance.unique()) > 2:  # 0, and more than one other
                trees[number] = (distance, depth)
    for row, start in (rows["place"] == 0).nonzero().tolist():
        distance, depth = trees.get(int(rows["shape"][row, start]), (None, None))
        if depth is not None and start + len(depth) <= rows["place"].shape[1]:
            found.append((row, start, distance, depth))
    if not found:
        raise ValueError(
            f"shapes: none of {len(shapes)} in the windows has words at unequal distances; "
            "choose a deeper grammar"
        )
    row, start, distances, depths = zip(*found)
    depth = pad_sequence(depths, batch_first=True, padding_value=torch.nan)
    distance = depth.new_full((*depth.shape, depth.shape[1]), torch.nan)
    for number, one in enumerate(distances):
        distance[number, : len(one), : len(one)] = one
    column = torch.tensor(start)[:, None] + torch.arange(depth.shape[1])
    return Sentences(torch.tensor(row), column.masked_fill(depth.isnan(), -1), distance, depth)


def _edges(tree):
    """Edges between two words of a tree (word, word), and from the root (word,); no end token."""
    paths, shared = tree.treepositions("leaves")[:-1], []
    for path in paths:
        shared.append([len(commonprefix([path, other])) for other in paths])
    depth = torch.tensor([float(len(path)) for path in paths])
    return depth[:, None] + depth - 2 * torch.tensor(shared), depth


def structure(
    streams, sentences: Sentences, inputs=("place", "state", "place and state"), seed: int = 0
) -> pd.DataFrame:
    """Scores of structural probes on streams (layer, sequence, position, width), layer by layer.

    Inputs: "place", the one-hot place in the sentence alone (layer 0); "state", a word's stream;
    and "place and state", side by side, which shows what the state adds.
    DataFrame (sequence, sum, count, input, layer, name): a score of `structural_probe`, summed over
    the sentences of each window.
    """
    there, words = sentences.column >= 0, sentences.column.shape[1]
    states = streams[:, sentences.row[:, None], sentences.column.clamp(min=0)]
    scale = states[:, there].var(1).mean(-1).sqrt().clamp(min=1e-9)
    states = pad(states / scale[:, None, None, None], (0, words))
    place = pad(torch.eye(words), (streams.shape[-1], 0)).expand_as(states[:1])
    of_input = {"place": place, "state": states, "place and state": states + place}
    probed, labels, tables = [], [], []
    for name in inputs:
        probed.append(of_input[name])
        labels += [(name, layer) for layer in range(len(of_input[name]))]
    row, scores = structural_probe(torch.cat(probed), sentences, seed=seed)
    for score, values in scores.items():
        for (name, layer), value in zip(labels, values.double()):
            table = pd.DataFrame({"sequence": row, "score": value})
            table = table.groupby("sequence")["score"].agg(["sum", "count"]).reset_index()
            tables.append(table.assign(input=name, layer=layer, name=score))
    return pd.concat(tables, ignore_index=True)


def structural_probe(
    states: torch.Tensor, sentences: Sentences, rank: int = 32, steps: int = 200, seed: int = 0
) -> tuple:
    """Scores of linear maps B (rank, width), one for each input (after Hewitt & Manning 2019).

    |B (h_i - h_j)|^2 is fitted to the tree distance of words i and j of `states` (input, sentence,
    word, width), and with another B, |B h_i|^2 to their depth: the mean squared error in a
    sentence, averaged over sentences, by Adam. (Theirs is the absolute error, by which a probe that
    sees the place alone may predict any value between two medians.) States are whitened first.
    Returns the windows of the sentences scored (sentence,), and {score: (input, sentence)}: `uuas`;
    spearman of all pairs of words, and depth of all words (`_spearman`), NaN where it is constant.
    """
    test, there = sentences.row > sentences.row.max() // 2, sentences.column >= 0
    states = _whitened(states, states[:, ~test][:, there[~test]])
    generator = torch.Generator().manual_seed(seed)
    shape = (2, len(states), rank, states.shape[-1])
    maps = (torch.randn(shape, generator=generator) / rank**0.5).requires_grad_()
    pairs = (there[:, :, None] & there[:, None, :]).float()
    gold, depth = sentences.distance.nan_to_num(0.0), sentences.depth.nan_to_num(0.0)
    optimizer, train = torch.optim.Adam([maps], lr=0.05), (~test).nonzero()[:, 0]
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (64,), generator=generator)]
        far, deep = _predictions(maps, states[:, batch])
        error = ((far - gold[batch]).square() * pairs[batch]).sum((-2, -1))
        loss = error / pairs[batch].sum((-2, -1))
        error = ((deep - depth[batch]).square() * there[batch]).sum(-1)
        loss = loss + error / there[batch].sum(-1)
        optimizer.zero_grad()
        loss.mean(1).sum().backward()  # each input's maps get the gradient of their own loss only
        optimizer.step()
        decay.step()
    far, deep = _predictions(maps.detach(), states[:, test])
    above = torch.ones_like(pairs[0], dtype=torch.bool).triu(1)
    return sentences.row[test], {
        "uuas": uuas(far, sentences.distance[test], there[test]),
        "spearman": _spearman(far[..., above], sentences.distance[test][:, above]),
        "depth": _spearman(deep, sentences.depth[test]),
    }


def _whitened(states, sample, least=1e-4):
    """States in coordinates where sample (input, word, width) has one length in all directions.

    Directions with less than `least` of the largest mean square stay smaller.
    """
    square, directions = torch.linalg.eigh(sample.mT @ sample / sample.shape[1])
    square = torch.maximum(square, least * square[:, -1:]).clamp(min=1e-12)
    scale = (square * states.shape[-1]).rsqrt()
    return torch.einsum("lsnw,lwv->lsnv", states, directions * scale[:, None])


def _predictions(maps, states):
    """Squared distances (input, sentence, word, word) and lengths (input, sentence, word)."""
    far, deep = torch.einsum("klrw,lsnw->klsnr", maps, states)
    inner = torch.einsum("lsnr,lsmr->lsnm", far, far)
    own = inner.diagonal(dim1=-2, dim2=-1)
    return own[..., :, None] + own[..., None, :] - 2 * inner, deep.square().sum(-1)


def uuas(predicted: torch.Tensor, gold: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Share of a predicted tree's edges that are in the gold tree: (input, sentence).

    Both are minimum spanning trees, of predicted (input, sentence, word, word) and gold (sentence,
    word, word; whole numbers) distances. As a derivation has no heads, several gold trees are as
    short (any two edges join three sisters): the one nearest to the prediction counts.
    """
    inputs = len(predicted)
    gold, there = gold.repeat(inputs, 1, 1), there.repeat(inputs, 1)
    tree = _spanning_trees(predicted.flatten(0, 1), there)
    nearest = _spanning_trees(gold - 0.5 * tree, there)  # half an edge decides between equals only
    share = (tree & nearest).sum((-2, -1)) / tree.sum((-2, -1))
    return share.view(inputs, -1)


def _spanning_trees(distance, there):
    """Edges (graph, node, node), bool, of minimum spanning trees of the nodes that are there."""
    nodes = distance.shape[1]
    graph, one, other = (there[:, :, None] & there[:, None, :]).triu(1).nonzero(as_tuple=True)
    length = distance[graph, one, other].double()
    length = length - length.min() + 1  # scipy leaves out edges of length 0
    places = (graph * nodes + one, graph * nodes + other)
    size = len(distance) * nodes
    forest = minimum_spanning_tree(csr_array((length, places), (size, size))).tocoo()
    one, other = torch.as_tensor(forest.row).long(), torch.as_tensor(forest.col).long()
    edges = torch.zeros_like(distance, dtype=torch.bool)
    edges[one // nodes, one % nodes, other % nodes] = True
    return edges | edges.mT


def _spearman(predicted, gold):
    """Rank correlation of predicted (input, sentence, item) and gold (sentence, item).

    Over the most that a prediction without ties can reach, for gold has many (and NaN: no item).
    """
    ranks = []
    for items in (predicted.masked_fill(gold.isnan(), torch.nan), gold):
        rank = torch.from_numpy(rankdata(items.numpy(), axis=-1, nan_policy="omit"))
        ranks.append(rank - rank.nanmean(-1, keepdim=True))
    return (ranks[0] * ranks[1]).nansum(-1) / ranks[1].square().nansum(-1)


def latent_probe(streams, top, at, words, ridge: float = 0.01) -> pd.DataFrame:
    """How often a linear read-out of streams (layer, sequence, position, width) names the latent.

    For each layer a ridge regression of the one-hot `top` (sequence, position), one of `words`, on
    the streams at places `at` (sequence, position; bool) of the first half of the sequences; its
    largest output is the answer in the second half. Inputs have variance 1 on average; the penalty
    is `ridge` for each place. DataFrame (layer, sequence, sum, count) of right answers.
    """
    half = len(top) // 2
    labels = (top[..., None] == torch.as_tensor(words)).float()
    x, y = streams[:, :half][:, at[:half]].float(), labels[:half][at[:half]]
    mean = x.mean(1, keepdim=True)
    scale = x.std(1, keepdim=True).square().mean(-1, keepdim=True).sqrt()
    x = (x - mean) / scale
    square = x.mT @ x + ridge * x.shape[1] * torch.eye(x.shape[2])
    weights = torch.linalg.solve(square, x.mT @ (y - y.mean(0)))
    at, labels = at[half:], labels[half:]
    answer = ((streams[:, half:][:, at].float() - mean) / scale) @ weights + y.mean(0)
    right = torch.full((len(streams), *at.shape), torch.nan)
    right[:, at] = (answer.argmax(-1) == labels[at].argmax(-1)).float()
    tables = [sequence_sums(one).assign(layer=layer) for layer, one in enumerate(right)]
    return pd.concat(tables)[["layer", "sequence", "sum", "count"]]
