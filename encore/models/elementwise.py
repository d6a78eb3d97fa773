"""The parts of nanochat's model that only read and write memory.

A compiler fuses their formulas as they stand. Without one, autograd goes over the same numbers two or three times as
often as it must, so there the gradients are written out (`python -m bench.elementwise`). Compiled code must not use
those: torch 2.11 compiles the norm's to a gradient of zero.
"""

import torch
from torch.nn import functional as F

EPS = 1e-6


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """x over the root of its mean square, along the last dimension (Zhang and Sennrich 2019, without weights)."""
    if not torch.compiler.is_compiling():
        return _RMSNorm.apply(x)
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return (exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + EPS)).to(x.dtype)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0) squared (So et al. 2021)."""
    return F.relu(x).square() if torch.compiler.is_compiling() else _SquaredReLU.apply(x)


class _RMSNorm(torch.autograd.Function):
    """y = x / r has the gradient (g - y mean(g y)) / r."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        exact = torch.promote_types(x.dtype, torch.float32)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact).square_().div_(x.shape[-1])
        scale = mean_square.add_(EPS).rsqrt_()
        y = (x * scale).to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(y.to(scale.dtype), grad.to(scale.dtype)).unsqueeze(-1).div_(-y.shape[-1])
        return torch.addcmul(grad.to(scale.dtype), y.to(scale.dtype), along).mul_(scale).to(grad.dtype)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)
