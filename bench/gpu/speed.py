"""Steps of each recipe and of nanoGPT, evaluation, memory, the first step, and where a step's time goes.

All compile side by side, each in a process of its own; then one after another is clocked.
"""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.gpu.pages import Page, gpt2, is_gpu, make_tokens, nanochat, nanochat_plus, print_head, print_row
from bench.gpu.step import BLOCKS, Job
from bench.memory import count
from encore.devices.device import REPEATABLE, find_device
from encore.models.cross_entropy import scores_at_once

STEPS = 10  # between two lines of the log, of Encore's and of nanoGPT's
KERNELS = 16
FEW, MANY = 12, 32  # sequences in a micro-batch


class NanoGPT:
    """Its train.py, unmodified. It cannot be asked to wait, so once it is warm it is halted until its turn. It logs
    every `steps` iterations, and the time between its lines is clocked here."""

    def __init__(self, process: subprocess.Popen[str], steps: int, tokens_per_step: int) -> None:
        self.process, self.steps, self.tokens_per_step = process, steps, tokens_per_step
        self._times: list[float] = []  # of its lines, behind the one at which it was halted
        self._warm = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def wait_until_ready(self) -> None:
        """Until it is warm, or has failed."""
        self._warm.wait()

    def do(self) -> dict[str, Any]:
        """Its turn. Nothing, where it failed."""
        self.process.send_signal(signal.SIGCONT)
        self.process.wait()
        self._listener.join()
        if len(self._times) != 1 + BLOCKS:
            return {}
        # It was halted before the first of these.
        seconds = statistics.median(later - earlier for earlier, later in pairwise(self._times)) / self.steps
        return {"seconds": seconds, "tokens_per_second": self.tokens_per_step / seconds}

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                if self._warm.is_set():
                    self._times += [time.perf_counter()] if line.startswith("iter ") else []
                elif line.startswith(f"iter {self.steps}:"):
                    self.process.send_signal(signal.SIGSTOP)
                    self._warm.set()
        self._warm.set()


def run(folder: Path, tiny: bool, nanogpt: Path | None) -> None:
    """The tables, a row as soon as it is there."""
    tokens = make_tokens(folder / "tokens", tiny)
    steps = 1 if tiny else STEPS
    pages = {
        f"GPT-2 124M, {FEW} sequences": gpt2(tiny, batch_size=FEW),
        f"GPT-2 124M, {MANY} sequences": gpt2(tiny, batch_size=MANY),
        f"nanochat by Muon, {MANY} sequences": nanochat(tiny, batch_size=MANY),
        f"nanochat-plus by Muon, {MANY} sequences": nanochat_plus(tiny, batch_size=MANY),
    }
    few, many, *_ = pages
    jobs: dict[str, Job | NanoGPT] = {}
    for name, page in pages.items():
        jobs[name] = start(folder, name, page, tokens, steps)
        if nanogpt and "GPT-2" in name:
            jobs[f"nanoGPT, the same as {name}"] = start_nanogpt(folder, nanogpt, page, tokens, steps, name)
    for name in (few, many):
        other = f"{name}, {REPEATABLE}=0"
        jobs[other] = start(folder, other, pages[name], tokens, steps, **{REPEATABLE: "0"})
    for job in jobs.values():
        job.wait_until_ready()
    # Its first step finds all compiled and has the machine for itself.
    rest = Job.start(folder / "rest", pages[few], tokens, "rest")
    rest.wait_until_ready()

    print_head("what", "ms an iteration", "tokens/s", "MFU", "peak memory", "bench.memory says", "check")
    found: dict[str, dict[str, Any]] = {}
    for name, job in jobs.items():
        found[name] = job.do()
        print_steps(folder, name, found[name], pages)
    found["evaluation, first step and profile"] = measured = rest.do()
    print_ratios(few, many, found)
    if measured:
        print_rest(measured, found[few].get("tokens_per_second"))
    failed = [name for name, result in found.items() if not result]
    if failed:
        raise SystemExit(f"bench: no figures of: {'; '.join(failed)}")


def start(folder: Path, name: str, page: Page, tokens: Path, steps: int, **environment: str) -> Job:
    """Begins to compile a recipe, whose steps will be clocked."""
    place = folder / re.sub(r"\W+", "-", name)
    return Job.start(place, page, tokens, "steps", steps, {**os.environ, **environment})


