"""Before the first step of a process: what the compiler has made must have the gradients of the code as it is written,
on this device, in this number type, under this torch. A compiler's mistake is else seen after hours, as a loss that
falls too little: torch 2.11 gave a norm a gradient of zero.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from encore.devices.device import autocast
from encore.devices.distributed import Ranks
from encore.devices.sharding import own_part
from encore.errors import EncoreError
from encore.tokens.batches import Batch

# What rounding may change of a tensor's gradient, as a share of its norm: in the middle of a network it adds up to 1 in
# 1000 with TensorFloat-32 and to 3 in 100 with 16 bits. A gradient that is lost is off by 1.
LARGEST_ERROR = {torch.float32: 0.02, torch.bfloat16: 0.15, torch.float16: 0.15}
PARTS = 4  # uncompiled code needs more memory for a sequence, so it gets a part of them at a time
NOISE = 0.02  # a new model has matrices of zeros, through which no gradient comes
SCALE = 1024.0  # float16 loses small gradients


def check_compiled(
    model: nn.Module,
    compiled: Callable[..., torch.Tensor],
    plain: nn.Module,
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks,
) -> None:
    """Raises EncoreError where `compiled` has another loss or another gradient than `plain` on a micro-batch of the
    shape that training has, so that nothing is compiled for the check alone. Both compute `model`.

    Takes the memory of a step before the optimizer has any: the weights, and their gradients twice. Leaves the weights
    as they were and no gradients. With dropout, which nobody can repeat here, it is switched off, and that is compiled
    once more.
    """
    names = [name for name, _ in model.named_parameters()]
    with _evaluating_if_random(model), _disturbed(model, ranks):
        loss, gradients = _compute(compiled, model, plain, [batch], device, dtype, ranks)
        parts = zip(*(tensor.chunk(PARTS) for tensor in batch), strict=True)
        expected_loss, expected = _compute(plain, model, plain, list(parts), device, dtype, ranks)
    errors = [_norms(mine, right) for mine, right in zip(gradients, expected, strict=True)]
    sums = torch.stack([*errors, _norms(loss, expected_loss)])
    if ranks.shards:
        ranks.sum(sums)
    for name, (difference, size) in zip([*names, "the loss"], sums.sqrt().tolist(), strict=True):
        if difference and not difference <= LARGEST_ERROR[dtype] * size:
            what = name if name == "the loss" else f"the gradient of {name}"
            off = difference / size if size else float("inf")
            raise EncoreError(
                f"compiled by torch {torch.__version__} for {device.type} in {str(dtype).removeprefix('torch.')}, "
                f"{what} is off by {off:.0%}; no step was taken. Set compile: false or install another version of torch"
            )


def _compute(
    forward: Callable[..., torch.Tensor],
    model: nn.Module,
    plain: nn.Module,
    batches: list[Batch],
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The mean loss over the batches' targets and its gradients, in the order of the parameters, of which a rank may
    hold a part."""
    count = sum(len(idx) for idx, _ in batches)
    total = torch.zeros((), device=device)
    for number, (idx, targets) in enumerate(batches, start=1):
        with ranks.without_sync(plain, last=number == len(batches)):
            with autocast(device, dtype):
                loss = forward(idx.to(device), targets.to(device)) * (len(idx) / count)
            (loss * SCALE).backward()
        total += loss.detach()
    gradients = [
        torch.zeros_like(own_part(parameter)) if parameter.grad is None else own_part(parameter.grad).clone()
        for parameter in model.parameters()
    ]
    for parameter in model.parameters():
        parameter.grad = None
    return total, gradients


def _norms(mine: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The squares of the norm of the difference and of the right one, (2,) float64."""
    return torch.stack([torch.linalg.vector_norm(mine - right), torch.linalg.vector_norm(right)]).double().square()


@contextmanager
def _disturbed(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Noise on all weights, the same on ranks that hold the same; the weights come back to the bit."""
    weights = [own_part(parameter.data) for parameter in model.parameters()]
    kept = [weight.cpu().clone() for weight in weights]
    generator = torch.Generator().manual_seed(ranks.rank if ranks.shards else 0)
    for weight in weights:
        weight += NOISE * torch.randn(weight.shape, generator=generator).to(weight)
    try:
        yield
    finally:
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)


@contextmanager
def _evaluating_if_random(model: nn.Module) -> Iterator[None]:
    """Without dropout."""
    was_training = model.training
    model.train(was_training and not getattr(model.config, "dropout", 0.0))
    yield
    model.train(was_training)
