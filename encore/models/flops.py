"""Floating-point work and the device's peak: what a model-FLOPs utilisation (MFU) is a share of."""

import re
import time
from dataclasses import dataclass

import torch

from encore.models.architectures import Model

# Dense peaks in TFLOP/s, from the makers' data sheets. The first pattern found in the device's name decides, so the
# longer name of a family comes first; a name ends where a word ends, since "A10" is inside "A100".
BF16_PEAKS = {
    r"GB200": 2500,
    r"B200": 2250,
    r"H100 NVL": 835,
    r"H100 PCIe": 756,
    r"H100": 989,
    r"H200 NVL": 835,
    r"H200": 989,
    r"A100": 312,
    r"A10G": 70,  # disputed: makers say 70 or 125
    r"A10": 125,
    r"L40S": 362,
    r"L4": 121,
    r"RTX 5090(?! (?:Laptop|D))": 209.5,
    r"RTX 4090(?! (?:Laptop|D))": 165.2,
    r"RTX 3090(?! Ti)": 71,
}
FP16_PEAKS = {**BF16_PEAKS, r"T4": 65, r"V100-SXM\d": 125}


@dataclass(frozen=True)
class Peak:
    """A device's peak in FLOP/s, and whether it was looked up ("data sheet") or timed here ("measured")."""

    flops_per_second: float
    basis: str


def flops_per_token(model: Model) -> int:
    """Forward and backward work for one token, in floating-point operations: 6 N + 12 L H D T (appendix B of
    Chowdhery et al. 2022, PaLM), N being the parameters without those that are only looked up."""
    config = model.config
    return 6 * model.count_factors() + 12 * config.n_layer * config.n_embd * config.block_size


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """The peak of a listed GPU for its 16-bit type; of another GPU the speed of a large matrix product.

    None for a CPU: what else runs on it changes that speed fivefold, from one minute to the next.
    """
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        listed = listed_tflops(torch.cuda.get_device_name(device), dtype)
        if listed is not None:
            return Peak(listed * 1e12, "data sheet")
    return Peak(measure_matmul(device, dtype), "measured")


def listed_tflops(device_name: str, dtype: torch.dtype) -> float | None:
    """TFLOP/s from the table, or None for an unlisted device or for float32."""
    peaks = {torch.bfloat16: BF16_PEAKS, torch.float16: FP16_PEAKS}.get(dtype, {})
    for pattern, tflops in peaks.items():
        if re.search(rf"\b{pattern}\b", device_name):
            return tflops
    return None


def measure_matmul(device: torch.device, dtype: torch.dtype, size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a (size, size) matrix product: the best of `repeats`, since a peak is what is undisturbed."""
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given, so that a clock read afterwards means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