def start_nanogpt(folder: Path, nanogpt: Path, page: Page, tokens: Path, steps: int, name: str) -> NanoGPT:
    """The same sizes on the same tokens."""
    place = folder / re.sub(r"\W+", "-", f"nanogpt {name}")
    (place / "data/bench").mkdir(parents=True)
    for file in ("model.py", "train.py", "configurator.py"):
        shutil.copy(nanogpt / file, place)
    for split in ("train", "val"):
        shutil.copy(tokens / f"{split}_00000.bin", place / f"data/bench/{split}.bin")
    last = (2 + BLOCKS) * steps
    settings = {
        **{key: page[key] for key in ("n_layer", "n_head", "n_embd", "block_size", "batch_size")},
        "gradient_accumulation_steps": page["gradient_accumulation_steps"],
        "log_interval": steps,
        "eval_iters": 1,
        "dataset": "bench",
        "out_dir": "out",
        "max_iters": last,
        "lr_decay_iters": last,
        "eval_interval": last + 1,
        **({} if is_gpu() else {"device": "cpu", "compile": False, "dtype": "float32"}),
    }
    command = [sys.executable, "-u", "train.py", *(f"--{key}={value}" for key, value in settings.items())]
    tokens_per_step = page["batch_size"] * page["block_size"] * page["gradient_accumulation_steps"]
    pipe, same = subprocess.PIPE, subprocess.STDOUT
    process = subprocess.Popen(command, cwd=place, stdout=pipe, stderr=same, text=True)
    return NanoGPT(process, steps, tokens_per_step)


def print_steps(folder: Path, name: str, result: dict[str, Any], pages: dict[str, Page]) -> None:
    """A recipe's row."""
    if not result:
        print_row(name, "failed", *[""] * 5)
        return
    speed = f"{1e3 * result['seconds']:.1f}", f"{result['tokens_per_second']:,.0f}"
    if name.startswith("nanoGPT"):
        print_row(name, *speed, *[""] * 4)
        return
    counted = ""
    if name in pages:
        path = folder / "page.yaml"
        path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in pages[name].items()))
        counted = f"{sum(count(path, scores_at_once(find_device())).values()):.1f} GB"
    check = f"{result['check_seconds']:.2f} s, {result['check_peak_bytes'] / 1e9:.1f} GB"
    mfu = "" if result["mfu"] is None else f"{result['mfu']:.1%}"
    print_row(name, *speed, mfu, f"{result['peak_bytes'] / 1e9:.1f} GB", counted, check)


def print_ratios(few: str, many: str, found: dict[str, dict[str, Any]]) -> None:
    """What repeating costs, and the ratios of iterations that the goals speak of."""
    print()
    for name in (few, many):
        free, kept, peer = found[f"{name}, {REPEATABLE}=0"], found[name], found.get(f"nanoGPT, the same as {name}")
        if free and kept:
            print(f"{name}: repeating costs {kept['seconds'] / free['seconds'] - 1:+.1%} of an iteration", flush=True)
        if peer and kept:
            print(f"{name}: {peer['seconds'] / kept['seconds']:.2f} times nanoGPT's tokens/s", flush=True)
    for name in found:
        if name.startswith("nanochat") and found[name] and found[many]:
            ratio = found[name]["seconds"] / found[many]["seconds"]
            print(f"{name}: {ratio:.2f} times the iteration of GPT-2", flush=True)


def print_rest(result: dict[str, Any], training: float | None) -> None:
    """Evaluation, the first step, and where the time of an iteration goes. training: its tokens a second."""
    speed = result["evaluated_tokens_per_second"]
    ratio = f", {speed / training:.2f} times training's" if training else ""
    print(f"evaluation: {speed:,.0f} tokens/s{ratio}")
    print(f"a process with everything compiled before has taken steps after {result['first_step_seconds']:.1f} s")
    kernels = result["kernels"]
    total, launches = sum(row[2] for row in kernels), sum(row[1] for row in kernels)
    print(f"\nKernels of an iteration of {FEW} sequences: {launches:,}, {total:.1f} ms\n")
    print_head("kernel", "launches", "ms")
    for name, launches, milliseconds in kernels[:KERNELS]:
        print_row(name[:80].replace("|", " "), launches, f"{milliseconds:.2f}")
