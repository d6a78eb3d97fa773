"""What the tests of training share: runs of a small model, each in a folder of its own, and what must repeat."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from encore.devices import device
from encore.models.flops import Peak
from encore.params import StageParams
from encore.training.trainer import Trainer
from stages.train import prepare

NO_STOP: Any = SimpleNamespace(signal_number=None)
Result = tuple[dict[str, torch.Tensor], dict[str, bytes]]


@contextmanager
def small_machine() -> Iterator[None]:
    """One thread, a CPU whose peak needs no measuring, and a disk that nobody waits for.

    Threads of a busy machine wait for each other, for models this small much longer than they compute.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "find_peak", lambda device, dtype: Peak(1e12, "pretended"))
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setenv("ENCORE_DEVICE", "cpu")
        patch.chdir(Path.cwd())  # and back there at the end
        yield
    torch.set_num_threads(threads)


def enter(folder: Path, tokens_folder: Path) -> None:
    """Makes `folder`, with the tokens where the stage looks for them, the working directory."""
    if not folder.exists():
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "tokens").symlink_to(tokens_folder)
    os.chdir(folder)


def trainer_in(folder: Path, tokens_folder: Path, params: StageParams) -> Trainer:
    """A trainer as the stage makes it; in the same folder it goes on with the run."""
    enter(folder, tokens_folder)
    return prepare(params, folder / "checkpoints")


class StopAfter:
    """A StopRequest whose signal comes during a certain step."""

    def __init__(self, trainer: Trainer, iterations: int) -> None:
        self.trainer, self.iterations = trainer, iterations

    @property
    def signal_number(self) -> int | None:
        return signal.SIGTERM if self.trainer.iter >= self.iterations else None


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def run(trainer: Trainer, stop: Any = NO_STOP) -> Result:
    """Trains to the end; returns the weights and the bytes of the curves that must repeat."""
    folder = trainer.checkpoints.parent
    os.chdir(folder)
    trainer.run(stop)
    trainer.records.publish()
    return weights_of(trainer), {name: (folder / "metrics" / f"{name}.tsv").read_bytes() for name in ("train", "eval")}


def assert_same(actual: Result, expected: Result) -> None:
    weights, curves = actual
    assert [name for name in expected[1] if curves[name] != expected[1][name]] == []
    assert [name for name in expected[0] if not torch.equal(weights[name], expected[0][name])] == []


def read_curve(data: bytes, column: str) -> list[float]:
    header, *rows = (line.split("\t") for line in data.decode().splitlines())
    return [float(row[header.index(column)]) for row in rows]
