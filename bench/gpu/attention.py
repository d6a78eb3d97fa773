"""Causal attention by each kernel that torch has: how long it takes, and whether its gradients repeat to the bit.

Each kernel is clocked twice, with and without torch's deterministic algorithms, which some can obey and some cannot.
scaled_dot_product_attention chooses among the first three; the last is what torch's compiler makes of the formula.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.pages import print_head, print_row
from encore.devices.device import find_device, set_up_numerics
from encore.models.flops import synchronize

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
FLEX = "flex, compiled"
GPT2_SHAPES = {"12 sequences": (12, 12, 1024, 64), "32 sequences": (32, 12, 1024, 64)}  # (B, H, T, D) of GPT-2 124M
TINY_SHAPES = {"2 sequences": (2, 2, 32, 16)}
ROUNDS, CALLS, REPEATS = 5, 20, 5
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def run(folder: Path, tiny: bool, nanogpt: Path | None) -> None:
    """In bfloat16, as a GPU trains, and in float32, which flash and cuDNN do not take there."""
    device = find_device()
    set_up_numerics(device)
    print_head(
        "shape", "dtype", "kernel", "asked to repeat", "forward, ms", "backward, ms", f"same bits, {REPEATS} times"
    )
    for shape, sizes in (TINY_SHAPES if tiny else GPT2_SHAPES).items():
        for dtype in (torch.bfloat16, torch.float32):
            for kernel in [*KERNELS, FLEX]:
                for strict in (True, False):
                    cells = measure(kernel, sizes, dtype, device, strict, 1 if tiny else CALLS)
                    print_row(shape, str(dtype)[6:], kernel, "yes" if strict else "no", *cells)


def measure(
    kernel: str, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, strict: bool, calls: int
) -> list[str]:
    """The cells of a row. Where the kernel is not to be had, the reason goes to stderr."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(sizes, generator=generator).to(device, dtype) for _ in range(4))
    inputs = [part.requires_grad_() for part in (q, k, v)]
    try:
        with asked_to_repeat(strict), chosen(kernel):
            attend = make_attend(kernel, sizes[2], device)
            gradients = [torch.autograd.grad(attend(*inputs), inputs, grad) for _ in range(REPEATS)]
            same = all(torch.equal(a, b) for other in gradients for a, b in zip(other, gradients[0], strict=True))
            forward = clock(lambda: attend(*inputs), calls, device)
            both = clock(lambda: torch.autograd.grad(attend(*inputs), inputs, grad), calls, device)
    except RuntimeError as error:
        print(f"bench: {kernel}, {dtype}: {error}", file=sys.stderr)
        return ["not here", "", ""]
    return [f"{1e3 * forward:.2f}", f"{1e3 * (both - forward):.2f}", "yes" if same else "NO"]


def make_attend(kernel: str, length: int, device: torch.device) -> Attend:
    """Causal attention of q, k, v (B, H, T, D)."""
    if kernel != FLEX:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device.type)
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def clock(work: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds of a call, the median of some rounds of `calls`; the first round does not count."""
    rounds = []
    for _ in range(1 + ROUNDS):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        rounds.append((time.perf_counter() - started) / calls)
    return statistics.median(rounds[1:])


def chosen(kernel: str) -> AbstractContextManager[None]:
    """Within, scaled_dot_product_attention takes this kernel or none."""
    return nullcontext() if kernel == FLEX else sdpa_kernel([KERNELS[kernel]])


@contextmanager
def asked_to_repeat(strict: bool) -> Iterator[None]:
    """With torch's deterministic algorithms on or off, and back to what was."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(strict)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
