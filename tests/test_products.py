"""Linear maps by oneDNN: torch's own values and gradients, where they apply, and nowhere else."""

import pytest
import torch
from latentree.inside.products import use_onednn

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN here"
)


def both(inputs, outputs, bias=False):
    """A linear map of torch's, and the same one by oneDNN."""
    plain = torch.nn.Linear(inputs, outputs, bias=bias)
    fast = torch.nn.Linear(inputs, outputs, bias=bias)
    fast.load_state_dict(plain.state_dict())
    return plain, use_onednn(torch.nn.Sequential(fast))[0]


@pytest.mark.parametrize("shape", [(7, 64), (2, 3, 64), (1, 64), (64,), (0, 64), (2, 0, 64)])
def test_values_and_gradients_are_those_of_torch(shape):
    torch.manual_seed(0)
    found = []
    x = torch.randn(shape, requires_grad=True)
    for linear in both(64, 33):
        y = linear(x)
        first = torch.autograd.grad(y.sin().sum(), [x, linear.weight], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, linear.weight])
        found.append([y, *first, *second])
    for plain, fast in zip(*found):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


def test_a_transposed_input_is_read_as_it_is():
    plain, fast = both(16, 5)
    x = torch.randn(16, 9).T
    torch.testing.assert_close(fast(x), plain(x))


@pytest.mark.parametrize("changed", ["bias", "empty", "float64"])
def test_what_does_not_fit_is_left_to_torch(changed):
    plain, fast = both(8, 0 if changed == "empty" else 4, bias=changed == "bias")
    assert (type(fast) is torch.nn.Linear) == (changed != "float64")
    dtype = torch.float64 if changed == "float64" else torch.float32
    x = torch.randn(3, 8, dtype=dtype)
    assert torch.equal(fast.to(dtype)(x), plain.to(dtype)(x))


def test_a_lower_precision_asked_for_is_kept():
    plain, fast = both(8, 4)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype == torch.bfloat16
        assert torch.equal(fast(x), plain(x))
