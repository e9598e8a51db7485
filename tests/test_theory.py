"""Tests of the theorem on predictors and models for which the answer is known."""

from functools import partial

import numpy as np
import pytest
import torch
from latentree.data.codebook import Codebook
from latentree.data.corpus import held_out
from latentree.exact.codebook import copier, losses, reader
from latentree.inside.trace import run
from latentree.measure import theory
from latentree.train.model import build_model

torch.set_num_threads(1)
BOOK = Codebook(codes=8, segments=16)
SEGMENT = torch.arange(16)
LAST = SEGMENT[:, None] - SEGMENT <= 2  # who sees the last two segments
ONE = Codebook(codes=4, cues=4, segments=16)  # whose codes have one answer for all cues
ONE.code = torch.arange(4)[:, None].expand(4, 4)


def some(book, count=200):
    fields = held_out(book, count, 2 * book.segments)
    return *book.split(fields["tokens"]), fields["latent"][:, 0]


def small_model(book=BOOK):
    return build_model("llama", book.vocabulary_size, 2, 16, 2, 64, initializer_range=0.3).eval()


def counting_model(copied: bool):
    """Without norms: a head of the last block counts the answers before, and votes for the most.

    It counts the embedded answers, or what the first block's MLP has copied of them.
    """
    model = build_model("gpt2", 8, 2, 12, 1, 64, mlp_width=4).eval()
    for parameter in model.parameters():
        parameter.data.zero_()
    stack, four = model.transformer, torch.arange(4)
    stack.wte.weight.data[4 + four, four] = 1.0
    if copied:  # through gelu, which is the identity far above 0
        stack.h[0].mlp.c_fc.weight.data[four, four] = 50.0
        stack.h[0].mlp.c_proj.weight.data[four, 4 + four] = 0.02
    attention = stack.h[1].attn
    attention.c_attn.weight.data[four + 4 * copied, 24 + four] = 1.0
    attention.c_proj.weight.data[four, 8 + four] = 40.0
    model.lm_head.weight.data[4 + four, 8 + four] = 1.0
    for block in stack.h:
        block.ln_1 = block.ln_2 = torch.nn.Identity()
    stack.ln_f = torch.nn.Identity()
    return model


def test_predictions_are_the_models_own_before_each_answer():
    cue, answer, _ = some(BOOK, 5)
    model = small_model()
    log_p = run(model, BOOK.tokens(cue, answer), ["logits"])["logits"].log_softmax(-1)
    own = theory.predictions(model, BOOK, cue, answer)
    for segment in (0, 7, 15):
        among = log_p[:, 2 * segment, 16:].log_softmax(-1)
        assert torch.allclose(own[:, segment], among.double(), atol=1e-5)


def test_forgetting_is_that_of_the_reader_who_sees_the_last_segments():
    cue, answer, _ = some(BOOK)
    whole = losses(reader(BOOK, cue, answer), answer)[:, -1]
    cut = losses(reader(BOOK, cue, answer, LAST), answer)[:, -1]
    found = theory.forgetting(partial(reader, BOOK), cue, answer, [0, 2, 15])
    assert torch.allclose(found[1], cut - whole, atol=1e-12)
    assert found[0].mean() > found[1].mean() > 0.1 and not found[2].any()


def test_donors_keep_the_cues_and_answer_the_last_otherwise():
    cue, answer, latent = some(BOOK)
    given, sides = theory.donors(BOOK, cue, latent, seed=1)
    assert torch.equal(sides[:, 0], BOOK.code[latent, cue[:, -1]])
    assert (sides[:, 0] != sides[:, 1]).all()
    fits = (BOOK.code[:, cue] == given).double().mean(2)  # (code, sequence)
    fits[BOOK.code[:, cue[:, -1]] != sides[:, 1]] = 0
    assert abs(fits.max(0).values.mean() - 0.8125) < 0.03 and (fits.argmax(0) != latent).all()
    alone = Codebook(codes=1)
    with pytest.raises(ValueError, match="codebook-1: all codes answer a cue alike"):
        theory.donors(alone, cue, torch.zeros(200, dtype=torch.int64))


def test_the_reader_follows_a_run_at_any_distance_and_who_forgets_a_near_one_only():
    given = BOOK, *some(BOOK, 600), [1, 5, 9]
    share = theory.followed(partial(reader, BOOK), *given).mean(1)
    assert (share - share.mean()).abs().max() < 0.06 and 0.3 < share.mean() < 0.6
    near, between, far = theory.followed(partial(reader, BOOK, seen=LAST), *given).mean(1)
    assert near > 0.6 and far == pytest.approx(between) and far < 0.3
    with pytest.raises(ValueError, match=r"distances = \[10\]: give some from 1 to 9"):
        theory.followed(partial(reader, BOOK), *given[:-1], [10])


def shares(model, book):
    table = theory.reuse(model, book, *some(book), recent=3)
    table["share"] = table["followed"] / table["count"]
    return table.set_index(["site", "part", "layer"])["share"]


def test_who_rereads_tokens_follows_nothing_written_and_who_copies_them_does_without_the_cue():
    for copied in (False, True):
        share = shares(counting_model(copied), ONE)
        assert share["none", "whole", 0] < 0.05 and share["all", "exact", 0] > 0.95
        assert share["all", "whole", 1] > 0.95 and share["recent", "whole", 1] < 0.05
        assert (share["all", "token", 1] > 0.95) == (not copied)
        assert (share["all", "written", 1] > 0.95) == copied
        # a copied token is no inference from a cue and its answer: other cues do as well
        assert share["all", "other cues", 1] == share["all", "written", 1]


def test_before_the_first_block_the_stream_is_the_token():
    cue, answer, latent = some(BOOK, 40)
    model = small_model()
    table = theory.reuse(model, BOOK, cue, answer, latent).set_index(["site", "part", "layer"])
    given, sides = theory.donors(BOOK, cue, latent)
    theirs = given.clone()
    theirs[:, -1] = answer[:, -1]
    p = theory.predictions(model, BOOK, cue, theirs)[:, -1].gather(1, sides)
    expected = int((p[:, 1] > p[:, 0]).sum())
    assert table.followed["all", "whole", 0] == table.followed["all", "token", 0] == expected
    assert table.followed["all", "written", 0] == table.followed["none", "whole", 0]


def test_transfers_of_the_reader_are_mutual_informations_and_of_a_table_nothing():
    found = theory.transfers(partial(reader, BOOK), BOOK)
    right = torch.nn.functional.one_hot(BOOK.code, 4).double()
    p = 0.75 * right + 0.0625
    for asked, earlier in ((3, 5), (7, 7)):
        joint = torch.einsum("ka,kb->ab", p[:, earlier], p[:, asked]) / 8
        apart = joint.sum(1, keepdim=True) * joint.sum(0)
        assert found[asked, earlier] == pytest.approx(float((joint * (joint / apart).log()).sum()))
    table = theory.transfers(partial(copier, BOOK), BOOK)
    assert not table[~torch.eye(16, dtype=torch.bool)].any() and (table.diag() > 0).any()


def test_tables_are_alike_by_pairs_and_not_by_their_diagonals():
    expected = theory.transfers(partial(reader, BOOK), BOOK)
    assert theory.alike(expected, expected) == (pytest.approx(1), 0.001)
    assert theory.alike(torch.eye(16), expected) == (0.0, 1.0)
    draw = np.random.default_rng(0)
    p = [theory.alike(draw.normal(size=(16, 16)), expected, 49, n)[1] for n in range(30)]
    assert 0.3 < np.mean(p) < 0.7
