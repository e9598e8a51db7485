"""A model's matrix products on a CPU, by the library that is fast on every make of processor."""

import torch


def use_onednn(model):
    """Let oneDNN compute the linear maps of `model` while it is on a CPU; returns the model.

    torch asks MKL, which on processors of AMD is half as fast. The products are of float32 as
    before, and round differently. Maps with a bias, and other numbers, are left to torch. Not for
    torch.func, nor for batched gradients.
    """
    if torch.backends.mkldnn.is_available():
        for part in model.modules():
            if type(part) is torch.nn.Linear and part.bias is None and part.weight.numel():
                part.__class__ = _Linear
    return model


class _Linear(torch.nn.Linear):
    def forward(self, x):
        apart = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        fits = x.device.type == "cpu" and {x.dtype, self.weight.dtype} == {torch.float32}
        if apart or not fits or x.dim() < 2 or not x.numel():
            return super().forward(x)
        return _Product.apply(x, self.weight)


class _Product(torch.autograd.Function):
    """a @ b.T, of which each gradient is such a product again."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    @staticmethod
    def backward(ctx, gradient):
        a, b = ctx.saved_tensors
        for_a, for_b = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            _Product.apply(gradient, b.T) if for_a else None,
            _Product.apply(rows.T, a.flatten(0, -2).T) if for_b else None,
        )
