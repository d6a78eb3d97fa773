"""What a training step costs: Encore's trainer against the same model in a bare loop, and where its time goes.

    python -m bench.train [--model 4x128|6x384|gpt2] [--steps N] [--rounds N] [--compile]

Both train the same GPT-2 on the same made-up tokens, in turn, in one run; the bare loop (forward, backward, clipping,
AdamW; its batches lie in memory) is written here. Works on any device; ENCORE_DEVICE chooses one.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML

from bench.token_folder import about
from encore.devices.device import autocast
from encore.files import write_whole
from encore.models.architectures import make_model
from encore.models.flops import flops_per_token, synchronize
from encore.params import StageParams
from encore.signals import StopRequest
from encore.tokens.batches import Ahead
from encore.tokens.ranks import write_ranks
from encore.tokens.token_files import RANKS_FILE, SPLITS, ShardWriter, write_manifest
from encore.training.checkpoint import Saver
from encore.training.metrics import Records
from encore.training.optim import make_adamw
from encore.training.trainer import Trainer
from stages.train import prepare

ROOT = Path(__file__).parent.parent
MODELS = {
    "4x128": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256, "batch_size": 16},
    "6x384": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 12},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 12},
}
VOCAB_SIZE = 50_257
WARM_UP_STEPS = 3
# What a step of the trainer calls beside computing, by the name in the table.
PARTS: list[tuple[str, Any, str]] = [
    ("waiting for data", Ahead, "take"),
    ("logging", Records, "log_step"),
    ("evaluation", Trainer, "evaluate"),
    ("saving", Saver, "save"),
]


def write_tokens(folder: Path, vocab_size: int) -> None:
    """A folder as the tokenize stage leaves it, of tokens drawn at random."""
    folder.mkdir(parents=True)
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"%05d?" % number: 256 + number for number in range(vocab_size - 257)}
    write_whole(folder / RANKS_FILE, write_ranks(ranks))
    random = np.random.default_rng(0)
    shards = {}
    for split, count in zip(SPLITS, (3_000_000, 200_000), strict=True):
        writer = ShardWriter(folder, split, np.dtype("<u2"))
        tokens = random.integers(0, vocab_size - 1, count).astype("<u2")
        tokens[-1] = vocab_size - 1  # the end of the one document
        writer.add(tokens, np.array([count]), np.array([4 * count]))
        shards[split] = writer.finish()
    write_manifest(folder, vocab_size, shards, about("files:made-up", "bpe", shards))


def make_trainer(folder: Path, sizes: dict[str, int], steps: int, compiles: bool) -> Trainer:
    """The trainer as the stage makes it, in the working directory."""
    page = YAML(typ="safe", pure=True).load((ROOT / "presets/gpt2-owt-4b.yaml").read_text())
    interval = max(2, steps // 2)
    changes = {
        "compile": compiles,
        "gradient_accumulation_steps": 1,
        "max_iters": steps,
        "log_interval": 1,
        "eval_interval": interval,
        "eval_iters": 2,
        "checkpoint_interval": interval,
    }
    return prepare(StageParams("train", {**page, **sizes, **changes}), folder)


def run_trainer(trainer: Trainer) -> tuple[list[float], dict[str, float]]:
    """Seconds of each step as the trainer clocks them, and of its parts and the whole run."""
    spent: dict[str, float] = defaultdict(float)
    originals = [(owner, method, getattr(owner, method)) for _, owner, method in PARTS]

    def clocked(name: str, function: Callable) -> Callable:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent[name] += time.perf_counter() - started

        return call

    for name, owner, method in PARTS:
        setattr(owner, method, clocked(name, getattr(owner, method)))
    try:
        started = time.perf_counter()
        trainer.run(StopRequest())
        spent["whole run"] = time.perf_counter() - started
    finally:
        for owner, method, function in originals:
            setattr(owner, method, function)
    seconds = [row["ms_per_iter"] / 1e3 for row in trainer.records.rows.speed]
    return seconds[WARM_UP_STEPS:], spent


def run_bare(trainer: Trainer, steps: int) -> list[float]:
    """Seconds of each step of a loop without a pipeline, from weights of its own."""
    params, device, dtype = trainer.params, trainer.device, trainer.dtype
    torch.manual_seed(params.seed)
    model = make_model(trainer.model.config).to(device)
    forward = torch.compile(model) if trainer.hardware.compiles else model
    optimizer = make_adamw(model, params.learning_rate, (params.beta1, params.beta2), params.weight_decay)
    batches = [trainer.train.batch(trainer.my_windows(step)) for step in range(steps)]
    batches = [(idx.to(device), targets.to(device)) for idx, targets in batches]
    seconds = []
    for idx, targets in batches:
        started = time.perf_counter()
        with autocast(device, dtype):
            loss = forward(idx, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), params.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP_STEPS:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="4x128")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    steps = arguments.steps + WARM_UP_STEPS
    pairs, shares = [], defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_tokens(Path("data/tokens"), VOCAB_SIZE)
        for number in range(arguments.rounds):
            trainer = make_trainer(Path(f"checkpoints-{number}"), MODELS[arguments.model], steps, arguments.compile)
            ours, spent = run_trainer(trainer)
            bare = run_bare(trainer, steps)
            pairs.append((statistics.median(ours), statistics.median(bare)))
            for name, seconds in spent.items():
                shares[name].append(seconds / spent["whole run"])
        os.chdir(ROOT)
    ours, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
    flops = flops_per_token(trainer.model) * trainer.tokens_per_step / ours
    peak = trainer.hardware.peak
    print(
        f"\n{arguments.model} on {trainer.hardware}, torch {torch.__version__}, medians of {arguments.rounds} rounds:"
    )
    print(f"  Encore's step  {ours * 1e3:9.1f} ms  {trainer.tokens_per_step / ours:9,.0f} tokens/s")
    print(f"  bare step      {bare * 1e3:9.1f} ms  {trainer.tokens_per_step / bare:9,.0f} tokens/s")
    mfu = f", {flops / peak.flops_per_second:.1%} of {peak.flops_per_second / 1e12:.2f} ({peak.basis})" if peak else ""
    print(f"  {flops / 1e12:.3f} TFLOP/s{mfu}")
    print(f"  peak memory {peak_memory_bytes(trainer.device) / 1e9:.2f} GB")
    for name, _, _ in PARTS:
        print(f"  {name:16s} {statistics.median(shares[name]):6.2%} of the run")
    print(f"speed over the bare loop: {statistics.median(b / o for o, b in pairs):.3f}")


def peak_memory_bytes(device: torch.device) -> int:
    """Of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
