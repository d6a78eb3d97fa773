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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.pages import Page, gpt2, is_gpu, make_tokens, nanochat, nanochat_plus, print_head, print_row
from bench.memory import count
from encore.device import REPEATABLE

STEPS, WARM_UP_STEPS, KERNELS = 20, 4, 16
FEW, MANY = 12, 32  # sequences in a micro-batch


@dataclass
class Job:
    """A process that is compiling, or waits for its turn."""

    process: subprocess.Popen[str]

    def wait_until_ready(self) -> bool:
        """Whether it will be able to do its work."""
        assert self.process.stdout is not None
        return any(line == "ready\n" for line in self.process.stdout)

    def do(self) -> dict[str, Any]:
        """Its turn."""
        output, _ = self.process.communicate("go\n")
        lines = [line for line in output.splitlines() if line.startswith("{")]
        return json.loads(lines[-1]) if lines else {}


@dataclass
class NanoGPT:
    """Its train.py, unmodified. It cannot be asked to wait, so once it is warm it is halted until its turn."""

    process: subprocess.Popen[str]

    def wait_until_ready(self) -> bool:
        assert self.process.stdout is not None
        ready = any(line.startswith(f"iter {WARM_UP_STEPS}:") for line in self.process.stdout)
        if ready:
            self.process.send_signal(signal.SIGSTOP)
        return ready

    def do(self) -> dict[str, Any]:
        self.process.send_signal(signal.SIGCONT)
        output, _ = self.process.communicate()
        times = re.findall(r"^iter \d+: loss \S+ time (\S+)ms", output, re.MULTILINE)
        # The first was halted, the second may have waited for it.
        return {"seconds": statistics.median(float(each) / 1e3 for each in times[2:])} if len(times) > 2 else {}


def run(folder: Path, tiny: bool, nanogpt: Path | None) -> None:
    """The tables, a row as soon as it is there."""
    tokens = make_tokens(folder / "tokens", tiny)
    steps = 2 if tiny else STEPS
    pages = {
        f"GPT-2 124M, {FEW} sequences": gpt2(tiny, batch_size=FEW),
        f"GPT-2 124M, {MANY} sequences": gpt2(tiny, batch_size=MANY),
        f"nanochat by Muon, {MANY} sequences": nanochat(tiny, batch_size=MANY),
        f"nanochat-plus by Muon, {MANY} sequences": nanochat_plus(tiny, batch_size=MANY),
    }
    few, many, *_ = pages
    jobs: dict[str, Job | NanoGPT] = {}
    for name, page in pages.items():
        jobs[name] = start(folder, name, page, tokens, steps, "steps")
        if nanogpt and "GPT-2" in name:
            jobs[f"nanoGPT, the same as {name}"] = start_nanogpt(folder, nanogpt, page, tokens, steps, name)
    for name in (few, many):
        other = f"{name}, {REPEATABLE}=0"
        jobs[other] = start(folder, other, pages[name], tokens, steps, "steps", **{REPEATABLE: "0"})
    jobs["evaluation"] = start(folder, "evaluation", pages[few], tokens, steps, "evaluate")
    jobs["profile"] = start(folder, "profile", pages[few], tokens, steps, "profile")
    ready = {name: job.wait_until_ready() for name, job in jobs.items()}

    print_head(
        "what", "ms an iteration", "tokens/s", "MFU", "peak memory", "bench.memory says", "over nanoGPT", "check"
    )
    found: dict[str, dict[str, Any]] = {}
    for name, job in jobs.items():
        found[name] = job.do() if ready[name] else {}
        if name not in ("evaluation", "profile"):
            print_steps(folder, name, found, pages)
    few_speed = found[few].get("tokens_per_second")
    print_rest(few, many, found, few_speed)
    print_first_step(folder, pages[few], tokens, steps)
    print_profile(found["profile"])
    failed = [name for name, result in found.items() if not result]
    if failed:
        raise SystemExit(f"bench: no figures of: {'; '.join(failed)}")


def start(folder: Path, name: str, page: Page, tokens: Path, steps: int, work: str, **environment: str) -> Job:
    """Begins to compile a page."""
    place = folder / re.sub(r"\W+", "-", name)
    (place / "data").mkdir(parents=True)
    (place / "data/tokens").symlink_to(tokens)
    (place / "page.json").write_text(json.dumps(page))
    command = [sys.executable, "-m", "bench.gpu.step", "page.json", str(steps), work]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return Job(subprocess.Popen(command, cwd=place, env={**os.environ, **environment}, **pipes))


