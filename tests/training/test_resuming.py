"""The same bits however a run was interrupted: stopped, killed, with a full disk, under other code."""

import errno
import itertools
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from encore.errors import Interrupted
from encore.training import checkpoint
from encore.training.checkpoint import find_newest
from tests.conftest import MODERN
from tests.small_runs import NO_STOP, StopAfter, assert_same, run, small_machine, trainer_in, weights_of

pytestmark = pytest.mark.slow


@pytest.fixture
def make_trainer(tmp_path, tokens_folder, tiny_params):
    """Makes a trainer as the stage does, in a working directory for each run; the same name goes on with a run."""
    with small_machine():
        yield lambda run, **changes: trainer_in(
            tmp_path / run, tokens_folder, tiny_params(**{"dtype": "float32", **changes})
        )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.2},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        MODERN,
        {**MODERN, "architecture": "nanochat-plus"},
    ],
    ids=str,
)
def test_two_runs_are_bitwise_equal_and_so_are_interrupted_ones(make_trainer, changes):
    """Stopped off the checkpoints' interval, and once more after that."""
    undisturbed = run(make_trainer("undisturbed", **changes))
    assert_same(run(make_trainer("again", **changes)), undisturbed)

    for stop_at in (1, 3):
        trainer = make_trainer(f"stopped at {stop_at}", **changes)
        with pytest.raises(Interrupted, match=f"^SIGTERM: saved at iteration {stop_at} of 6") as stopped:
            trainer.run(StopAfter(trainer, stop_at))
        assert stopped.value.exit_code == 143
        trainer = make_trainer(f"stopped at {stop_at}", **changes)
        assert trainer.iter == stop_at
        with pytest.raises(Interrupted):
            trainer.run(StopAfter(trainer, 5))
        assert_same(run(make_trainer(f"stopped at {stop_at}", **changes)), undisturbed)


def test_a_killed_run_does_the_lost_steps_again(make_trainer, monkeypatch):
    undisturbed = run(make_trainer("undisturbed", dropout=0.2))
    trainer = make_trainer("killed", dropout=0.2)
    evaluate = trainer.evaluate

    def die_at_the_end():
        evaluate()
        if trainer.iter == 6:
            os.remove("training.log")
            raise MemoryError

    monkeypatch.setattr(trainer, "evaluate", die_at_the_end)
    with pytest.raises(MemoryError):
        run(trainer)
    resumed = make_trainer("killed", dropout=0.2)
    assert resumed.iter == 4
    assert_same(run(resumed), undisturbed)


class StopAtReading:
    """A StopRequest whose signal has come when it is looked at for the `first`-th time."""

    def __init__(self, first):
        self.first, self.readings = first, 0

    @property
    def signal_number(self):
        self.readings += 1
        return signal.SIGTERM if self.readings >= self.first else None


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_whenever_the_signal_comes_what_the_message_says_is_saved(make_trainer, first):
    trainer = make_trainer("run", checkpoint_interval=100)
    with pytest.raises(Interrupted, match=r"^SIGTERM: saved at iteration \d of 6") as stopped:
        trainer.run(StopAtReading(first))
    saved = find_newest(trainer.checkpoints, 6).state["iter"]
    assert saved == trainer.iter <= first
    assert f"saved at iteration {saved} of 6" in str(stopped.value)


def fill_disk(monkeypatch, at):
    """Fails to write the checkpoint that is the `at`-th to be begun, half-way."""
    write, begun = checkpoint.save_tensors, []

    def fail(path, tensors):
        begun.append(path)
        if path.name == checkpoint.MODEL and [each.name for each in begun].count(checkpoint.MODEL) == at:
            path.write_bytes(b"half of i")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "save_tensors", fail)


@pytest.mark.parametrize(("at", "whole"), [(2, ["iter-0000002"]), (3, ["iter-0000002", "iter-0000004"])])
def test_a_disk_that_fills_ends_the_run_and_the_next_goes_on_from_what_is_whole(make_trainer, monkeypatch, at, whole):
    """At the second checkpoint, which the third finds out, and at the last."""
    undisturbed = run(make_trainer("undisturbed", dropout=0.2))
    trainer = make_trainer("full", dropout=0.2)
    with monkeypatch.context() as patch:
        fill_disk(patch, at)
        with pytest.raises(OSError, match="No space left") as error:
            run(trainer)
    assert error.value.errno == errno.ENOSPC
    assert sorted(path.name for path in trainer.checkpoints.iterdir()) == whole
    resumed = make_trainer("full", dropout=0.2)
    assert resumed.iter == int(whole[-1].removeprefix("iter-"))
    assert_same(run(resumed), undisturbed)


def test_a_stopped_run_does_not_say_saved_where_the_disk_was_full(make_trainer, monkeypatch):
    trainer = make_trainer("run", checkpoint_interval=100)
    fill_disk(monkeypatch, at=1)
    with pytest.raises(OSError, match="No space left"):
        trainer.run(StopAfter(trainer, 3))


def test_a_run_that_fails_waits_for_the_checkpoint_that_is_being_written(make_trainer, monkeypatch):
    trainer, failed = make_trainer("run"), threading.Event()
    step, write = trainer.step, checkpoint.save_tensors

    def fail_at_the_third():
        if trainer.iter == 2:
            failed.set()
            raise MemoryError
        step()

    def write_after_that(path, tensors):
        if not failed.wait(timeout=20):
            raise TimeoutError("training waits for the disk")
        write(path, tensors)

    monkeypatch.setattr(trainer, "step", fail_at_the_third)
    monkeypatch.setattr(checkpoint, "save_tensors", write_after_that)
    with pytest.raises(MemoryError):
        trainer.run(NO_STOP)
    assert [path.name for path in trainer.checkpoints.iterdir()] == ["iter-0000002"]
    assert find_newest(trainer.checkpoints, 6).state["iter"] == 2


