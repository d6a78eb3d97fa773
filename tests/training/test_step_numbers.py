"""The numbers of a step, read while the next is being computed."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from encore.errors import EncoreError
from encore.training.step_numbers import StepNumbers


def windows_of(step):
    return np.arange(step, step + 20)


def read(loss, norm, overflow_allowed=False):
    return StepNumbers.begin_copy(7, 2e-3, overflow_allowed, torch.tensor([loss, norm])).read(windows_of)


def test_the_numbers_are_those_of_the_step():
    assert read(2.5, 0.75) == {"loss": 2.5, "lr": 2e-3, "grad_norm": 0.75}


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_named_with_its_windows(loss, norm):
    sentence = (
        f"iteration 7: the loss is {loss} and the gradient's norm {norm} at learning rate 0.002, in windows 6, 7, 8, "
        "9, 10, 11, 12, 13, ... of the train split; the last checkpoint is whole. Lower learning_rate or set dtype: "
        "float32"
    )
    with pytest.raises(EncoreError) as error:
        read(loss, norm)
    assert str(error.value) == sentence


def test_an_overflow_that_is_allowed_has_no_norm():
    assert read(2.5, math.inf, overflow_allowed=True) == {"loss": 2.5, "lr": 2e-3, "grad_norm": None}
    with pytest.raises(EncoreError, match="the loss is nan"):
        read(math.nan, math.inf, overflow_allowed=True)


def test_a_gpu_copies_at_once_and_is_waited_for_only_when_the_numbers_are_read(monkeypatch):
    """With stand-ins: the copy is launched, an event is recorded behind it, and the event is waited for first."""
    done = []

    class Numbers:
        is_cuda, device = True, "cuda:1"

        def to(self, device, non_blocking):
            done.append(("copy", device, non_blocking))
            return SimpleNamespace(tolist=lambda: done.append("read") or [2.5, 0.75])

    event = SimpleNamespace(
        record=lambda stream: done.append(f"record on {stream}"), synchronize=lambda: done.append("wait")
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    launched = StepNumbers.begin_copy(7, 2e-3, False, Numbers())
    assert done == [("copy", "cpu", True), "record on the stream of cuda:1"]
    assert launched.read(windows_of)["loss"] == 2.5
    assert done[2:] == ["wait", "read"]
