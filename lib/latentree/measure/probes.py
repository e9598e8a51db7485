"""What a linear map can read from states."""

import pandas as pd
import torch

from latentree.evidence.curves import sequence_sums


def linear_probe(streams, labels, at, ridge: float = 0.01) -> pd.DataFrame:
    """How often a linear read-out of streams (layer, sequence, position, width) names the label.

    For each layer a ridge regression of the one-hot `labels` (sequence, position), from 0 on, on
    the streams at places `at` (sequence, position; bool) of the first half of the sequences, in
    closed form; its largest output is the answer in the second half. Inputs have variance 1 on
    average; the penalty is `ridge` for each place. DataFrame (layer, sequence, sum, count) of right
    answers.
    """
    half = len(labels) // 2
    targets = torch.nn.functional.one_hot(labels.clamp(min=0)).float()
    x, y = streams[:, :half][:, at[:half]].float(), targets[:half][at[:half]]
    mean = x.mean(1, keepdim=True)
    scale = x.std(1, keepdim=True).square().mean(-1, keepdim=True).sqrt()
    x = (x - mean) / scale
    square = x.mT @ x + ridge * x.shape[1] * torch.eye(x.shape[2])
    weights = torch.linalg.solve(square, x.mT @ (y - y.mean(0)))
    at, labels = at[half:], labels[half:]
    answer = ((streams[:, half:][:, at].float() - mean) / scale) @ weights + y.mean(0)
    right = torch.full((len(streams), *at.shape), torch.nan)
    right[:, at] = (answer.argmax(-1) == labels[at]).float()
    tables = [sequence_sums(one).assign(layer=layer) for layer, one in enumerate(right)]
    return pd.concat(tables)[["layer", "sequence", "sum", "count"]]