def start_nanogpt(folder: Path, nanogpt: Path, page: Page, tokens: Path, steps: int, name: str) -> NanoGPT:
    """The same sizes on the same tokens."""
    place = folder / re.sub(r"\W+", "-", f"nanogpt {name}")
    (place / "data/bench").mkdir(parents=True)
    for file in ("model.py", "train.py", "configurator.py"):
        shutil.copy(nanogpt / file, place)
    for split in ("train", "val"):
        shutil.copy(tokens / f"{split}_00000.bin", place / f"data/bench/{split}.bin")
    last = WARM_UP_STEPS + 2 + steps
    settings = {
        **{key: page[key] for key in ("n_layer", "n_head", "n_embd", "block_size", "batch_size")},
        "gradient_accumulation_steps": page["gradient_accumulation_steps"],
        "log_interval": 1,
        "eval_iters": 1,
        "dataset": "bench",
        "out_dir": "out",
        "max_iters": last,
        "lr_decay_iters": last,
        "eval_interval": last + 1,
        **({} if is_gpu() else {"device": "cpu", "compile": False, "dtype": "float32"}),
    }
    command = [sys.executable, "-u", "train.py", *(f"--{key}={value}" for key, value in settings.items())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return NanoGPT(subprocess.Popen(command, cwd=place, **pipes))


def print_steps(folder: Path, name: str, found: dict[str, dict[str, Any]], pages: dict[str, Page]) -> None:
    """A recipe's row."""
    result = found[name]
    if not result:
        print_row(name, "failed", *[""] * 6)
        return
    ms = f"{1e3 * result['seconds']:.1f}"
    if name.startswith("nanoGPT"):
        print_row(name, ms, *[""] * 6)
        return
    counted = ""
    if name in pages:
        path = folder / "page.yaml"
        path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in pages[name].items()))
        counted = f"{sum(count(path).values()):.1f} GB"
    peer = next((seconds for other, seconds in found.items() if other == f"nanoGPT, the same as {name}"), {})
    print_row(
        name,
        ms,
        f"{result['tokens_per_second']:,.0f}",
        f"{result['mfu']:.1%}",
        f"{result['peak_bytes'] / 1e9:.1f} GB",
        counted,
        f"{result['seconds'] / peer['seconds']:.2f}" if peer else "",
        f"{result['check_seconds']:.2f} s, {result['check_peak_bytes'] / 1e9:.1f} GB",
    )


def print_rest(few: str, many: str, found: dict[str, dict[str, Any]], few_speed: float | None) -> None:
    """The ratios that the goals speak of."""
    print()
    for name in (few, many):
        free, kept = found[f"{name}, {REPEATABLE}=0"], found[name]
        peer = found.get(f"nanoGPT, the same as {name}")
        if free and kept:
            print(f"{name}: repeating costs {kept['seconds'] / free['seconds'] - 1:+.1%} of an iteration", flush=True)
        if peer and kept:
            print(f"{name}: {peer['seconds'] / kept['seconds']:.2f} times nanoGPT's tokens/s", flush=True)
    for name in found:
        if name.startswith("nanochat") and found[name] and found[many]:
            ratio = found[name]["seconds"] / found[many]["seconds"]
            print(f"{name}: {ratio:.2f} times the iteration of GPT-2", flush=True)
    evaluation = found["evaluation"]
    if evaluation and few_speed:
        speed = evaluation["tokens_per_second"]
        print(f"evaluation: {speed:,.0f} tokens/s, {speed / few_speed:.2f} times training's", flush=True)


def print_first_step(folder: Path, page: Page, tokens: Path, steps: int) -> None:
    """How long a process takes until it has taken steps, when another has compiled the same."""
    job = start(folder, "first step", page, tokens, steps, "steps")
    seconds = job.do().get("first_step_seconds") if job.wait_until_ready() else None
    told = "failed" if seconds is None else f"{seconds:.1f} s"
    print(f"first steps of a process, everything compiled before, from its start: {told}\n", flush=True)


def print_profile(result: dict[str, Any]) -> None:
    """Where the time of one iteration goes."""
    kernels = result.get("kernels", [])
    total, launches = sum(row[2] for row in kernels), sum(row[1] for row in kernels)
    print(f"Kernels of an iteration of {FEW} sequences: {launches:,}, {total:.1f} ms\n")
    print_head("kernel", "launches", "ms")
    for name, launches, milliseconds in kernels[:KERNELS]:
        print_row(name[:80].replace("|", " "), launches, f"{milliseconds:.2f}")
