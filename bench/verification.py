"""What it costs that training verifies its tokens: beside the first steps, and at the next start.

    python -m bench.verification [--gigabytes N] [--model 4x128|6x384|gpt2] [--rounds N]

Token shards of that size, which are sparse files, are hashed while a trainer takes steps. Prints the median seconds of
a step beside the hashing and after it, how long that went on, and what the same costs once the marks are there.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from pathlib import Path

from bench.train import MODELS, ROOT, VOCAB_SIZE, WARM_UP_STEPS, make_trainer, write_tokens
from encore.integrity import SETTLED_SECONDS, Verification
from encore.tokens.token_files import SHARD_TOKENS
from encore.training.trainer import Trainer

SHARD_BYTES = 2 * SHARD_TOKENS
STEPS_AFTER = 10


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.verification")
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--model", choices=MODELS, default="6x384")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        write_tokens(Path("data/tokens"), VOCAB_SIZE)
        for number in range(arguments.rounds):
            files = write_shards(Path(f"shards-{number}"), int(arguments.gigabytes * 1e9 / SHARD_BYTES))
            trainer = make_trainer(Path(f"checkpoints-{number}"), MODELS[arguments.model], 1000, compiles=False)
            time.sleep(SETTLED_SECONDS)
            rounds.append(measure(trainer, files))
        os.chdir(ROOT)
    hashing, beside, after, again = (statistics.median(column) for column in zip(*rounds, strict=True))
    size = len(files) * SHARD_BYTES / 1e9
    print(f"\n{size:.1f} GB in {len(files)} shards, {arguments.model}, medians of {arguments.rounds} rounds:")
    print(f"  hashed beside training in  {hashing:8.2f} s, {size / hashing:.2f} GB/s")
    print(f"  a step beside it           {beside * 1e3:8.1f} ms, {beside / after:.2f} of one after it")
    print(f"  the next start             {again * 1e3:8.1f} ms")


def write_shards(folder: Path, count: int) -> dict[Path, str]:
    """Sparse files, and the hash that they have."""
    folder.mkdir()
    digest = hashlib.sha256(bytes(SHARD_BYTES)).hexdigest()
    files = {folder / f"train_{number:05d}.bin": digest for number in range(count)}
    for path in files:
        path.touch()
        os.truncate(path, SHARD_BYTES)
    return files


def measure(trainer: Trainer, files: dict[Path, str]) -> tuple[float, float, float, float]:
    """Seconds of the hashing, of a step beside it, of a step after it, and of a second verification."""
    for _ in range(WARM_UP_STEPS):
        trainer.step()
    started = time.perf_counter()
    verification = Verification(files, "")
    beside: list[float] = []
    while verification._thread.is_alive():
        beside.append(clock(trainer))
    hashing = time.perf_counter() - started
    verification.check()
    after = [clock(trainer) for _ in range(STEPS_AFTER)]
    started = time.perf_counter()
    Verification(files, "").check()
    return hashing, statistics.median(beside), statistics.median(after), time.perf_counter() - started


def clock(trainer: Trainer) -> float:
    started = time.perf_counter()
    trainer.step()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
