"""What this machine offers: the device, the number type, whether to compile. The environment decides, not params.yaml.

A run's identity in the cache does not change with the hardware; `dtype` and `compile` are parameters because they
change the numbers, and their `auto` is resolved here.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from encore.errors import EncoreError
from encore.models.flops import Peak, find_peak

ELEMENTS_PER_THREAD = 2**15  # torch gives a thread so many before it takes another
REPEATABLE = "ENCORE_REPEATABLE"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Hardware:
    """What a run is computed with. `peak` is the device's, for `dtype`; None for a CPU."""

    device: torch.device
    dtype: torch.dtype
    compiles: bool
    peak: Peak | None

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        compiled = ", compiled" if self.compiles else ""
        other_bits = "" if wants_same_bits() else ", not repeatable"
        return f"{name}, {str(self.dtype).removeprefix('torch.')}{compiled}{other_bits}"


def find_hardware(dtype: str, compile: bool | str) -> Hardware:
    """The device, set up for repeatable arithmetic, and what `auto` means on it for the parameters of these names."""
    device = find_device()
    set_up_numerics(device)
    found = find_dtype(dtype, device)
    return Hardware(device, found, should_compile(compile, device), find_peak(device, found))


def find_device() -> torch.device:
    """ENCORE_DEVICE where it is set, else the best there is: CUDA, MPS (Apple), CPU."""
    wish = os.environ.get("ENCORE_DEVICE")
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wish is None:
        best = next(name for name, there in available.items() if there)
        # torchrun numbers the processes of a machine, one for each GPU.
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if best == "cuda" else best)
    if not re.fullmatch(r"(cuda(:\d+)?|mps|cpu)", wish) or not available[wish.split(":")[0]]:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise EncoreError(f"ENCORE_DEVICE is {wish!r}, which this machine does not offer; it has {there}")
    return torch.device(wish)


def find_dtype(wish: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products. auto: on CUDA bfloat16, or float16 before Ampere; elsewhere float32."""
    if wish != "auto":
        return DTYPES[wish]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision: weights stay float32, matrix products are done in `dtype`."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def should_compile(wish: bool | str, device: torch.device) -> bool:
    """auto compiles on a GPU. Where no C++ compiler is found, a warning and the plain run instead of a crash."""
    if wish is False or (wish == "auto" and device.type != "cuda"):
        return False
    names = [os.environ.get("CXX"), "g++", "clang++", "c++", "cl"]
    if any(name and shutil.which(name) for name in names):
        return True
    print(
        "encore: note: torch.compile needs a C++ compiler and none is found (g++, clang++; CXX names another), "
        "so the model runs uncompiled, slower and otherwise the same",
        file=sys.stderr,
    )
    return False


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most that torch has held of the GPU's memory in this process; None for other devices."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def wants_same_bits() -> bool:
    """Whether a run is to repeat to the bit, on a GPU at some cost in speed. ENCORE_REPEATABLE=0 says no."""
    return os.environ.get(REPEATABLE) != "0"


def set_up_numerics(device: torch.device) -> None:
    """Repeatable arithmetic, and TensorFloat-32 for what stays float32 on a GPU, as nanoGPT sets it. What names no GPU,
    as CUDA's streams and events, then means this one.

    Comes before the first matrix product: CUDA's library reads its part of the environment then.
    """
    if device.type == "cpu":
        _call_vector_math()
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if device.type == "mps" or not wants_same_bits():
        return
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Strictly, and not with warn_only: only so do a GPU's kernels of attention add up their gradients in a fixed order
    # (flash, memory-efficient; cuDNN's cannot and is passed over). The compiler then chooses the order of its sums by
    # rule and not by a stopwatch, and on a CPU its threads do not race for the rows of an embedding's gradient.
    torch.use_deterministic_algorithms(True)
    # Every new tensor would be filled first, a thousand launches a step. No code here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _call_vector_math() -> None:
    """Calls each function that torch takes from MKL's vector library, in each of its threads, and drops what comes.

    Once a thread's first call of a process came out in that library's lowest accuracy, wrong from the 12th bit on. It
    was the cosine, of rotations (docs/reproducibility.md). Here the first calls are none that matter.
    """
    numbers = torch.linspace(0.5, 1.0, ELEMENTS_PER_THREAD * torch.get_num_threads())
    for function in (torch.cos, torch.sin, torch.tanh, torch.exp, torch.log, torch.erf):
        function(numbers)


@contextmanager
def naming_what_does_not_repeat() -> Iterator[None]:
    """Turns torch's refusal of an operation that does not repeat to the bit into an EncoreError."""
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if not found:
            raise
        raise EncoreError(
            f"{found[1]} does not repeat to the bit on this device; set {REPEATABLE}=0 to go on all the same, with "
            "results that differ a little from run to run"
        ) from None
