"""Training that is stopped in several ways under `dvc repro`, and ends as if it never had been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.conftest import SMALL, commit, run_dvc, write_page
from tests.ranks import at_checkpoint, python_path, started, wait_for_end

LONG = {**SMALL, "dropout": 0.1, "max_iters": 200, "log_interval": 5, "eval_interval": 50, "checkpoint_interval": 20}
CLOCKS = {"tokens_per_second", "tflops"}


@pytest.fixture
def long_run(finished: Path) -> Path:
    """A repository in which only training and evaluation are left to do."""
    write_page(finished / "params.yaml", **LONG)
    commit(finished, "a longer run")
    return finished


def repro(repository: Path) -> AbstractContextManager[subprocess.Popen]:
    # DVC starts a stage through $SHELL; Debian's sh stays between the two unless the command says exec.
    return started(repository, "dvc", "repro", PYTHONPATH=python_path(repository, code=repository), SHELL="/bin/sh")


@contextmanager
def training(repository: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """`dvc repro` while its trainer waits behind a new checkpoint: dvc and the trainer's process."""
    with repro(repository) as dvc, at_checkpoint(dvc, repository):
        yield dvc, int(read_owner(repository))


def end(dvc: subprocess.Popen) -> str:
    """What a `dvc repro` has printed that fails."""
    output, _ = dvc.communicate(timeout=60)
    assert dvc.returncode != 0, output
    assert "Traceback" not in output
    return output


def list_checkpoints(repository: Path) -> list[Path]:
    return list((repository / ".encore/checkpoints").glob("*/iter-*"))


def read_owner(repository: Path) -> str:
    """The process that holds the lock of a run; nothing as long as none does."""
    return "".join(path.read_text() for path in repository.glob(".encore/checkpoints/*/lock.pid"))


def results(repository: Path) -> dict:
    """What must be the same however often the run was stopped."""
    metrics, evaluation = (
        json.loads((repository / f"metrics/{name}.json").read_text()) for name in ("metrics", "eval")
    )
    return {
        "weights": (repository / "model/model.safetensors").read_bytes(),
        "record": (repository / "model/encore.json").read_text(),
        "metrics": {key: value for key, value in metrics.items() if key not in CLOCKS},
        "evaluation": {key: value for key, value in evaluation["eval"].items() if key not in CLOCKS},
        "by position": (repository / "metrics/position.tsv").read_text(),
        "samples": (repository / "metrics/samples.md").read_text(),
        "train curve": (repository / "metrics/train.tsv").read_text(),
        "eval curve": (repository / "metrics/eval.tsv").read_text(),
        "iterations of the speed curve": [
            line.split("\t")[0] for line in (repository / "metrics/speed.tsv").read_text().splitlines()
        ],
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and asks for the parent's death signal")
def test_killed_in_four_ways_and_resumed(long_run, tmp_path):
    undisturbed = Path(shutil.copytree(long_run, tmp_path / "undisturbed", symlinks=True))
    run_dvc(undisturbed, "repro", PYTHONHASHSEED="1")  # no forks (tests/forks.py), and another order of sets

    with training(long_run) as (dvc, trainer):
        os.kill(trainer, signal.SIGKILL)
        end(dvc)
    assert not (long_run / "model").exists()

    # kill -9 of dvc: the trainer is not left behind, it saves and ends.
    with training(long_run) as (dvc, trainer):
        dvc.kill()
        dvc.communicate(timeout=60)
        wait_for_end(trainer)
    assert "resumed at iteration" in (long_run / "training.log").read_text()

    # Ctrl-C goes to the whole group: the trainer saves at the next step and dvc reports a failure.
    with training(long_run) as (dvc, _):
        os.killpg(dvc.pid, signal.SIGINT)
        assert "SIGINT: saved at iteration" in end(dvc)

    # SIGTERM of the trainer, as a batch system sends it.
    with training(long_run) as (dvc, trainer):
        os.kill(trainer, signal.SIGTERM)
        output = end(dvc)
    assert "SIGTERM: saved at iteration" in output
    assert "exited with 143" in output

    # Power loss: the newest checkpoint is cut short.
    newest = max(list_checkpoints(long_run), key=lambda path: path.name)
    with (newest / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    output = run_dvc(long_run, "repro")
    assert f"{newest.name} is damaged" in output
    assert results(long_run) == results(undisturbed)
    assert "Data and pipelines are up to date" in run_dvc(long_run, "status")
    assert len(list(newest.parent.glob("iter-*"))) == 2


def test_stopped_before_its_first_step(finished):
    """The trainer reads its data and measures the device: there is nothing to save, and nothing is left half-done."""
    undisturbed = results(finished)
    shutil.rmtree(finished / ".encore/checkpoints")
    # What changes no result and yet makes DVC run the stage again.
    write_page(finished / "params.yaml", **{**SMALL, "keep_checkpoints": 3})

    with repro(finished) as dvc:
        deadline = time.monotonic() + 60
        while not (trainer := read_owner(finished)):
            assert dvc.poll() is None, dvc.communicate()[0]
            assert time.monotonic() < deadline, "no trainer"
            time.sleep(0.01)
        os.kill(int(trainer), signal.SIGTERM)
        end(dvc)
    assert list_checkpoints(finished) == []
    assert not (finished / "model").exists()

    assert "Running stage 'train'" in run_dvc(finished, "repro")
    assert {**results(finished), "record": ""} == {**undisturbed, "record": ""}


def test_other_code_wants_an_explicit_word(long_run):
    """A run stopped half-way goes on under changed code only where the environment says so, and records it."""
    with training(long_run) as (dvc, trainer):
        os.kill(trainer, signal.SIGKILL)
        end(dvc)
    with (long_run / "encore/training/lr_schedule.py").open("a") as file:
        file.write("MENDED = True\n")
    assert "made by other code" in run_dvc(long_run, "repro", exit_code=255)
    run_dvc(long_run, "repro", "train", ENCORE_RESUME_OTHER_CODE="1")
    code = json.loads((long_run / "model/encore.json").read_text())["code"]
    assert [entry["from_iter"] > 0 for entry in code] == [False, True]
    assert code[0]["sha256"] != code[1]["sha256"]
