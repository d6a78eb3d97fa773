"""What the gradients written out in encore/models/elementwise.py bring where nothing is compiled.

    python -m bench.elementwise [--rounds 5]

Forward and backward of 12 x 1024 vectors, beside the plain formula, which is what the compiled code has. The ratio is
the median of the rounds'.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from encore.devices.device import find_device
from encore.models.elementwise import EPS, rms_norm, squared_relu
from encore.models.flops import synchronize

TOKENS, WIDTH = 12 * 1024, 768
Operation = Callable[[torch.Tensor], torch.Tensor]


def plain_norm(x: torch.Tensor) -> torch.Tensor:
    """The formula, differentiated by torch."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS)


def plain_squared_relu(x: torch.Tensor) -> torch.Tensor:
    """The formula, differentiated by torch."""
    return F.relu(x).square()


def clock(operation: Operation, x: torch.Tensor, grad: torch.Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    synchronize(x.device)
    started = time.perf_counter()
    operation(x).backward(grad)
    synchronize(x.device)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.elementwise")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| operation | numbers | ours, ms | plain, ms | ratio |\n|---|---|---|---|---|")
    for ours, plain, width in ((rms_norm, plain_norm, WIDTH), (squared_relu, plain_squared_relu, 4 * WIDTH)):
        x = torch.randn(TOKENS, width, device=find_device(), requires_grad=True)
        grad = torch.randn_like(x)
        pairs = [(clock(ours, x, grad), clock(plain, x, grad)) for _ in range(1 + rounds)][1:]
        mine, theirs = (1e3 * statistics.median(each) for each in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"| {ours.__name__} | {TOKENS} x {width} | {mine:.1f} | {theirs:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
