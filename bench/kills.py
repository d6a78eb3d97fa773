"""Whether a run of training that is killed at random ends like one that nobody has disturbed.

    python -m bench.kills [--kills N] [--seed S]

Trains on params.yaml and data/tokens as they are here (`dvc repro count_tokens` makes them), once in peace, then again
and again, ending the trainer at random moments in the ways below and starting it anew, until it has been ended N times
and every run is finished. Prints a table, and exits with 1 where a run ended in other weights or curves.
"""

import argparse
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
STAGE = [sys.executable, "-m", "stages.train"]
SECONDS = 25.0  # the longest time from a start to its end
FEW_BYTES = 3_000_000  # less than the model has, and more than the logs


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.kills")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    ways = [name for name, _ in zip(list(WAYS) * arguments.kills, range(arguments.kills), strict=False)]
    draw.shuffle(ways)

    with tempfile.TemporaryDirectory() as place:
        undisturbed = train_in_peace(prepare(Path(place, "undisturbed")))
        table: list[tuple[str, float, int]] = []
        endings: list[bool] = []
        while ways:
            folder = prepare(Path(place, f"run-{len(endings)}"))
            while ways:
                seconds = draw.uniform(3, SECONDS)
                code = WAYS[ways[-1]](folder, seconds)
                if code == 0:  # it was done before
                    break
                table.append((ways.pop(), seconds, code))
                print(f"{table[-1][0]}: after {seconds:.1f} s, exit code {code}", flush=True)
            endings.append(train_in_peace(folder) == undisturbed)
            shutil.rmtree(folder)
    report(table, endings)


def prepare(folder: Path) -> Path:
    """A folder in which the stage finds what it reads."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "tokens").symlink_to(ROOT / "data" / "tokens")
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def train_in_peace(folder: Path) -> str:
    """Ends the run that `folder` holds, or does one. Returns a hash of what must be the same each time."""
    if not (folder / "model").exists():
        subprocess.run(STAGE, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, check=True)
    results = ["model/model.safetensors", "metrics/train.tsv", "metrics/eval.tsv"]
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in results)).hexdigest()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "ENCORE_SCRATCH": ""}


def start(folder: Path, limit_bytes: int = resource.RLIM_INFINITY) -> subprocess.Popen:
    """limit_bytes: how large a file may become."""
    return subprocess.Popen(
        STAGE,
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY)),
    )


def send(number: signal.Signals) -> Callable[[Path, float], int]:
    """Starts the stage, sends it a signal after some seconds and returns its exit code."""

    def end(folder: Path, seconds: float) -> int:
        process = start(folder)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            return process.wait()

    return end


def lose_power(folder: Path, seconds: float) -> int:
    """kill -9, and the newest checkpoint is cut short."""
    code = send(signal.SIGKILL)(folder, seconds)
    if checkpoints := list(folder.glob(".encore/checkpoints/*/iter-*")):
        newest = max(checkpoints, key=lambda path: path.name)
        os.truncate(newest / "optimizer.safetensors", 1000)
    return code


def lose_parent(folder: Path, seconds: float) -> int:
    """The process that started the stage, as `dvc` does, is killed."""
    lock = ".encore/checkpoints/*/lock.pid"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({STAGE!r}, capture_output=True)"],
        cwd=folder,
        env=environment(),
    )
    try:
        return parent.wait(seconds)
    except subprocess.TimeoutExpired:
        trainers = [int(path.read_text()) for path in folder.glob(lock)]
        parent.kill()
        code = parent.wait()
    while any(Path(f"/proc/{trainer}").exists() for trainer in trainers):
        time.sleep(0.1)
    return code


def fill_disk(folder: Path, seconds: float) -> int:
    """No file may grow to what a checkpoint needs, so that saving fails as on a full disk, whenever that is."""
    return start(folder, FEW_BYTES).wait()


WAYS: dict[str, Callable[[Path, float], int]] = {
    "kill -9": send(signal.SIGKILL),
    "SIGTERM": send(signal.SIGTERM),
    "SIGINT": send(signal.SIGINT),
    "the parent killed": lose_parent,
    "kill -9, newest checkpoint cut short": lose_power,
    "a disk that is full while saving": fill_disk,
}


def report(table: list[tuple[str, float, int]], endings: list[bool]) -> None:
    counts = Counter(way for way, _, _ in table)
    codes = {way: sorted({code for each, _, code in table if each == way}) for way in counts}
    print("\n| way | times | exit codes |\n|---|---|---|")
    for way in WAYS:
        print(f"| {way} | {counts[way]} | {', '.join(map(str, codes.get(way, [])))} |")
    print(f"\n{sum(endings)} of {len(endings)} runs, ended {len(table)} times on their way, have the undisturbed bytes")
    sys.exit(not all(endings))


if __name__ == "__main__":
    main()
