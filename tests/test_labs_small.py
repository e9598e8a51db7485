"""The training in memory: it learns, looks when it says, and draws nothing of its own."""

import pytest
import torch
from latentree.train.model import build_model, next_token_losses
from latentree.train.small import fit


def cycles(generator):
    """Sequences (8, 12) that count on, from a random start, in a circle of five tokens."""
    start = torch.randint(5, (8, 1), generator=generator)
    return (start + torch.arange(12)) % 5


def trained(steps, **looks):
    model = build_model("llama", 5, 1, 16, 2, 12, seed=0)
    draw = torch.Generator().manual_seed(0)
    return model, fit(model, lambda: cycles(draw), steps, **looks)


def test_it_learns_a_circle_and_the_same_one_twice():
    model, seen = trained(60)
    tokens = cycles(torch.Generator().manual_seed(1))
    loss = next_token_losses(model(input_ids=tokens).logits, tokens)[:, 1:]
    assert loss.max() < 0.1 and seen == []
    again, _ = trained(60)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_it_looks_before_the_first_step_at_equal_steps_and_at_the_end():
    steps = iter(range(10))
    assert trained(5, look=lambda: next(steps), every=2)[1] == [0, 1, 2, 3]


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps = 0: give at least 1"):
        trained(0)
