"""The loss over the vocabulary with its gradients: time and peak memory of the ways to have it.

    python -m bench.loss [--tokens N] [--rounds N] [--dtype float32|bfloat16]

At GPT-2's width and padded vocabulary. Each way runs in a process of its own, in turn; the differences are those to the
plain way in float64, on fewer tokens.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from encore.devices.device import autocast, find_device
from encore.models.cross_entropy import mean_cross_entropy
from encore.models.flops import synchronize

WIDTH, ROWS, VOCAB_SIZE = 768, 50_304, 50_257
FEW_TOKENS = 1024
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def plain(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """All scores in float32, as nanoGPT has them."""
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def in_parts(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Encore's."""
    return mean_cross_entropy(x, weight, targets, VOCAB_SIZE)


WAYS: dict[str, Loss] = {"plain": plain, "Encore's": in_parts}
if hasattr(F, "linear_cross_entropy"):  # from torch 2.12 on
    WAYS["torch's linear_cross_entropy"] = F.linear_cross_entropy


def make(tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors as a layer norm leaves them, weights as they are drawn, targets at random."""
    torch.manual_seed(0)
    x = torch.randn(tokens, WIDTH, device=device, requires_grad=True)
    weight = (0.02 * torch.randn(ROWS, WIDTH, device=device)).requires_grad_()
    return x, weight, torch.randint(VOCAB_SIZE, (tokens,), device=device)


def measure(way: str, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds and peak bytes beyond the inputs, in this process, which must be a new one."""
    device = find_device()
    x, weight, targets = make(tokens, device)
    before = used_bytes(device)
    synchronize(device)
    started = time.perf_counter()
    with autocast(device, dtype):
        loss = WAYS[way](x, weight, targets)
    loss.backward()
    synchronize(device)
    return {"seconds": time.perf_counter() - started, "bytes": used_bytes(device) - before}


def used_bytes(device: torch.device) -> int:
    """The most that this process has had, of the GPU's memory where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return int(peak.split()[0]) * 1024


def differ(way: str, dtype: torch.dtype) -> float:
    """The largest difference of loss and gradients, relative to the largest number in each."""
    device = find_device()
    x, weight, targets = make(FEW_TOKENS, device)
    exact_x, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    exact = F.cross_entropy(F.linear(exact_x, exact_weight[:VOCAB_SIZE]), targets)
    right = exact, *torch.autograd.grad(exact, (exact_x, exact_weight))
    with autocast(device, dtype):
        loss = WAYS[way](x, weight, targets) if way == "Encore's" else WAYS[way](x, weight[:VOCAB_SIZE], targets)
    ours = loss, *torch.autograd.grad(loss, (x, weight))
    pairs = zip(ours, right, strict=True)
    return max(((found - true).abs().max() / true.abs().max()).item() for found, true in pairs)


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.loss", description=__doc__)
    parser.add_argument("--tokens", type=int, default=12 * 1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # of a process of its own
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.tokens, dtype)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way, results in found.items():
            command = [sys.executable, "-m", "bench.loss", *sys.argv[1:], "--way", way]
            results.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    print(f"{arguments.tokens:,} tokens x {ROWS:,} x {WIDTH}, {arguments.dtype}, {find_device()}, ", end="")
    print(f"torch {torch.__version__}, medians of {arguments.rounds}")
    print("| way | seconds | over plain | peak memory | largest difference |\n|---|---|---|---|---|")
    for way, results in found.items():
        seconds = statistics.median(result["seconds"] for result in results)
        ratio = statistics.median(
            result["seconds"] / first["seconds"] for result, first in zip(results, found["plain"], strict=True)
        )
        gigabytes = statistics.median(result["bytes"] for result in results) / 1e9
        print(f"| {way} | {seconds:.2f} | {ratio:.2f} | {gigabytes:.2f} GB | {differ(way, dtype):.1e} |")


if __name__ == "__main__":
    main()
