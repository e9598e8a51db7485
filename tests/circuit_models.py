"""GPT-2 models whose weights are set by hand, so that what their heads do is known.

And heads whose attention is drawn by hand, in whatever model.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from latentree.measure import induction
from latentree.train.model import build_model

VOCABULARY, CONTEXT = 60, 32
# The residual stream, block by block: token, position, the token before, the prediction.
TOKEN, PLACE = slice(0, VOCABULARY), slice(VOCABULARY, VOCABULARY + CONTEXT)
BEFORE = slice(PLACE.stop, PLACE.stop + VOCABULARY)
NEXT = slice(BEFORE.stop, BEFORE.stop + VOCABULARY)
WIDTH, HEADS = NEXT.stop, 2
HEAD_DIM = WIDTH // HEADS
SIZES = {"layers": 2, "width": WIDTH, "heads": HEADS, "context": CONTEXT, "mlp_width": 4}
SHARP = 500.0  # of attention scores and logits: a match beats all else
# The scale of every LayerNorm of a repair model, to 1e-4: two large coordinates outweigh the rest.
STEADY = 100.0


def evenly(keys):
    """Attention (..., query, key) that is even over some keys, and on the first without any."""
    keys = keys.double()
    first = torch.zeros_like(keys)
    first[..., 0] = 1.0
    count = keys.sum(-1, keepdim=True)
    return torch.where(count > 0, keys / count.clamp(min=1), first)


@contextmanager
def heads_that_attend(patterns):
    """What measures see of a model's only layer: patterns (sequence, head, query, key).

    They must run all sequences at once.
    """
    opened = induction.attention

    def attention(model, see):
        return opened(model, lambda layer, probabilities: see(layer, patterns))

    with patch.object(induction, "attention", attention):
        yield


def blank_model(**sizes):
    """Two layers that do nothing: one-hot embeddings, all else zero, heads attend uniformly."""
    model = build_model("gpt2", VOCABULARY, **SIZES | sizes).eval()
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0 if "ln_" in name and "weight" in name else 0.0)
    model.transformer.wte.weight.data[:, TOKEN] = torch.eye(VOCABULARY)
    model.transformer.wpe.weight.data[:, PLACE] = torch.eye(CONTEXT)
    model.lm_head.weight.data[:, NEXT] = SHARP * torch.eye(VOCABULARY)
    return model


def set_head(model, layer, head, queries=(), keys=(), moves=None):
    """Let a head compare and copy.

    `queries` and `keys` are [(block of the stream, matrix into the head), ...]; with `moves` =
    (block, block), it copies from the one to the other.
    """
    attention = model.transformer.h[layer].attn
    own = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    for part, reads in enumerate((queries, keys)):
        for block, matrix in reads:
            columns = slice(part * WIDTH + own.start, part * WIDTH + own.stop)
            attention.c_attn.weight.data[block, columns] += torch.nn.functional.pad(
                matrix, (0, HEAD_DIM - matrix.shape[1])
            )
    if moves:
        source, target = moves
        size = source.stop - source.start
        attention.c_attn.weight.data[
            source, 2 * WIDTH + own.start : 2 * WIDTH + own.start + size
        ] = torch.eye(size)
        attention.c_proj.weight.data[own.start : own.start + size, target] = torch.eye(size)


def induction_model():
    """Head (0, 0) tells each position the token before; head (1, 1) finds the query's there."""
    model = blank_model()
    shift = torch.eye(CONTEXT).roll(1, 1)
    shift[-1] = 0
    set_head(model, 0, 0, [(PLACE, SHARP * torch.eye(CONTEXT))], [(PLACE, shift)], (TOKEN, BEFORE))
    # The first position has nothing before it: a coordinate that every query has keeps it out.
    out = torch.zeros(CONTEXT, VOCABULARY + 1)
    out[0, -1] = -40.0
    same = torch.eye(VOCABULARY, VOCABULARY + 1)
    set_head(model, 1, 1, [(TOKEN, SHARP * same)], [(BEFORE, same), (PLACE, out)], (TOKEN, NEXT))
    model.transformer.h[1].attn.c_attn.bias.data[HEAD_DIM + VOCABULARY] = SHARP
    return model


def duplicate_model():
    """Head (0, 1) attends to the earlier occurrences of the query's token, not to the query."""
    model = blank_model()
    token = torch.eye(VOCABULARY, VOCABULARY + CONTEXT)
    place = torch.eye(CONTEXT, VOCABULARY + CONTEXT).roll(VOCABULARY, 1)
    set_head(
        model,
        0,
        1,
        [(TOKEN, SHARP * token), (PLACE, -2 * SHARP * place)],
        [(TOKEN, token), (PLACE, place)],
    )
    return model


def repair_model(later="head", share=1.0):
    """Head (0, 0) predicts the token itself again, as strongly as its embedding is long.

    Embeddings are 1/60 to 1 long, so the direct effects differ. Layer 1 may mend what is lacking:
    with `later` = head, head (1, 1) writes `share` times the embedding minus the prediction it
    finds: nothing, until the prediction is weaker than it should be; with mlp, the MLP of layer 1
    does; with idle, head (1, 1) writes the embedding once more, whatever it finds.
    """
    model = blank_model(mlp_width=2 * VOCABULARY)
    stream, place = model.transformer, STEADY * torch.eye(CONTEXT)
    stream.wte.weight.data[:, TOKEN] *= torch.arange(1, VOCABULARY + 1)[:, None] / VOCABULARY
    constant = STEADY * (WIDTH / 2) ** 0.5
    stream.wpe.weight.data[:, BEFORE.start : BEFORE.start + 2] = torch.tensor([constant, -constant])
    model.lm_head.weight.data[:, NEXT] = STEADY * torch.eye(VOCABULARY)
    itself = {
        "queries": [(PLACE, SHARP * place)],
        "keys": [(PLACE, place)],
    }  # it attends to its own position
    set_head(model, 0, 0, **itself, moves=(TOKEN, NEXT))
    stream.h[0].attn.c_proj.weight.data *= STEADY
    if later == "mlp":  # gelu(x) - gelu(-x) = x
        mlp, difference = stream.h[1].mlp, torch.eye(VOCABULARY)
        both = torch.cat([difference, -difference], 1)
        mlp.c_fc.weight.data[TOKEN], mlp.c_fc.weight.data[NEXT] = STEADY * both, -STEADY * both
        mlp.c_proj.weight.data[:, NEXT] = share * both.T
        return model
    set_head(model, 1, 1, **itself, moves=(TOKEN, NEXT))
    if later == "head":
        values = stream.h[1].attn.c_attn.weight.data[:, 2 * WIDTH :]
        values[NEXT] = -values[TOKEN]
    stream.h[1].attn.c_proj.weight.data *= STEADY * share
    return model


def frequency_model(scale, words=TOKEN):
    """Head (0, 1) attends to all alike: a word's logit is `scale` times how often it was there.

    That holds for each of `words`. There are no norms, so that logits are exactly these.
    """
    model = blank_model()
    set_head(model, 0, 1, moves=(words, slice(NEXT.start + words.start, NEXT.start + words.stop)))
    model.lm_head.weight.data *= scale / SHARP
    for block in model.transformer.h:
        block.ln_1 = torch.nn.Identity()
    model.transformer.ln_f = torch.nn.Identity()
    return model
