"""Whether `make repro` that is killed at random, again and again, ends by itself where an undisturbed one ends.

    python -m bench.repro_kills [--kills N] [--seed S]

Each round begins with a fresh clone, whose page is a tiny one, and starts `make repro` up to KILLS_A_ROUND times, each
time ended at a random moment in one of the ways below; then it must go through. Prints a table, and exits with 1 where
a round ended in other bytes or not at all.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

from bench.tiny_repository import ROOT, make_repository

KILLS_A_ROUND = 5
SECONDS_TO_END = 60
# What a clock does not change.
RESULTS = ("data/raw/*", "data/tokens/*", "model/*.safetensors", "model/*.json", "metrics/t*", "metrics/eval.tsv")


Way = Callable[[Path, psutil.Process, float], bool]


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.repro_kills")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    ways = [list(WAYS)[number % len(WAYS)] for number in range(arguments.kills)]
    draw.shuffle(ways)

    with tempfile.TemporaryDirectory() as place:
        template = make_repository(Path(place, "template"))
        started = time.monotonic()
        undisturbed = finish(clone(template, Path(place, "undisturbed")))
        seconds = time.monotonic() - started
        print(f"undisturbed: {seconds:.0f} s", flush=True)
        killed: Counter[str] = Counter()
        endings: list[bool] = []
        while ways:
            folder = clone(template, Path(place, f"round-{len(endings)}"))
            for _ in range(min(KILLS_A_ROUND, len(ways))):
                after_seconds, moment = draw.uniform(0.3, seconds * 0.4), draw.random()
                done = start_and_kill(folder, after_seconds, WAYS[ways[-1]], moment)
                if done is None:
                    break
                if done:
                    print(f"{ways[-1]}: after {after_seconds:.1f} s", flush=True)
                    killed[ways.pop()] += 1
            endings.append(finish(folder) == undisturbed)
            print(f"round {len(endings)}: {'the same bytes' if endings[-1] else 'OTHER BYTES'}", flush=True)
            if endings[-1]:
                shutil.rmtree(folder)
    print("\n| what was killed | times |\n|---|---|")
    for way in WAYS:
        print(f"| {way} | {killed[way]} |")
    print(f"\n{sum(endings)} of {len(endings)} rounds, killed {killed.total()} times, ended in the undisturbed bytes")
    sys.exit(not all(endings))


def clone(template: Path, folder: Path) -> Path:
    subprocess.run(["git", "clone", "-q", str(template), str(folder)], check=True)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    (folder / ".git/info/exclude").write_text(".venv\n")
    os.utime(folder / "requirements.lock", (0, 0))  # so that make finds .venv ready
    return folder


def start(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ENCORE_DEVICE": "cpu"}
    return subprocess.Popen(
        ["make", "repro"],
        cwd=folder,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finish(folder: Path) -> dict[str, str] | None:
    """The hashes of what an undisturbed `make repro` leaves; None where it fails."""
    if start(folder).wait() != 0:
        return None
    paths = sorted({path for pattern in RESULTS for path in folder.glob(pattern)})
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def start_and_kill(folder: Path, seconds: float, way: Way, moment: float) -> bool | None:
    """Starts `make repro` and ends it after some seconds. Whether there was something to kill; None where it was done
    before. Waits for what is left to stop in order."""
    with start(folder) as make:
        try:
            make.wait(seconds)
            return None
        except subprocess.TimeoutExpired:
            root = psutil.Process(make.pid)
            below = root.children(recursive=True)
            done = way(folder, root, moment)
            _, alive = psutil.wait_procs([root, *below], SECONDS_TO_END)
            for process in alive:
                print(f"  still alive: {process.cmdline()}", flush=True)
                process.kill()
            return done


def find(root: psutil.Process, word: str) -> list[psutil.Process]:
    """The processes below whose command line has the word, the innermost last."""
    found = []
    for process in root.children(recursive=True):
        try:
            if any(word in part for part in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def end(found: list[psutil.Process], root: psutil.Process, number: signal.Signals) -> bool:
    """Sends the signal. Where nothing was found, all are killed, so that the next try begins anew, and it is False."""
    for process in found:
        process.send_signal(number)
    if not found:
        os.killpg(root.pid, signal.SIGKILL)
    return bool(found)


def kill_stage(folder: Path, root: psutil.Process, moment: float) -> bool:
    return end(find(root, "stages."), root, signal.SIGKILL)


def terminate_stage(folder: Path, root: psutil.Process, moment: float) -> bool:
    return end(find(root, "stages.")[-1:], root, signal.SIGTERM)


def kill_dvc(folder: Path, root: psutil.Process, moment: float) -> bool:
    return end(find(root, "dvc"), root, signal.SIGKILL)


def kill_group(folder: Path, root: psutil.Process, moment: float) -> bool:
    os.killpg(root.pid, signal.SIGKILL)
    return True


def interrupt_group(folder: Path, root: psutil.Process, moment: float) -> bool:
    os.killpg(root.pid, signal.SIGINT)
    return True


def cut_off(name: str, if_missing: bytes) -> Way:
    """dvc is killed, and a file that it writes in place is left as far as it had come."""

    def kill_and_cut(folder: Path, root: psutil.Process, moment: float) -> bool:
        if not kill_dvc(folder, root, moment):
            return False
        path = folder / name
        data = path.read_bytes() if path.exists() else if_missing
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[: int(len(data) * moment) if moment > 0.3 else 0])
        return True

    return kill_and_cut


def lock_index(folder: Path, root: psutil.Process, moment: float) -> bool:
    """dvc is killed while it stages its files: git's lock stays."""
    done = kill_dvc(folder, root, moment)
    (folder / ".git/index.lock").touch()
    return done


WAYS: dict[str, Way] = {
    "the stage, by kill -9": kill_stage,
    "the stage, by SIGTERM": terminate_stage,
    "dvc, by kill -9": kill_dvc,
    "all of the group, by kill -9": kill_group,
    "all of the group, by Ctrl-C": interrupt_group,
    "dvc, amid writing dvc.lock": cut_off("dvc.lock", b"schema: '2.0'\n"),
    "dvc, amid writing rwlock": cut_off(".dvc/tmp/rwlock", b'{"data/tokens": {"read": []}}'),
    "dvc, while git's index is locked": lock_index,
}


if __name__ == "__main__":
    main()
