"""What a linear map can read from a model's states: trees of sentences (structural probe) and latents of documents.

Probes of all layers are trained at once, each with its own map, on the first half of the windows; scores are of the
second.
"""

from dataclasses import dataclass

import pandas as pd
import torch
from nnsight import NNsight
from scipy.stats import rankdata

from latentree.inside.names import Internals


@torch.no_grad()
def residual_streams(model, tokens: torch.Tensor, rows: int = 64) -> torch.Tensor:
    """The residual stream (layers + 1, sequence, position, width) of tokens (sequence, position), the embedding first."""
    found = []
    for part in tokens.split(rows):
        inside = Internals(model, traced := NNsight(model))
        with traced.trace(input_ids=part, use_cache=False, logits_to_keep=1):
            streams = [inside.blocks[0].input, *(block.output for block in inside.blocks)].save()
        found.append(torch.stack(streams))
    return torch.cat(found, 1)


@dataclass
class Sentences:
    """Whole sentences in windows, their end token left out: row (sentence,) says in which window each stands.

    column (sentence, word) is a word's place in the window, -1 past the end; distance (sentence, word, word) and depth
    (sentence, word), edges in the generator's own derivation between two words and from the root to a word, NaN past
    it.
    """

    row: torch.Tensor
    column: torch.Tensor
    distance: torch.Tensor
    depth: torch.Tensor

    def shuffled(self, seed: int = 0) -> "Sentences":
        """Each sentence with the tree of another one of the same length, drawn with `seed`: what length and place tell."""
        length = (self.column >= 0).sum(1)
        order = length + 0.5 * torch.rand(
            len(length), generator=torch.Generator().manual_seed(seed)
        )
        donor = torch.empty_like(length).scatter(0, length.argsort(stable=True), order.argsort())
        return Sentences(self.row, self.column, self.distance[donor], self.depth[donor])


def whole_sentences(rows: dict, shapes: list, longest: int = 24) -> Sentences:
    """The sentences of at most `longest` words in windows `rows` (fields place, shape) whose distances are not all equal.

    Any tree over words fits equal distances, so such sentences can score nothing. `shapes` are those of the documents.
    ValueError if no sentence is left: the grammar has no structure that a tree over words could show.
    """
    kept = {}
    for number, shape in enumerate(shapes):
        paths = [shape.tree.leaf_treeposition(i) for i in range(len(shape.roles) - 1)]
        common = [
            [next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a)) for b in paths]
            for a in paths
        ]
        depth = torch.tensor([len(path) for path in paths], dtype=torch.float32)
        distance = depth[:, None] + depth - 2 * torch.tensor(common)
        if len(paths) <= longest and len(distance.unique()) > 2:  # 0 and another one
            kept[number] = (distance, depth)
    found = []
    for row, (places, numbers) in enumerate(zip(rows["place"].tolist(), rows["shape"].tolist())):
        begins = [
            (at, number)
            for at, (place, number) in enumerate(zip(places, numbers))
            if place == 0 and number in kept
        ]
        found += [
            (row, at, number) for at, number in begins if at + len(kept[number][1]) <= len(places)
        ]
    if not found:
        raise ValueError(
            f"shapes: none of {len(shapes)} in the windows has words at unequal distances; choose a deeper grammar"
        )
    size = (len(found), max(len(kept[number][1]) for _, _, number in found))
    column, depth, distance = (
        torch.full(size, -1),
        torch.full(size, torch.nan),
        torch.full((*size, size[1]), torch.nan),
    )
    for i, (_, at, number) in enumerate(found):
        n = len(kept[number][1])
        column[i, :n], distance[i, :n, :n], depth[i, :n] = at + torch.arange(n), *kept[number]
    return Sentences(torch.tensor([row for row, _, _ in found]), column, distance, depth)


def word_states(
    streams: torch.Tensor, sentences: Sentences
) -> tuple[torch.Tensor, list[tuple[str, int]]]:
    """States of the sentences' words (input, sentence, word, width + words) to be probed, and what each input is.

    Inputs are ("place", 0), the one-hot place in the sentence alone; ("state", layer) of `streams`; and ("place and
    state", layer), both side by side, which shows what the state adds to the place. Layer 0 is the embedding: the word.
    """
    longest, layers = sentences.column.shape[1], len(streams)
    states = streams[:, sentences.row[:, None], sentences.column.clamp(min=0)]
    states = (
        states
        / states[:, sentences.column >= 0]
        .var(1)
        .mean(-1)
        .sqrt()
        .clamp(min=1e-9)[:, None, None, None]
    )
    places = torch.eye(longest).to(states).expand(1, len(sentences.row), -1, -1)
    alone, only = (
        torch.nn.functional.pad(x, pad)
        for x, pad in ((states, (0, longest)), (places, (states.shape[-1], 0)))
    )
    inputs = [
        ("place", 0),
        *(("state", i) for i in range(layers)),
        *(("place and state", i) for i in range(layers)),
    ]
    return torch.cat([only, alone, alone + only]), inputs


