"""Cross-entropy over a vocabulary, from the vectors before the output matrix: the scores of all tokens, by far the
largest tensor of a small model's training, are never held at once.

Shapes: N tokens, C numbers each, P rows of the output matrix, of which the first V are ids that can come.
"""

import math

import torch
from torch.nn import functional as F

SCORES_AT_ONCE = 2**25  # in float32 134 MB


def mean_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, cap: float | None = None
) -> torch.Tensor:
    """The mean over `targets` (N,) of the cross-entropy in nats of the scores x @ weight.T, x (N, C), weight (P, C),
    soft-capped where there is a `cap`.

    Matrix products are in autocast's dtype where that is on, all else in float32.
    """
    return _MeanCrossEntropy.apply(x, weight, targets, vocab_size, cap)


@torch.no_grad()
def cross_entropies(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, cap: float | None = None
) -> torch.Tensor:
    """The cross-entropy of each target, (N,) float32, without gradients."""
    weight = weight.to(_dtype_of_products(x))
    losses = [
        F.cross_entropy(_mask_padding(_scores(part, weight, cap), vocab_size), wanted, reduction="none")
        for part, wanted in _parts(x, targets, weight)
    ]
    return torch.cat(losses)


def soft_cap(scores: torch.Tensor, cap: float) -> torch.Tensor:
    """Scores squeezed smoothly into what lies between -cap and cap."""
    return cap * torch.tanh(scores / cap)


class _MeanCrossEntropy(torch.autograd.Function):
    """Has the gradients ready when the loss is known: the one of a token's scores is their softmax less one at the
    target, so what a part of the tokens needs is freed before the next part comes."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, cap):  # type: ignore[no-untyped-def]
        dtype = _dtype_of_products(x)
        weight_grad = torch.zeros_like(weight)
        weight = weight.to(dtype)
        losses, x_grads = [], []
        for part, wanted in _parts(x, targets, weight):
            scores = _scores(part, weight, cap)
            log_likely = F.log_softmax(_mask_padding(scores, vocab_size), dim=1)
            losses.append(-log_likely.gather(1, wanted[:, None]))
            scores_grad = log_likely.exp_()
            scores_grad.scatter_add_(1, wanted[:, None], scores_grad.new_full((len(wanted), 1), -1.0))
            if cap is not None:  # the slope of the tanh; the padding has none, and no gradient either
                scores_grad.mul_(scores.div_(cap).square_().neg_().add_(1).clamp_(min=0))
            scores_grad = scores_grad.to(dtype)
            x_grads.append(scores_grad @ weight)
            if dtype == weight_grad.dtype:
                weight_grad.addmm_(scores_grad.T, part)  # without a copy as large as the matrix
            else:
                weight_grad += scores_grad.T @ part.to(dtype)
        ctx.save_for_backward(torch.cat(x_grads).to(x.dtype), weight_grad)
        ctx.tokens = len(targets)
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x_grad, weight_grad = ctx.saved_tensors
        scale = grad / ctx.tokens
        return x_grad * scale, weight_grad * scale, None, None, None


def _dtype_of_products(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _parts(x: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """x and targets in parts of as many tokens as may have scores at once."""
    tokens = max(1, SCORES_AT_ONCE // len(weight))
    return list(zip(x.split(tokens), targets.split(tokens), strict=True))


def _scores(x: torch.Tensor, weight: torch.Tensor, cap: float | None) -> torch.Tensor:
    """(N, P), float32 or what is wider."""
    scores = F.linear(x.to(weight.dtype), weight)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def _mask_padding(scores: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The scores of the padding, which can never come, become minus infinity."""
    if scores.shape[1] > vocab_size:
        scores[:, vocab_size:] = -math.inf
    return scores
