"""Cross-entropy over a vocabulary, from the vectors before the output matrix: the scores of all tokens, by far the
largest tensor of a small model's training, are held in parts.

Shapes: N tokens, C numbers each, P rows of the output matrix, of which the first V are ids that can come.
"""

import math

import torch
from torch.nn import functional as F

Room = tuple[torch.Tensor, torch.Tensor] | None  # memory for scores and for log-likelihoods, (N, P) each
SCORES_AT_ONCE = 2**25  # on a CPU, in whose cache small parts stay; in float32 134 MB
SHARE_OF_MEMORY = 64  # a GPU holds a score for each so many bytes of its memory at once: fewer parts, fewer launches


def mean_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, cap: float | None = None
) -> torch.Tensor:
    """The mean over `targets` (N,) of the cross-entropy in nats of the scores x @ weight.T, x (N, C), weight (P, C),
    soft-capped where there is a `cap`.

    Matrix products are in autocast's dtype where that is on, all else in float32.
    """
    dtype = dtype_of_products(x)
    if not _is_fused(x):
        mean, *_ = torch.ops.encore.mean_cross_entropy(x, weight, targets, vocab_size, cap, dtype)
        return mean
    # The compiler sees torch's own operations only. The gradients hang on a sum that is zero.
    mean, x_grad, weight_grad = _mean_with_gradients(x.detach(), weight.detach(), targets, vocab_size, cap, dtype)
    linear = (x * x_grad).sum() + (weight * weight_grad).sum()
    return mean + (linear - linear.detach())


@torch.no_grad()
def cross_entropies(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, cap: float | None = None
) -> torch.Tensor:
    """The cross-entropy of each target, (N,) float32, without gradients."""
    weight = weight.to(dtype_of_products(x))
    losses = [
        _log_likely(_scores(part, weight, cap, room), vocab_size, room).gather(1, wanted[:, None]).squeeze(1).neg_()
        for part, wanted, room in _parts(x, targets, weight)
    ]
    return torch.cat(losses)


def soft_cap(scores: torch.Tensor, cap: float) -> torch.Tensor:
    """Scores squeezed smoothly into what lies between -cap and cap."""
    return cap * torch.tanh(scores / cap)


def scores_at_once(device: torch.device) -> int:
    """How many scores are held at once. On a GPU a power of two, so that cards of a kind agree to the bit."""
    if device.type != "cuda":
        return SCORES_AT_ONCE
    return scores_on_gpu(torch.cuda.get_device_properties(device).total_memory)


# What torch.compiler.assume_constant_result does, which would import the compiler, 2 seconds, also where none is used.
scores_at_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def scores_on_gpu(memory_bytes: float) -> int:
    """The same for a GPU with this memory."""
    return int(2 ** math.floor(math.log2(memory_bytes / SHARE_OF_MEMORY)))


