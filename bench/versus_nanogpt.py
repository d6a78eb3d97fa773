"""A training step of Encore against one of nanoGPT: its train.py, unmodified, beside ours.

    python -m bench.versus_nanogpt NANOGPT [--model 4x128|6x384|gpt2] [--steps N] [--rounds N] [--compile]

NANOGPT is a checkout of karpathy/nanoGPT. Both train the same architecture on the same tokens with the same settings,
each in a process of its own, in turn, in one run; each says itself how long its steps take. Works on any device.
"""

import argparse
import csv
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from ruamel.yaml import YAML

from bench.train import MODELS, ROOT, VOCAB_SIZE, WARM_UP_STEPS, write_tokens
from encore.devices.device import find_device


def run_encore(folder: Path, sizes: dict[str, int], steps: int, compiles: bool) -> list[float]:
    """Milliseconds of each step of `python -m stages.train` in `folder`, from the start."""
    shutil.rmtree(folder / ".encore", ignore_errors=True)
    page = YAML(typ="safe", pure=True).load((ROOT / "presets/gpt2-owt-4b.yaml").read_text())
    never = steps + 1
    page |= {
        **sizes,
        "compile": compiles,
        "gradient_accumulation_steps": 1,
        "max_iters": steps,
        "log_interval": 1,
        "eval_interval": never,
        "eval_iters": 1,
        "checkpoint_interval": never,
    }
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(page, file)
    run([sys.executable, "-m", "stages.train"], folder)
    with (folder / "metrics/speed.tsv").open() as file:
        return [float(row["ms_per_iter"]) for row in csv.DictReader(file, delimiter="\t")]


def run_nanogpt(folder: Path, sizes: dict[str, int], steps: int, compiles: bool, device: str) -> list[float]:
    """Milliseconds of each step of nanoGPT's train.py in its checkout `folder`."""
    settings = {
        **sizes,
        "dataset": "bench",
        "device": device,
        "compile": compiles,
        "gradient_accumulation_steps": 1,
        "max_iters": steps,
        "lr_decay_iters": steps,
        "eval_interval": steps + 1,
        "eval_iters": 1,
        "log_interval": 1,
        "out_dir": "out-bench",
    }
    output = run([sys.executable, "train.py", *(f"--{key}={value}" for key, value in settings.items())], folder)
    return [float(found) for found in re.findall(r"^iter \d+: loss \S+ time (\S+)ms", output, re.MULTILINE)]


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(command[:3])} failed:\n{done.stdout}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path)
    parser.add_argument("--model", choices=MODELS, default="4x128")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    sizes, steps, device = MODELS[arguments.model], arguments.steps + WARM_UP_STEPS, find_device()
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        ours, theirs = Path(name) / "encore", Path(name) / "nanogpt"
        write_tokens(ours / "data/tokens", VOCAB_SIZE)
        shutil.copy(ROOT / "dvc.yaml", ours)
        shutil.copytree(arguments.nanogpt, theirs)
        (theirs / "data/bench").mkdir(parents=True)
        for split in ("train", "val"):
            shutil.copy(ours / f"data/tokens/{split}_00000.bin", theirs / f"data/bench/{split}.bin")
        for _ in range(arguments.rounds):
            mine = run_encore(ours, sizes, steps, arguments.compile)
            other = run_nanogpt(theirs, sizes, steps, arguments.compile, device.type)
            pairs.append((statistics.median(mine[WARM_UP_STEPS:]), statistics.median(other[WARM_UP_STEPS:])))
    mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    tokens = sizes["batch_size"] * sizes["block_size"]
    how = "compiled" if arguments.compile else "eager"
    print(f"{arguments.model}, {how}, {device.type}, torch {torch.__version__}, medians of {arguments.rounds} rounds:")
    print(f"  Encore   {mine:9.1f} ms a step  {tokens / mine * 1e3:11,.0f} tokens/s")
    print(f"  nanoGPT  {other:9.1f} ms a step  {tokens / other * 1e3:11,.0f} tokens/s")
    print(f"step time over nanoGPT's: {statistics.median(a / b for a, b in pairs):.3f}")


if __name__ == "__main__":
    main()