@pytest.mark.parametrize("kept", [1, 3])
def test_there_are_never_more_checkpoints_than_are_kept_and_the_one_being_written(make_trainer, monkeypatch, kept):
    trainer = make_trainer("run", checkpoint_interval=1, keep_checkpoints=kept)
    write, counts = checkpoint.write_sealed, []

    def count_and_write(path, value):
        counts.append(len(list(trainer.checkpoints.iterdir())))
        write(path, value)

    monkeypatch.setattr(checkpoint, "write_sealed", count_and_write)
    run(trainer)
    assert counts == [min(number, kept + 1) for number in (1, 2, 3, 4, 5, 6)]
    left = [f"iter-{number:07d}" for number in (1, 2, 3, 4, 5, 6)][-kept:]
    assert sorted(path.name for path in trainer.checkpoints.iterdir()) == left


def test_a_signal_during_the_last_step_lets_the_run_end(make_trainer):
    trainer = make_trainer("run")
    assert_same(run(trainer, StopAfter(trainer, 6)), run(make_trainer("other")))


def test_a_finished_run_that_is_taken_up_again_trains_no_further(make_trainer):
    finished = run(make_trainer("run"))
    trainer = make_trainer("run")
    trainer.step = None
    assert_same(run(trainer), finished)


def test_the_scaler_of_float16_goes_with_the_checkpoint(make_trainer):
    trainer = make_trainer("run", dtype="float16")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    with pytest.raises(Interrupted):
        trainer.run(StopAfter(trainer, 5))
    state = trainer.scaler.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (2.0**12, 1)
    assert make_trainer("run", dtype="float16").scaler.state_dict() == state


def test_an_overflow_of_float16_skips_the_update_and_scales_less(make_trainer):
    """Such a step has no norm to record, and its checkpoint is written like any other."""
    trainer = make_trainer("run", dtype="float16", max_iters=4)
    overflow = trainer.model.ln_f.weight.register_hook(lambda gradient: gradient * float("inf"))
    before, scale = weights_of(trainer), trainer.scaler.get_scale()
    with pytest.raises(Interrupted):
        trainer.run(StopAfter(trainer, 1))
    overflow.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(trainer).items())
    resumed = make_trainer("run", dtype="float16", max_iters=4)
    assert (resumed.iter, resumed.scaler.get_scale()) == (1, scale / 2)
    assert resumed.records.rows.train[0]["grad_norm"] is None
    run(resumed)
    assert all(tensor.isfinite().all() for tensor in weights_of(resumed).values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights_of(resumed).items())


@pytest.fixture
def count_seconds(monkeypatch):
    """Puts a clock into the trainer on which only its own steps take time: 100 s its first, then 1 s, 2 s, 3 s..."""

    def count(trainer):
        now, seconds, forward = [0.0], itertools.chain([100.0], itertools.count(1.0)), trainer.forward

        def slow(*batch):
            now[0] += next(seconds)
            return forward(*batch)

        trainer.forward = slow
        monkeypatch.setattr("encore.training.trainer.time", SimpleNamespace(perf_counter=lambda: now[0]))
        return trainer

    return count


@pytest.mark.parametrize(
    ("stop_at", "seconds"),
    [
        (None, [1, 2.5, 4.5]),
        (1, [100, 1.5, 3.5]),  # both steps were the first of a process
        (2, [1, 1, 2.5]),
        (3, [1, 2, 1.5]),
        (5, [1, 2.5, 4]),
    ],
)
def test_the_first_step_of_a_process_counts_for_speed_only_where_it_is_alone(
    make_trainer, count_seconds, stop_at, seconds
):
    changes = {"gradient_accumulation_steps": 1, "log_interval": 2, "checkpoint_interval": 100}
    if stop_at:
        trainer = count_seconds(make_trainer("run", **changes))
        with pytest.raises(Interrupted):
            trainer.run(StopAfter(trainer, stop_at))
    trainer = count_seconds(make_trainer("run", **changes))
    run(trainer)
    assert [row["ms_per_iter"] / 1e3 for row in trainer.records.rows.speed] == seconds


def test_the_speed_of_a_last_row_comes_with_the_checkpoint(make_trainer, count_seconds, monkeypatch):
    """A run that was killed before the row that its end gives it, and that has no step left to take the time of."""
    for iterations, seconds in ((1, 100), (3, 1.5)):
        changes = {"gradient_accumulation_steps": 1, "log_interval": 5, "max_iters": iterations}
        killed = count_seconds(make_trainer(f"{iterations}", **changes))
        monkeypatch.setattr(killed, "end_curves", lambda: None)
        killed.run(NO_STOP)
        trainer = count_seconds(make_trainer(f"{iterations}", **changes))
        trainer.step = None
        run(trainer)
        assert [row["ms_per_iter"] / 1e3 for row in trainer.records.rows.speed] == [seconds]


def test_going_on_under_other_code_is_on_record(make_trainer, monkeypatch):
    trainer = make_trainer("run")
    trainer.code = [{"from_iter": 0, "sha256": "e" * 64}]
    with pytest.raises(Interrupted):
        trainer.run(StopAfter(trainer, 3))
    monkeypatch.setenv("ENCORE_RESUME_OTHER_CODE", "1")
    resumed = make_trainer("run")
    today = resumed.code[-1]["sha256"]
    assert resumed.code == [{"from_iter": 0, "sha256": "e" * 64}, {"from_iter": 3, "sha256": today}]
    run(resumed)
    assert find_newest(resumed.checkpoints, 6).state["code"] == resumed.code
    monkeypatch.delenv("ENCORE_RESUME_OTHER_CODE")
    assert make_trainer("run").code == resumed.code
