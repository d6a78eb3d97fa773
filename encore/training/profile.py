"""ENCORE_PROFILE=FOLDER: torch's profiler looks at a few steps, once the first ones have compiled and allocated.

The trace opens in chrome://tracing or https://ui.perfetto.dev. The numbers of the run stay as they are; the profiled
steps take longer.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.profiler import profile, schedule

from encore.progress import note

SETTING = "ENCORE_PROFILE"
SKIPPED, WARM_UP, ACTIVE = 3, 1, 3  # steps


def profiler(iter: int, is_first: bool) -> AbstractContextManager[profile | None]:
    """A profiler whose `step` is to be called behind each step; None where none is asked for, and on other ranks than
    the first. iter: the steps that are done."""
    folder = os.environ.get(SETTING)
    if not folder or not is_first:
        return nullcontext()
    path = Path(folder) / f"steps-{iter + SKIPPED + WARM_UP + 1}-{iter + SKIPPED + WARM_UP + ACTIVE}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(profiled: torch.profiler.profile) -> None:
        profiled.export_chrome_trace(str(path))
        note(f"{SETTING}: {path} has a trace of {ACTIVE} steps; https://ui.perfetto.dev opens it")

    plan = schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=ACTIVE, repeat=1)
    return profile(schedule=plan, on_trace_ready=write, record_shapes=True, profile_memory=True)
