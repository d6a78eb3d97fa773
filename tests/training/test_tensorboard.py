"""ENCORE_TENSORBOARD: what TensorBoard reads of a run that was stopped and resumed is the run's own rows."""

import sys

import pytest

from tests.small_runs import run, small_machine, trainer_in

pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def read(folder):
    """The points of each curve, (iter, value) each, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_resumed_run_has_each_iteration_once(tiny_params, tokens_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ENCORE_TENSORBOARD", str(tmp_path / "runs"))
    params = tiny_params(dtype="float32", max_iters=8, checkpoint_interval=3)
    with small_machine():
        stopped = trainer_in(tmp_path / "run", tokens_folder, params)
        for _ in range(5):  # two of them behind no checkpoint
            stopped.step()
            stopped.log()
            if stopped.iter == 3:
                stopped.save()
                stopped.saver.finish()
        stopped.records.break_off()
        resumed = trainer_in(tmp_path / "run", tokens_folder, params)
        assert resumed.iter == 3
        run(resumed)
        resumed.records.break_off()
    rows = resumed.records.rows
    found = read(tmp_path / "runs" / resumed.checkpoints.name)
    assert set(found) == {
        "lr",
        "mfu",
        "tokens_per_second",
        "train/step_loss",
        "train/grad_norm",
        "train/loss",
        "val/loss",
    }
    assert found["train/step_loss"] == [(row["iter"], pytest.approx(row["loss"])) for row in rows.train]
    assert [iter for iter, _ in found["train/step_loss"]] == list(range(1, 9))
    assert found["val/loss"] == [(row["iter"], pytest.approx(row["val_loss"])) for row in rows.eval]
    place = tmp_path / "runs" / resumed.checkpoints.name
    assert capfd.readouterr().err.count(f"encore: note: ENCORE_TENSORBOARD: {place} has the curves; ") == 2


def test_without_tensorboard_training_goes_on(tiny_params, tokens_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ENCORE_TENSORBOARD", str(tmp_path / "runs"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with small_machine():
        run(trainer_in(tmp_path / "run", tokens_folder, tiny_params(dtype="float32", max_iters=1)))
    assert "encore: note: ENCORE_TENSORBOARD: tensorboard is not installed (`pip install" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()
