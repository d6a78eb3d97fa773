"""What becomes of a single flipped bit, in every file that a stage or command of Encore reads.

    python -m bench.flips [--flips N] [--seed S]

In a repository where a tiny pipeline has run, again and again a random bit of one file is flipped, and a command that
reads the file is run. Prints a table of how that ended: refused with a sentence; told of with a note; without effect on
the result; or else, which should never be, with another result in silence, with a traceback, or not at all. Exits with
1 where that was seen.
"""

import argparse
import hashlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.tiny_repository import make_repository

SECONDS = 120  # for a command
REFUSED, TOLD, SAME = "refused", "told", "same result"
SILENT, CRASHED, ENDLESS = "OTHER RESULT", "TRACEBACK", "NO END"


@dataclass(frozen=True)
class Command:
    """A module with its arguments, what it leaves (patterns of files; its standard output where there are none), and
    the patterns of the files that it reads. gone: what is removed before."""

    words: tuple[str, ...]
    results: tuple[str, ...]
    reads: tuple[str, ...]
    gone: tuple[str, ...] = ()


TRAINED = ("model/*.json", "model/*.safetensors", "model/*.tiktoken", "metrics/train.tsv", "metrics/eval.tsv")
EVALUATED = ("metrics/eval.json", "metrics/position.tsv", "metrics/samples.md")
COMMANDS = {
    "download": Command(("stages.download",), ("data/raw/*",), ("corpus/s*",)),
    "download_weights": Command(("stages.download_weights",), ("data/init/*",), ("start/*",)),
    "tokenize": Command(("stages.tokenize",), ("data/tokens/*",), ("data/raw/*",)),
    "tokenize, from kept parts": Command(
        ("stages.tokenize",), ("data/tokens/*",), (".parts/tokens/*/*", ".parts/tokens/*/*/*")
    ),
    "count_tokens": Command(("stages.count_tokens",), ("metrics/tokens.json",), ("data/tokens/*",)),
    "train": Command(("stages.train",), TRAINED, ("data/tokens/*", "data/init/*"), (".encore",)),
    "train, resumed": Command(
        ("stages.train",),
        TRAINED,
        (".encore/checkpoints/*/*", ".encore/checkpoints/*/*/*", ".encore/verified/*"),
    ),
    "evaluate": Command(("stages.evaluate",), EVALUATED, ("data/tokens/*", "data/tasks/*", "model/*")),
    "generate": Command(("encore", "generate", "--prompt", "def ", "--max-new-tokens", "5"), (), ("model/*",)),
    "report": Command(
        ("encore", "report"),
        ("report.html",),
        ("metrics/*", "training.log", "model/encore.json", ".encore/history.jsonl", "dvc.lock"),
    ),
    "summary": Command(("encore", "summary"), (), ("metrics/*.json", "metrics/samples.md")),
    "verify": Command(
        ("encore", "verify"), (), ("data/*/*", "model/*", "metrics/*", ".dvc/cache/files/md5/*/*", "dvc.lock")
    ),
    "mend": Command(("encore", "mend"), (), ("dvc.lock",)),
    "check": Command(("stages.check",), ("data/code/*",), ("params.yaml", "dvc.yaml")),
}
# Pages that say what is to be done: another one is another wish, which git shows. No traceback is all that is asked.
WISHES = {"params.yaml", "dvc.yaml"}


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.flips")
    parser.add_argument("--flips", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    load_modules()

    with tempfile.TemporaryDirectory() as place:
        base = prepare(Path(place, "base"))
        undisturbed = {name: run(base, command, Path(place, "run"), None)[1] for name, command in COMMANDS.items()}
        pairs = [
            (name, path)
            for name, command in COMMANDS.items()
            for path in sorted({path for pattern in command.reads for path in base.glob(pattern)})
            if path.is_file() and path.stat().st_size
        ]
        print(f"{len(pairs)} pairs of a command and a file that it reads", flush=True)
        endings: dict[str, Counter[str]] = {name: Counter() for name in COMMANDS}
        for number in range(arguments.flips):
            name, path = pairs[number % len(pairs)]
            bit = draw.randrange(8 * path.stat().st_size)
            flip = path.relative_to(base), bit
            ending, result, said = run(base, COMMANDS[name], Path(place, "run"), flip)
            if ending == SAME and result != undisturbed[name] and path.name not in WISHES:
                ending = TOLD if "encore: note: " in said else SILENT
            endings[name][ending] += 1
            if ending in (SILENT, CRASHED, ENDLESS):
                print(f"{name}: {flip[0]}, bit {bit}: {ending}\n{said[-2000:]}", flush=True)
    report(endings)


def load_modules() -> None:
    """What takes seconds to import is there before the processes part."""
    for command in COMMANDS.values():
        __import__(command.words[0])
    import torch

    torch.set_num_threads(1)


def prepare(folder: Path) -> Path:
    """A repository where the pipeline has run from weights of its own, and where a run has left parts of tokens."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ENCORE_DEVICE": "cpu"}

    def do(*words: str, **settings: str) -> None:
        command = [sys.executable, "-m", *words]
        subprocess.run(command, cwd=folder, env={**environment, **settings}, check=True, stdout=subprocess.DEVNULL)

    make_repository(folder, max_iters=20)
    do("dvc", "repro")
    shutil.copytree(folder / "model", folder / "start")
    make_page = (folder / "params.yaml").read_text().replace("init_from: scratch", "init_from: ./start/")
    (folder / "params.yaml").write_text(make_page)
    shutil.rmtree(folder / ".encore")
    do("dvc", "repro")
    do("encore", "cluster", "--part", "0", ENCORE_SCRATCH=".parts")
    shutil.rmtree(folder / ".git")
    return folder


def run(base: Path, command: Command, folder: Path, flip: tuple[Path, int] | None) -> tuple[str, str, str]:
    """How the command ends in a copy of the repository with that bit flipped, its result's hash, and what it said."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder, symlinks=True, copy_function=shutil.copy2)
    for name in command.gone:
        shutil.rmtree(folder / name)
    if flip:
        path, bit = folder / flip[0], flip[1]
        data = bytearray(path.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        path.chmod(0o644)
        path.write_bytes(data)
    exit_code, out, said = call(folder, command)
    if exit_code is None:
        return ENDLESS, "", said
    if "Traceback" in said:
        return CRASHED, "", said
    if exit_code:
        return (REFUSED if re.search("^encore: |^usage: ", said, re.M) else CRASHED), "", said
    return SAME, hash_result(folder, command, out), said


def call(folder: Path, command: Command) -> tuple[int | None, str, str]:
    """The exit code of the command, None where it had to be killed, and what it wrote to the two streams."""
    streams = [folder / ".stdout", folder / ".stderr"]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, path in enumerate(streams, start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
            os.chdir(folder)
            os.environ["ENCORE_DEVICE"] = "cpu"
            if "kept parts" in next(name for name, each in COMMANDS.items() if each is command):
                os.environ["ENCORE_SCRATCH"] = ".parts"
            sys.argv = [command.words[0], *command.words[1:]]
            sys.modules.pop(command.words[0])
            runpy.run_module(command.words[0], run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            out, said = (path.read_text(errors="replace") for path in streams)
            return os.waitstatus_to_exitcode(status), out, said
        time.sleep(0.005)
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(child).children(recursive=True):
            process.kill()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, "", streams[1].read_text(errors="replace")


def hash_result(folder: Path, command: Command, out: str) -> str:
    """Of what the command leaves, without what a clock says."""
    digest = hashlib.sha256()
    if not command.results:
        digest.update(out.encode())
    for path in sorted({path for pattern in command.results for path in folder.glob(pattern) if path.is_file()}):
        data = path.read_bytes()
        if path.name == "eval.json":
            page = json.loads(data)
            del page["eval"]["tokens_per_second"]
            data = json.dumps(page).encode()
        if path.name == "report.html":
            data = re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d UTC", b"", data)
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + data)
    return digest.hexdigest()


def report(endings: dict[str, Counter[str]]) -> None:
    kinds = [REFUSED, TOLD, SAME, SILENT, CRASHED, ENDLESS]
    total = sum(endings.values(), Counter())
    print(f"\n| command | flips | {' | '.join(kinds)} |\n|---|---|{'---|' * len(kinds)}")
    for name, counts in {**endings, "all": total}.items():
        print(f"| {name} | {counts.total()} | {' | '.join(str(counts[kind]) for kind in kinds)} |")
    sys.exit(any(total[kind] for kind in (SILENT, CRASHED, ENDLESS)))


if __name__ == "__main__":
    main()