def structural_probe(
    states: torch.Tensor, sentences: Sentences, rank: int = 32, steps: int = 200, seed: int = 0
) -> tuple:
    """Scores on the second half of the windows (Hewitt & Manning 2019) of maps B (rank, width), one for each layer.

    |B (h_i - h_j)|^2 is fitted to the tree distance of words i and j of `states` (input, sentence, word, width), and
    with another B, |B h_i|^2 to their depth: the mean squared error in a sentence, averaged over sentences, by Adam. (With
    the absolute error of Hewitt and Manning the control that sees places alone is not determined: it may predict any
    value between two medians.) Inputs are whitened first, which changes no map's reach and lets few steps do.
    Returns the windows of the sentences scored (sentence,), and {score: (input, sentence)}: uuas, the share of the
    edges of the minimum spanning tree of predicted distances that are in that of tree distances; spearman, of all pairs
    of words (`_spearman`); depth, the same of all words, NaN where depth is constant. A constituency tree has no heads,
    so its distances have several minimum spanning trees (any two edges join three sisters): the one nearest to the
    prediction counts.
    """
    test, there = sentences.row > sentences.row.max() // 2, sentences.column >= 0
    states = _whitened(states, states[:, ~test][:, there[~test]])
    generator = torch.Generator().manual_seed(seed)
    maps = (
        torch.randn(2, len(states), rank, states.shape[-1], generator=generator) / rank**0.5
    ).requires_grad_()
    pairs = (there[:, :, None] & there[:, None, :]).float()
    gold, depth = sentences.distance.nan_to_num(0.0), sentences.depth.nan_to_num(0.0)
    optimizer, train = torch.optim.Adam([maps], lr=0.05), (~test).nonzero()[:, 0]
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (64,), generator=generator)]
        far, deep = _predictions(maps, states[:, batch])
        loss = ((far - gold[batch]).square() * pairs[batch]).sum((-2, -1)) / pairs[batch].sum(
            (-2, -1)
        )
        loss = loss + ((deep - depth[batch]).square() * there[batch]).sum(-1) / there[batch].sum(-1)
        optimizer.zero_grad()
        loss.mean(1).sum().backward()  # each layer's maps get the gradient of their own loss only
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
    """States (input, ..., width) in coordinates where sample (input, word, width) is as long in each direction, about 1 in all.

    Directions with less than `least` of the largest mean square stay as small as they are beside it.
    """
    square, directions = torch.linalg.eigh(sample.mT @ sample / sample.shape[1])
    scale = (
        torch.maximum(square, least * square[:, -1:]).clamp(min=1e-12).mul(states.shape[-1]).rsqrt()
    )
    return torch.einsum("lsnw,lwv->lsnv", states, directions * scale[:, None])


def _predictions(maps, states):
    """Squared distances (layer, sentence, word, word) and squared lengths (layer, sentence, word) under the two maps."""
    far, deep = torch.einsum("klrw,lsnw->klsnr", maps, states)
    inner = torch.einsum("lsnr,lsmr->lsnm", far, far)
    own = inner.diagonal(dim1=-2, dim2=-1)
    return own[..., :, None] + own[..., None, :] - 2 * inner, deep.square().sum(-1)


