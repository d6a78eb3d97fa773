"""ENCORE_MEMORY_SNAPSHOT=FOLDER: what lies in the GPU's memory, and which line of code has asked for it.

Allocations are recorded from the first step on. The folder gets a snapshot behind the steps that ENCORE_PROFILE looks
at, and one where the memory runs out. https://pytorch.org/memory_viz opens them. They are pickles, in torch's own form
for that page; nothing here reads them. The numbers of the run stay as they are.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

import torch

from encore.progress import note
from encore.training.profile import ACTIVE, SKIPPED, WARM_UP

SETTING = "ENCORE_MEMORY_SNAPSHOT"
STEPS = SKIPPED + WARM_UP + ACTIVE
MOST_EVENTS = 100_000  # allocations and frees that are kept, the newest; each takes some KB


class MemoryRecorder:
    """Records allocations while it is entered. `step` is to be called behind each step; iter: the steps that are
    done."""

    def __init__(self, folder: Path, iter: int) -> None:
        self.folder, self.iter, self.first = folder, iter, iter + 1

    def __enter__(self) -> "MemoryRecorder":
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS, stacks="python")
        return self

    def step(self) -> None:
        self.iter += 1
        if self.iter == self.first + STEPS - 1:
            self._write(f"steps-{self.first}-{self.iter}.pickle")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            self._write(f"out-of-memory-after-step-{self.iter}.pickle")
        torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, name: str) -> None:
        path = self.folder / name
        torch.cuda.memory._dump_snapshot(str(path))
        note(f"{SETTING}: {path} has a snapshot of the GPU's memory; https://pytorch.org/memory_viz opens it")


def memory_recorder(iter: int, is_first: bool, device: torch.device) -> AbstractContextManager[MemoryRecorder | None]:
    """A recorder whose `step` is to be called behind each step; None where none is asked for, on other ranks than the
    first and, with a note, where there is no CUDA. iter: the steps that are done."""
    folder = os.environ.get(SETTING)
    if not folder or not is_first:
        return nullcontext()
    if device.type != "cuda":
        note(f"{SETTING}: only the memory of a CUDA GPU is recorded, and this run is on {device}; it goes on without")
        return nullcontext()
    return MemoryRecorder(Path(folder), iter)