def _mean_with_gradients(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    cap: float | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean loss with its gradients for x and weight, by products in `dtype`. The gradient of a token's scores is
    their softmax less one at the target, so what a part of the tokens needs is freed before the next part comes."""
    weight_grad = torch.zeros_like(weight)
    weight = weight.to(dtype)
    losses, x_grads = [], []
    for part, wanted, room in _parts(x, targets, weight):
        scores = _scores(part, weight, cap, room)
        log_likely = _log_likely(scores, vocab_size, room)
        losses.append(-log_likely.gather(1, wanted[:, None]))
        scores_grad = _subtract_one(log_likely.exp_(), wanted)
        if cap is not None:  # the slope of the tanh; the padding has none, and no gradient either
            scores_grad.mul_(scores.div_(cap).square_().neg_().add_(1).clamp_(min=0))
        scores_grad = scores_grad.to(dtype)
        x_grads.append(scores_grad @ weight)
        if dtype == weight_grad.dtype:
            weight_grad.addmm_(scores_grad.T, part)  # without a copy as large as the matrix
        else:
            weight_grad += scores_grad.T @ part.to(dtype)
    tokens = len(targets)
    return torch.cat(losses).mean(), torch.cat(x_grads).to(x.dtype) / tokens, weight_grad.div_(tokens)


# To a compiler one operation, which it leaves as it is. torch keeps what it has compiled of these, and not of a
# torch.autograd.Function. Not by torch.library.custom_op, whose first call imports the compiler, 2 seconds, also where
# none is used.
OPERATION = "encore::mean_cross_entropy"
torch.library.define(OPERATION, torch.library.infer_schema(_mean_with_gradients, mutates_args=()))
torch.library.impl(OPERATION, "default", _mean_with_gradients)


@torch.library.register_fake(OPERATION)
def _(x, weight, targets, vocab_size, cap, dtype):  # type: ignore[no-untyped-def]
    return x.new_empty((), dtype=_exact(dtype)), torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    x_grad, weight_grad = ctx.saved_tensors
    return x_grad * grad, weight_grad * grad, None, None, None, None


torch.library.register_autograd(OPERATION, _backward, setup_context=_keep)


def _is_fused(x: torch.Tensor) -> bool:
    """Whether a compiler makes its own kernels of the loss. It does for a GPU. On a CPU its softmax takes twice the
    time of torch's, and each part takes fresh memory."""
    return torch.compiler.is_compiling() and x.device.type != "cpu"


def _subtract_one(likely: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """`likely` (N, P), perhaps in place, less one at the column `wanted` (N,) of each row."""
    if torch.compiler.is_compiling():  # part of the same pass; a scatter would be a sort under deterministic algorithms
        return likely - (torch.arange(likely.shape[1], device=likely.device) == wanted[:, None]).to(likely.dtype)
    return likely.scatter_add_(1, wanted[:, None], likely.new_full((len(wanted), 1), -1.0))


def dtype_of_products(x: torch.Tensor) -> torch.dtype:
    """Of matrix products with `x`: autocast's where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _parts(
    x: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor, Room]]:
    """x and targets in the fewest parts that have no more scores than may be held at once, of equal length but for the
    last; and the memory for the scores of each, the same for all. On a CPU the system hands out fresh memory page by
    page, which took a fifth of a step. A compiler plans the memory itself."""
    most_tokens = max(1, scores_at_once(x.device) // len(weight))
    parts = -(-len(x) // most_tokens)
    tokens = -(-len(x) // parts)
    room: Room = None
    if not torch.compiler.is_compiling():
        scores = x.new_empty((tokens, len(weight)), dtype=_exact(weight.dtype))
        room = scores, torch.empty_like(scores)
    return [
        (part, wanted, room and (room[0][: len(part)], room[1][: len(part)]))
        for part, wanted in zip(x.split(tokens), targets.split(tokens), strict=True)
    ]


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Of scores: float32 or what is wider."""
    return torch.promote_types(dtype, torch.float32)


def _scores(x: torch.Tensor, weight: torch.Tensor, cap: float | None, room: Room) -> torch.Tensor:
    """(N, P), in `room` where there is one."""
    if room is None:
        scores = F.linear(x.to(weight.dtype), weight).to(_exact(weight.dtype))
    elif room[0].dtype == weight.dtype:
        scores = torch.mm(x.to(weight.dtype), weight.T, out=room[0])
    else:
        scores = room[0].copy_(F.linear(x.to(weight.dtype), weight))
    return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def _log_likely(scores: torch.Tensor, vocab_size: int, room: Room) -> torch.Tensor:
    """The logarithms of what the model gives each id, (N, P), in `room` where there is one. The scores of the padding,
    which can never come, become minus infinity."""
    if scores.shape[1] > vocab_size:
        scores[:, vocab_size:] = -math.inf
    return torch.log_softmax(scores, 1) if room is None else torch.log_softmax(scores, 1, out=room[1])
