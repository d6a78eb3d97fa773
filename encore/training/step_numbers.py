"""A step's loss and gradient norm, read while the device already computes the next step.

A GPU computes what was launched. Whoever reads a number waits until it is there, and meanwhile launches nothing: then
the GPU idles until the next step's first kernels come. So the numbers of a step are copied when they are ready, and
read a step later.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from encore.errors import EncoreError

WINDOWS_NAMED = 8


@dataclass(frozen=True)
class StepNumbers:
    """iter: the steps done with this one. overflow_allowed: whether the gradient may be infinite, as under float16,
    where such a step is skipped.

    values: the loss (nats a token) and the norm of the gradient before clipping, (2,); copied: when they are there.
    """

    iter: int
    lr: float
    overflow_allowed: bool
    values: torch.Tensor
    copied: torch.cuda.Event | None

    @classmethod
    def begin_copy(cls, iter: int, lr: float, overflow_allowed: bool, values: torch.Tensor) -> "StepNumbers":
        """Behind all that the device was given so far."""
        copied = None
        if values.is_cuda:
            stream = torch.cuda.current_stream(values.device)
            values = values.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(stream)
        return cls(iter, lr, overflow_allowed, values, copied)

    def read(self, windows_of: Callable[[int], np.ndarray]) -> dict[str, float | None]:
        """Waits for the step to end. Returns its `loss`, `lr` and `grad_norm`, which is None where it overflowed.

        Raises EncoreError where they are not finite; the weights that the step has left are then of no use. The message
        names what came in: windows_of(number of steps before) are this rank's windows of a step.
        """
        if self.copied:
            self.copied.synchronize()
        loss, norm = self.values.tolist()
        if not math.isfinite(loss) or not (self.overflow_allowed or math.isfinite(norm)):
            windows = ", ".join(map(str, windows_of(self.iter - 1)[:WINDOWS_NAMED]))
            raise EncoreError(
                f"iteration {self.iter}: the loss is {loss} and the gradient's norm {norm} at learning rate "
                f"{self.lr:.3g}, in windows {windows}, ... of the train split; the last checkpoint is whole. Lower "
                "learning_rate or set dtype: float32"
            )
        return {"loss": loss, "lr": self.lr, "grad_norm": norm if math.isfinite(norm) else None}
