"""What the tests of training on several ranks share: folders to train in, two ranks that train one run after another,
and torchrun as the stage starts it.

`python -m tests.ranks RUNS` is one of the two ranks; what torchrun would set is in the environment. RUNS is JSON: a
list of runs, each with its `folder` (or `folders`, one for each rank), its `scratch`, `how` it is done and what is
set for rank 0 alone, `first_environment`.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from encore.devices.distributed import ALONE, Ranks, joined
from encore.errors import EncoreError, run_stage
from encore.params import StageParams, load_params
from encore.training.trainer import Trainer
from stages import train
from tests.conftest import ROOT, TINY, pipeline_environment, write_page, write_tokens
from tests.forks import fast_starts

# Python runs this where it starts. Timing what a CPU can do takes each rank two seconds. While there is a file HOLD,
# the first rank waits behind each checkpoint until it is asked to stop (then encore/signals.py resets its handlers),
# so that a test can stop it half-way however busy the machine is.
AT_START = """
import os, signal, sys, time
if "stages.train" in sys.orig_argv:
    from encore.training import checkpoint
    save = checkpoint.Saver.save

    def save_and_wait(saver, *contents):
        save(saver, *contents)
        asked = lambda: signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        while saver.ranks.is_first and os.path.exists({hold!r}) and not asked():
            time.sleep(0.005)

    checkpoint.Saver.save = save_and_wait
"""


STATIC = "--nnodes=2 --nproc-per-node=1 --node-rank={node} --master-addr=127.0.0.1 --master-port={port}"
C10D = "--nnodes=2 --nproc-per-node=1 --local-addr=127.0.0.1 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{port}"


def write_run(folder: Path, tokens: Path, **changes: Any) -> Path:
    """A folder in which the train stage has all that it reads."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "tokens").symlink_to(tokens)
    (folder / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    write_page(folder / "params.yaml", **{**TINY, "dtype": "float32", **changes})
    return folder


def write_walk(folder: Path, seed: int = 0) -> Path:
    """A folder of tokens that can be learned a little, as tests/conftest.py's."""
    walk = np.cumsum(np.random.default_rng(seed).integers(0, 4, 5700)) % 299
    walk[[4999, 5699]] = 299  # end-of-text
    write_tokens(folder, walk[:5000], walk[5000:], vocab_size=300)
    return folder


def find_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_two_ranks(runs: list[dict[str, Any]], **environment: str) -> list[tuple[int, str]]:
    """Does the runs on two ranks. Returns the exit code of each and what it said on standard error."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_port()), **environment}
    with fast_starts():
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.ranks", json.dumps(runs)],
                cwd=ROOT,
                env=pipeline_environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def python_path(folder: Path, code: Path = ROOT) -> str:
    """The PYTHONPATH with which training in `folder` runs AT_START, and Encore as it is in `code`."""
    at_start = hold_file(folder).parent / "sitecustomize.py"
    at_start.parent.mkdir(exist_ok=True)
    at_start.write_text(AT_START.format(hold=str(hold_file(folder))))
    return f"{at_start.parent}{os.pathsep}{code}"


def hold_file(folder: Path) -> Path:
    return folder.parent / "at-start" / "hold"


def launch_settings(folder: Path, arguments: str) -> dict[str, str]:
    """The environment in which the stage starts torchrun with these arguments, on CPUs."""
    settings = {"ENCORE_DEVICE": "cpu", "ENCORE_TORCHRUN": arguments, "PYTHONPATH": python_path(folder)}
    return {**settings, "TMPDIR": str(folder.parent)}  # of this run alone


def launched(folder: Path, arguments: str) -> AbstractContextManager[subprocess.Popen]:
    """`python -m stages.train` under torchrun."""
    return started(folder, "stages.train", **launch_settings(folder, arguments))


@contextmanager
def two_machines(folders: list[Path], arguments: str) -> Iterator[list[subprocess.Popen]]:
    """The stage on two machines with a rank each."""
    port = find_port()
    with ExitStack() as stack:
        agents = [
            stack.enter_context(launched(folder, arguments.format(node=node, port=port)))
            for node, folder in enumerate(folders)
        ]
        yield agents


@contextmanager
def started(folder: Path, module: str, *arguments: str, **environment: str) -> Iterator[subprocess.Popen]:
    """`python -m MODULE` in a process group of its own, as a shell starts it in the foreground."""
    with fast_starts():
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=folder,
            env=pipeline_environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    with process:
        try:
            yield process
        finally:
            process.kill()  # the trainers below it are told by Linux


@contextmanager
def at_checkpoint(process: subprocess.Popen, folder: Path) -> Iterator[Path]:
    """Training in `folder`, or in one beside it, while it waits behind a checkpoint that was not there: its path."""

    def list_checkpoints() -> set[Path]:
        return set(folder.parent.glob("*/.encore/checkpoints/*/iter-*"))

    hold_file(folder).touch()
    earlier, deadline = list_checkpoints(), time.monotonic() + 60
    try:
        while not (new := list_checkpoints() - earlier):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no new checkpoint"
            time.sleep(0.005)
        yield new.pop()
    finally:
        hold_file(folder).unlink()


def ranks_of(*agents: subprocess.Popen) -> dict[int, int]:
    """The processes that torchrun has started, by rank."""
    found = {}
    for agent in agents:
        for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
            settings = Path(f"/proc/{child}/environ").read_text().split("\0")
            found |= {int(each.removeprefix("RANK=")): int(child) for each in settings if each.startswith("RANK=")}
    return found


def wait_for_end(process_id: int) -> None:
    """Of a process that is not this one's child."""
    stat, deadline = Path(f"/proc/{process_id}/stat"), time.monotonic() + 30
    with suppress(FileNotFoundError, ProcessLookupError):
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline, f"process {process_id} is still there"
            time.sleep(0.01)


def end(process: subprocess.Popen, exit_code: int) -> list[str]:
    """Waits for the stage and its ranks, which must not end otherwise or with a traceback. Returns Encore's lines."""
    output, _ = process.communicate(timeout=120)
    print(output)  # shown where a test fails
    assert process.returncode == exit_code, output
    assert "Traceback" not in output, output
    return [line for line in output.splitlines() if line.startswith("encore: ")]


class Noted(Trainer):
    """Can be asked afterwards."""

    made: list[Trainer] = []  # noqa: RUF012

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.made.append(self)


def do(run: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Trains as the stage does. Returns the error's message and what the files do not tell."""
    os.chdir(run.get("folder") or run["folders"][ranks.rank])
    os.environ["ENCORE_SCRATCH"] = run.get("scratch", ".encore")
    if ranks.is_first:
        os.environ |= run.get("first_environment", {})
    how = {"alone": ALONE, "two": replace(ranks, shards=False), "sharded": replace(ranks, shards=True)}
    try:
        page = {**load_params("train").as_dict(), **run.get("unchecked", {})}
        train.train(StageParams("train", page), how[run["how"]])
    except EncoreError as error:
        return {"said": str(error)}
    parameters = list(Noted.made[-1].model.parameters())
    return {
        "seed": torch.initial_seed(),
        "numbers": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters),
        "shards by default": ranks.shards,
    }


def main() -> None:
    with pytest.MonkeyPatch.context() as patch, joined(torch.device("cpu")) as ranks:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(train, "Trainer", Noted)
        for run in json.loads(sys.argv[1]):
            if ranks.is_first or run["how"] != "alone":
                report = do(run, ranks)
                Path(f"rank-{ranks.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    run_stage(main)
