"""GPT-2 models whose weights are set by hand, so that what their heads do is known."""

import torch

from latentree.model import build_model

VOCABULARY, CONTEXT = 60, 32
# The residual stream, block by block: the token, the position, the token before, and the prediction.
TOKEN, PLACE = slice(0, VOCABULARY), slice(VOCABULARY, VOCABULARY + CONTEXT)
BEFORE = slice(PLACE.stop, PLACE.stop + VOCABULARY)
NEXT = slice(BEFORE.stop, BEFORE.stop + VOCABULARY)
WIDTH, HEADS = NEXT.stop, 2
HEAD_DIM = WIDTH // HEADS
SIZES = {"layers": 2, "width": WIDTH, "heads": HEADS, "context": CONTEXT, "mlp_width": 4}
SHARP = 500.0  # of attention scores and logits: a match beats all else


def blank_model():
    """Two layers that do nothing: embeddings are one-hot, everything else is zero, heads attend uniformly."""
    model = build_model("gpt2", VOCABULARY, **SIZES).eval()
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0 if "ln_" in name and "weight" in name else 0.0)
    model.transformer.wte.weight.data[:, TOKEN] = torch.eye(VOCABULARY)
    model.transformer.wpe.weight.data[:, PLACE] = torch.eye(CONTEXT)
    model.lm_head.weight.data[:, NEXT] = SHARP * torch.eye(VOCABULARY)
    return model


def set_head(model, layer, head, queries=(), keys=(), moves=None):
    """Let a head compare and copy: `queries` and `keys` are [(block of the stream, matrix into the head), ...].

    With `moves` = (block, block), it copies from the one to the other.
    """
    attention = model.transformer.h[layer].attn
    own = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    for part, reads in enumerate((queries, keys)):
        for block, matrix in reads:
            columns = slice(part * WIDTH + own.start, part * WIDTH + own.stop)
            attention.c_attn.weight.data[block, columns] += torch.nn.functional.pad(matrix, (0, HEAD_DIM - matrix.shape[1]))
    if moves:
        source, target = moves
        size = source.stop - source.start
        attention.c_attn.weight.data[source, 2 * WIDTH + own.start : 2 * WIDTH + own.start + size] = torch.eye(size)
        attention.c_proj.weight.data[own.start : own.start + size, target] = torch.eye(size)


def induction_model():
    """Head (0, 0) tells each position the token before it; head (1, 1) finds the query's token there and copies."""
    model = blank_model()
    shift = torch.eye(CONTEXT).roll(1, 1)
    shift[-1] = 0
    set_head(model, 0, 0, [(PLACE, SHARP * torch.eye(CONTEXT))], [(PLACE, shift)], (TOKEN, BEFORE))
    # The first position, which attends to itself, has nothing before it: a coordinate that every query has keeps it out.
    out = torch.zeros(CONTEXT, VOCABULARY + 1)
    out[0, -1] = -40.0
    same = torch.eye(VOCABULARY, VOCABULARY + 1)
    set_head(model, 1, 1, [(TOKEN, SHARP * same)], [(BEFORE, same), (PLACE, out)], (TOKEN, NEXT))
    model.transformer.h[1].attn.c_attn.bias.data[HEAD_DIM + VOCABULARY] = SHARP
    return model


def duplicate_model():
    """Head (0, 1) attends to the earlier occurrences of the query's token, and not to the query itself."""
    model = blank_model()
    token = torch.eye(VOCABULARY, VOCABULARY + CONTEXT)
    place = torch.eye(CONTEXT, VOCABULARY + CONTEXT).roll(VOCABULARY, 1)
    set_head(model, 0, 1, [(TOKEN, SHARP * token), (PLACE, -2 * SHARP * place)], [(TOKEN, token), (PLACE, place)])
    return model
