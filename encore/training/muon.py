"""Muon for matrices of which a model has many of a shape: they are made orthogonal together, in a few large matrix
products instead of thousands of small ones."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from encore.devices.sharding import gather, spread_like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steep at 0, so small singular values grow fast
STEPS = 5
NUMBERS_AT_ONCE = 2**26  # of the matrices that are made orthogonal together; in bfloat16 134 MB


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with Nesterov momentum, the same steps as torch.optim.Muon's but for rounding.

    A step has the size of the learning rate along every direction of a matrix, times sqrt(rows / columns) where there
    are more rows. Parameters must be matrices.

    Weights decay apart from it (Loshchilov and Hutter 2019), but only those that the step moves towards zero anyway
    (Chen et al. 2025, "Cautious Weight Decay"), by lr x weight_decay, which itself falls with the learning rate:
    weight_decay counts for a group whose lr is still its `initial_lr`, and half of it where half of that is left.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "initial_lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes a step by the gradients that are there."""
        for group in self.param_groups:
            gradients = {parameter: parameter.grad for parameter in group["params"] if parameter.grad is not None}
            for batch in _batches(list(gradients)):
                directions = [self._direction(each, gradients[each], group["momentum"]) for each in batch]
                for parameter, direction in zip(batch, orthogonalize(torch.stack(directions)), strict=True):
                    rows, columns = parameter.shape
                    size = group["lr"] * max(1.0, rows / columns) ** 0.5
                    direction = direction.T if rows > columns else direction
                    direction = spread_like(direction.to(parameter.dtype), parameter)
                    if group["weight_decay"]:
                        decay = group["lr"] * group["weight_decay"] * group["lr"] / group["initial_lr"]
                        parameter.mul_(1 - decay * (direction * parameter > 0))
                    parameter.add_(direction, alpha=-size)

    def _direction(self, parameter: torch.Tensor, grad: torch.Tensor, momentum: float) -> torch.Tensor:
        """The gradient with its momentum, whole, in bfloat16, and lying where it stands upright."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        mean = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        direction = gather(grad.lerp(mean, momentum).bfloat16())
        return direction.T if _is_upright(parameter) else direction


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest matrices with orthonormal rows, about: singular values between 0.7 and 1.2, (M, rows, columns) with
    rows <= columns, by five steps of a Newton-Schulz iteration in bfloat16."""
    a, b, c = COEFFICIENTS
    matrices = matrices.bfloat16()
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _is_upright(matrix: torch.Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def _batches(parameters: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The matrices that have one shape, lying, as many together as there is room for."""
    by_shape = defaultdict(list)
    for parameter in parameters:
        by_shape[tuple(sorted(parameter.shape))].append(parameter)
    for (rows, columns), alike in by_shape.items():
        count = max(1, NUMBERS_AT_ONCE // (rows * columns))
        yield from (alike[start : start + count] for start in range(0, len(alike), count))
