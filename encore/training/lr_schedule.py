"""The learning rate as a plain function of the step: nothing to save, nothing to restore."""

import math


def get_lr(
    step: int,
    learning_rate: float,
    min_lr: float,
    warmup_iters: int,
    lr_decay_iters: int,
    warmdown_ratio: float | None = None,
) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    1. The first `warmup_iters` steps rise linearly; the first is not 0.
    2. Then a half cosine falls from `learning_rate` to `min_lr` at step `lr_decay_iters` (Loshchilov and Hutter 2017).
       With a `warmdown_ratio` it is a trapezoid instead (Zhai et al. 2022, section 3.5): `learning_rate` stays, and the
       last `warmdown_ratio` of the `lr_decay_iters` steps fall to `min_lr` linearly.
    3. From there on it is `min_lr`.
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if step >= lr_decay_iters:
        return min_lr
    if warmdown_ratio is not None:
        left = (lr_decay_iters - step) / (warmdown_ratio * lr_decay_iters)
        return min_lr + min(left, 1.0) * (learning_rate - min_lr)
    progress = (step - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)
