"""One recipe's steps, in a process of its own that speed.py starts: it compiles at once, beside the others, and waits
with the clock until its turn has come.

    python -m bench.gpu.step PAGE.json STEPS WORK      in a folder with data/tokens; WORK: steps, profile or evaluate

Prints `ready`, reads a line, and prints a line of JSON.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.train import peak_memory_bytes
from encore.evaluation import evaluate_split
from encore.flops import flops_per_token, synchronize
from encore.params import StageParams
from encore.trainer import Trainer
from stages.evaluate import BATCH_TOKENS
from stages.train import prepare

WARM_UP_STEPS = 3


def main() -> None:
    page, steps, work = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), sys.argv[3]
    params = StageParams("train", page)
    trainer = None
    try:
        trainer = warm_up(params)
    except torch.OutOfMemoryError:  # the others are at it too; it is compiled by now
        torch.cuda.empty_cache()
    first = time.time() - psutil.Process().create_time()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print("ready", flush=True)
    sys.stdin.readline()
    trainer = trainer or warm_up(params)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    result = {"steps": clock_steps, "profile": profile, "evaluate": clock_evaluation}[work](trainer, steps)
    print(json.dumps({**result, "first_step_seconds": first}), flush=True)


def warm_up(params: StageParams) -> Trainer:
    """A trainer that has taken steps."""
    trainer = prepare(params, Path(".encore/checkpoints"))
    for _ in range(WARM_UP_STEPS):
        trainer.step()
    return trainer


def clock_steps(trainer: Trainer, steps: int) -> dict[str, Any]:
    """The median step, the peak of memory, and what the check before the first step costs once all is compiled."""
    step = statistics.median(clock(trainer, trainer.step) for _ in range(steps))
    peak_bytes = peak_memory_bytes(trainer.device)
    check = clock(trainer, trainer.check_compiled)
    flops = flops_per_token(trainer.model) * trainer.tokens_per_step / step
    return {
        "seconds": step,
        "tokens_per_second": trainer.tokens_per_step / step,
        "tflops": flops / 1e12,
        "mfu": flops / trainer.hardware.peak.flops_per_second,
        "peak_bytes": peak_bytes,
        "check_seconds": check,
        "check_peak_bytes": peak_memory_bytes(trainer.device),
    }


def clock_evaluation(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Tokens a second of the whole val split, as the evaluate stage goes through it."""
    batch_size = max(1, BATCH_TOKENS[trainer.device.type] // trainer.params.block_size)
    found = []

    def evaluate() -> None:
        found.append(evaluate_split(trainer.model, trainer.val, batch_size, trainer.device, trainer.dtype))

    seconds = statistics.median([clock(trainer, evaluate) for _ in range(3)][1:])
    return {"seconds": seconds, "tokens_per_second": float(found[-1].tokens.sum()) / seconds}


def profile(trainer: Trainer, steps: int) -> dict[str, Any]:
    """The kernels of one step: launches, and milliseconds by name."""
    kind = (
        torch.profiler.ProfilerActivity.CUDA if trainer.device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    )
    with torch.profiler.profile(activities=[kind]) as profiled:
        trainer.step()
        synchronize(trainer.device)
    name = "self_device_time_total" if trainer.device.type == "cuda" else "self_cpu_time_total"
    rows = [(each.key, each.count, getattr(each, name) / 1e3) for each in profiled.key_averages()]
    return {"kernels": sorted(filter(lambda row: row[2] > 0, rows), key=lambda row: -row[2])}


def clock(trainer: Trainer, work: Any) -> float:
    """Seconds."""
    synchronize(trainer.device)
    started = time.perf_counter()
    work()
    synchronize(trainer.device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