def uuas(predicted: torch.Tensor, gold: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Share of the edges of predicted (layer, sentence, word, word) that its nearest gold tree has too: (layer, sentence)."""
    outside = ~(
        there[:, :, None] & there[:, None, :]
    )  # gold is whole, so that half an edge decides between equals only
    tree = spanning_tree(predicted.masked_fill(outside, torch.inf).flatten(0, 1)).view(
        predicted.shape
    )
    nearest = spanning_tree((gold - 0.5 * tree).masked_fill(outside, torch.inf).flatten(0, 1)).view(
        predicted.shape
    )
    return (tree & nearest).sum((-2, -1)) / tree.sum((-2, -1))


def spanning_tree(distance: torch.Tensor) -> torch.Tensor:
    """Edges (graph, node, node), bool, of minimum spanning trees by Prim's algorithm; what is infinitely far stays out."""
    edges, nearest = torch.zeros_like(distance, dtype=torch.bool), distance[:, 0].clone()
    parent = torch.zeros(distance.shape[:2], dtype=torch.int64)
    inside = torch.arange(distance.shape[1]).expand(parent.shape) == 0
    for _ in range(distance.shape[1] - 1):
        length, node = nearest.masked_fill(inside, torch.inf).min(1)
        live = (length < torch.inf).nonzero()[:, 0]
        new, old = node[live], parent[live, node[live]]
        edges[live, new, old] = edges[live, old, new] = inside[live, new] = True
        closer = distance[live, new] < nearest[live]
        nearest[live] = torch.where(closer, distance[live, new], nearest[live])
        parent[live] = torch.where(closer, new[:, None], parent[live])
    return edges


def _spearman(predicted, gold):
    """Spearman correlation (layer, sentence) of predicted (layer, sentence, item) with gold (sentence, item; NaN: none).

    Over the most that a prediction without ties can reach, for gold has many: 1 if no two items are out of order.
    """
    there = ~gold.isnan()  # what is missing ranks last and changes no other rank
    ranks = [
        torch.from_numpy(rankdata(x.masked_fill(~there, torch.inf).numpy(), axis=-1))
        for x in (predicted, gold)
    ]
    x, y = (
        (r - (r * there).sum(-1, keepdim=True) / there.sum(-1, keepdim=True)) * there for r in ranks
    )
    return (x * y).sum(-1) / y.square().sum(-1)


def structure(model, tokens: torch.Tensor, sentences: Sentences, seed: int = 0) -> pd.DataFrame:
    """Scores of structural probes of all inputs (`word_states`) of a model's states on tokens (sequence, position).

    DataFrame (input, layer, name, sequence, sum, count): sums of a score (uuas, spearman, depth) over the sentences in
    each window of the second half. With `sentences.shuffled()` in place of `sentences` it is the shuffled control.
    """
    states, inputs = word_states(residual_streams(model, tokens), sentences)
    row, scores = structural_probe(states, sentences, seed=seed)
    found = [
        window_sums(value, row).assign(input=what, layer=layer, name=name)
        for name, values in scores.items()
        for (what, layer), value in zip(inputs, values)
    ]
    return pd.concat(found, ignore_index=True)[
        ["input", "layer", "name", "sequence", "sum", "count"]
    ]


def window_sums(score: torch.Tensor, row: torch.Tensor) -> pd.DataFrame:
    """Sums of a score (sentence,) over the sentences in each window, `row` (sentence,): as `sequence_sums`, NaN left out."""
    window, number = row.unique(return_inverse=True)
    sums, counts = (
        torch.zeros(len(window), dtype=torch.float64).index_add(0, number, part.double())
        for part in (score.nan_to_num(0.0), ~score.isnan())
    )
    return pd.DataFrame({"sequence": range(len(window)), "sum": sums, "count": counts.long()})


def latent_probe(
    streams: torch.Tensor, top: torch.Tensor, at: torch.Tensor, words, ridge: float = 0.01
) -> torch.Tensor:
    """Whether a linear read-out names the latent: (layer, sequence, position), NaN but at places scored.

    For each layer of `streams` (layer, sequence, position, width) a ridge regression of one-hot `top` (sequence,
    position), one of `words`, on the states at places `at` (sequence, position; bool) of the first half of the
    sequences; its largest output is the answer in the second half. Inputs have unit variance on average; the penalty is
    `ridge` for each place. Chance is 1 / len(words).
    """
    half = len(top) // 2
    labels = (top[..., None] == torch.as_tensor(words)).float()
    x, y = streams[:, :half][:, at[:half]].float(), labels[:half][at[:half]]
    mean, scale = (
        x.mean(1, keepdim=True),
        x.std(1, keepdim=True).square().mean(-1, keepdim=True).sqrt(),
    )
    x = (x - mean) / scale
    square = x.transpose(1, 2) @ x + ridge * x.shape[1] * torch.eye(x.shape[2])
    weights = torch.linalg.solve(square, x.transpose(1, 2) @ (y - y.mean(0)))
    answer = (
        ((streams[:, half:][:, at[half:]].float() - mean) / scale) @ weights + y.mean(0)
    ).argmax(-1)
    right = torch.full((len(streams), *top.shape), torch.nan)
    right[:, half:][:, at[half:]] = (answer == labels[half:][at[half:]].argmax(-1)).float()
    return right
