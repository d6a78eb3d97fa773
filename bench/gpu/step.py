"""One recipe's steps, in a process of its own: it compiles at once, beside the others, and waits with the clock until
its turn has come.

    python -m bench.gpu.step PAGE.json WORK STEPS      in a folder with data/tokens; WORK: steps, rest or train; STEPS:
                                                       how many are clocked together

Prints `ready`, reads a line, and prints a line of JSON.
"""

import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.gpu.pages import Page
from bench.train import peak_memory_bytes
from encore.evaluation.losses import evaluate_split
from encore.models.flops import flops_per_token, synchronize
from encore.params import StageParams
from encore.training.trainer import Trainer
from stages.evaluate import BATCH_TOKENS
from stages.train import prepare

WARM_UP_STEPS = 3
BLOCKS = 3  # of steps that are clocked together; the median counts
TRIES, PAUSE_SECONDS = 10, 2  # while others hold the memory


@dataclass
class Job:
    """Such a process, from outside."""

    process: subprocess.Popen[str]

    @classmethod
    def start(
        cls,
        folder: Path,
        page: Page,
        tokens: Path,
        work: str,
        steps: int = 0,
        environment: dict[str, str] | None = None,
    ) -> "Job":
        """Begins to compile a page, in a new folder."""
        (folder / "data").mkdir(parents=True)
        (folder / "data/tokens").symlink_to(tokens)
        (folder / "page.json").write_text(json.dumps(page))
        command = [sys.executable, "-m", "bench.gpu.step", "page.json", work, str(steps)]
        pipe = subprocess.PIPE
        return cls(subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True))

    def wait_until_ready(self) -> bool:
        """Whether it will be able to do its work."""
        assert self.process.stdout is not None
        return any(line == "ready\n" for line in self.process.stdout)

    def do(self) -> dict[str, Any]:
        """Its turn. Nothing, where it failed."""
        output, _ = self.process.communicate("go\n" if self.process.poll() is None else None)
        found = re.findall(r"^\{.*\}$", output, re.MULTILINE)
        return json.loads(found[-1]) if found else {}


def main() -> None:
    page, work, steps = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], int(sys.argv[3])
    trainer = warm_up(StageParams("train", page))
    first = time.time() - psutil.Process().create_time()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print("ready", flush=True)
    sys.stdin.readline()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    result = {"steps": clock_steps, "rest": clock_rest, "train": train}[work](trainer, steps)
    print(json.dumps({**result, "first_step_seconds": first}), flush=True)


def warm_up(params: StageParams) -> Trainer:
    """A trainer that has taken its first steps; where the others leave no memory for them, a little later."""
    for number in range(TRIES):
        try:
            trainer = prepare(params, Path(f".encore/checkpoints-{number}"))
            for _ in range(WARM_UP_STEPS):
                trainer.step()
        except torch.OutOfMemoryError:
            if number == TRIES - 1:
                raise
        else:
            return trainer
        torch.cuda.empty_cache()
        time.sleep(PAUSE_SECONDS)
    raise AssertionError


def clock_steps(trainer: Trainer, steps: int) -> dict[str, Any]:
    """A step's seconds, the peak of memory, and what the check before the first step costs once all is compiled."""
    step = statistics.median(clock(trainer, partial(take_steps, trainer, steps)) for _ in range(BLOCKS)) / steps
    peak_bytes = peak_memory_bytes(trainer.device)
    check = clock(trainer, trainer.check_compiled)
    flops_per_second = flops_per_token(trainer.model) * trainer.tokens_per_step / step
    peak = trainer.hardware.peak
    return {
        "seconds": step,
        "tokens_per_second": trainer.tokens_per_step / step,
        "mfu": flops_per_second / peak.flops_per_second if peak else None,
        "peak_bytes": peak_bytes,
        "check_seconds": check,
        "check_peak_bytes": peak_memory_bytes(trainer.device),
    }


def clock_rest(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Tokens a second of the whole val split, and the kernels of one step: launches, and milliseconds by name."""
    seconds = statistics.median([clock(trainer, lambda: evaluate(trainer)) for _ in range(3)][1:])
    speed = (trainer.val.split.tokens - 1) / seconds
    gpu = trainer.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiled:
        trainer.step()
        synchronize(trainer.device)
    name = "self_device_time_total" if gpu else "self_cpu_time_total"
    rows = [(each.key, each.count, getattr(each, name) / 1e3) for each in profiled.key_averages()]
    kernels = sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
    return {"evaluated_tokens_per_second": speed, "kernels": kernels}


def train(trainer: Trainer, steps: int) -> dict[str, Any]:
    """The schedule's other steps: the loss of the whole val split, and the seconds that all steps would have taken."""
    left = trainer.params.max_iters - WARM_UP_STEPS
    seconds = clock(trainer, partial(take_steps, trainer, left)) * trainer.params.max_iters / left
    return {"seconds": seconds, "loss": evaluate(trainer)}


def take_steps(trainer: Trainer, steps: int) -> None:
    """So many, one behind the other as between two lines of the log: the GPU is given the next while it computes."""
    for _ in range(steps):
        trainer.step()
    trainer.settle()


def evaluate(trainer: Trainer) -> float:
    """The loss of the whole val split, as the evaluate stage goes through it."""
    batch_size = max(1, BATCH_TOKENS[trainer.device.type] // trainer.params.block_size)
    return evaluate_split(trainer.model, trainer.val, batch_size, trainer.device, trainer.dtype).loss


def clock(trainer: Trainer, work: Any) -> float:
    """Seconds."""
    synchronize(trainer.device)
    started = time.perf_counter()
    work()
    synchronize(trainer.device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
