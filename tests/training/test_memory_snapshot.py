"""ENCORE_MEMORY_SNAPSHOT: what is asked of torch.cuda.memory and when, by a stand-in: here is no GPU."""

from pathlib import Path

import pytest
import torch

from encore.training import trainer as training
from encore.training.memory_snapshot import memory_recorder
from tests.small_runs import assert_same, run, small_machine, trainer_in

CUDA = torch.device("cuda")


@pytest.fixture
def calls(monkeypatch):
    """What was asked of torch.cuda.memory; a snapshot is a file with one letter."""
    asked = []

    def dump(path):
        Path(path).write_text("a")
        asked.append(Path(path).name)

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: asked.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return asked


@pytest.fixture
def pretended(tmp_path, tokens_folder, tiny_params, calls, monkeypatch):
    """Makes a trainer on the CPU whose memory is recorded as if it were on a GPU; the steps are among the calls."""
    monkeypatch.setenv("ENCORE_MEMORY_SNAPSHOT", str(tmp_path / "memory"))
    monkeypatch.setattr(training, "memory_recorder", lambda iter, first, device: memory_recorder(iter, first, CUDA))

    def make(name, failing_after=None, error=None, **changes):
        trainer = trainer_in(tmp_path / name, tokens_folder, tiny_params(dtype="float32", **changes))
        step = trainer.step

        def noted_step():
            if trainer.iter == failing_after:
                raise error
            step()
            calls.append(trainer.iter)

        monkeypatch.setattr(trainer, "step", noted_step)
        return trainer

    with small_machine():
        yield make


START, END = {"max_entries": 100_000, "stacks": "python"}, {"enabled": None}


def test_a_snapshot_behind_the_profiled_steps_and_the_same_run(pretended, calls, tmp_path, monkeypatch, capfd):
    recorded = run(pretended("recorded", max_iters=9))
    assert calls == [START, 1, 2, 3, 4, 5, 6, 7, "steps-1-7.pickle", 8, 9, END]
    path = tmp_path / "memory/steps-1-7.pickle"
    assert list(path.parent.iterdir()) == [path]
    note = f"{path} has a snapshot of the GPU's memory; https://pytorch.org/memory_viz opens it"
    assert capfd.readouterr().err.count(f"encore: note: ENCORE_MEMORY_SNAPSHOT: {note}\n") == 1
    monkeypatch.delenv("ENCORE_MEMORY_SNAPSHOT")
    assert_same(run(pretended("plain", max_iters=9)), recorded)


def test_a_resumed_run_names_its_own_steps(pretended, calls):
    run(pretended("run", max_iters=2, lr_decay_iters=12))
    calls.clear()
    run(pretended("run", max_iters=12, lr_decay_iters=12))
    assert calls == [START, *range(3, 10), "steps-3-9.pickle", 10, 11, 12, END]


def test_memory_that_runs_out_leaves_a_snapshot(pretended, calls):
    with pytest.raises(torch.OutOfMemoryError):
        run(pretended("run", failing_after=2, error=torch.OutOfMemoryError("CUDA out of memory")))
    assert calls == [START, 1, 2, "out-of-memory-after-step-2.pickle", END]


def test_another_error_leaves_none(pretended, calls):
    with pytest.raises(ValueError, match="other"):
        run(pretended("run", failing_after=2, error=ValueError("other")))
    assert calls == [START, 1, 2, END]


def test_without_cuda_one_sentence_says_so(tiny_params, tokens_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ENCORE_MEMORY_SNAPSHOT", str(tmp_path / "memory"))
    with small_machine():
        run(trainer_in(tmp_path / "run", tokens_folder, tiny_params(dtype="float32", max_iters=1)))
    sentence = "only the memory of a CUDA GPU is recorded, and this run is on cpu; it goes on without"
    assert capfd.readouterr().err == f"encore: note: ENCORE_MEMORY_SNAPSHOT: {sentence}\n"
    assert not (tmp_path / "memory").exists()


def test_the_other_ranks_record_nothing(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("ENCORE_MEMORY_SNAPSHOT", str(tmp_path / "memory"))
    with memory_recorder(0, False, CUDA) as recorder:
        assert recorder is None
    assert calls == []


def test_torch_has_what_is_called():
    """Its names begin with an underscore, so a new version may change them."""
    import inspect

    options = inspect.signature(torch.cuda.memory._record_memory_history).parameters
    assert {"enabled", "max_entries", "stacks"} <= set(options)
    assert next(iter(inspect.signature(torch.cuda.memory._dump_snapshot).parameters)) == "filename"
