"""The release's Hydra effect, a logit lens without the final norm; the field's is in hydra.py."""

import torch

from latentree.inside.names import Internals, weight
from latentree.inside.trace import run


@torch.no_grad()
def as_released(model, tokens, furthest: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """The release's logits: clean (layer, batch), ablated (m, layer, batch) with m = 1..`furthest`.

    They are of the CURRENT token at the last position of tokens (batch, position), by unembedding
    the stream after each block without the final norm; ablated: when the whole stream after the
    block m layers before is set to 0; NaN where there is none. In a model without biases a block
    maps 0 to 0, so nothing of this can show compensation.
    """
    layers = Internals(model).layers
    unembedded = weight(model.lm_head)[tokens[:, -1]]

    def lens(change=None):
        stream = run(model, tokens, ("stream",), change)["stream"]
        return (stream[1:, :, -1] * unembedded).sum(-1).cpu()

    clean = lens()
    ablated = torch.full((furthest, *clean.shape), torch.nan)
    for block in range(layers - 1):
        found = lens({("stream", block + 1): torch.zeros_like})
        for m in range(1, min(furthest, layers - 1 - block) + 1):
            ablated[m - 1, block + m] = found[block + m]
    return clean, ablated
