"""A queued sweep, as docs/sweeps.md describes it."""

import csv
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import read_page, run_dvc
from tests.pipeline.test_pipeline import last_lr, stages_run


def wait_for_worker(repository: Path) -> None:
    """Until the queue is empty and its worker, a process in the background, has gone."""
    deadline = time.monotonic() + 300
    while "Worker status: 0 active, 0 idle" not in (status := run_dvc(repository, "queue", "status")):
        assert time.monotonic() < deadline, status
        time.sleep(2)  # the status takes a third of a second of a core


def test_a_sweep_trains_what_is_new_and_leaves_the_workspace_alone(finished):
    """Two learning rates, of which one has been run: it comes from the run cache."""
    known = read_page(finished / "params.yaml")["learning_rate"]
    trained_at = (finished / "model/model.safetensors").stat().st_mtime
    run_dvc(finished, "exp", "run", "--queue", "-n", "rate", "-S", f"learning_rate=6e-4,{known}")
    run_dvc(finished, "queue", "start", ENCORE_SCRATCH=str(finished / ".encore"))
    wait_for_worker(finished)

    new, old = (run_dvc(finished, "queue", "logs", f"rate-{number}") for number in (1, 2))
    assert stages_run(new) == ["check", "train", "evaluate"]
    assert stages_run(old) == []
    table = csv.DictReader(run_dvc(finished, "exp", "show", "--csv").splitlines())
    rows = {row["Experiment"]: row for row in table}
    assert {float(rows[f"rate-{number}"]["learning_rate"]) for number in (1, 2)} == {6e-4, known}
    assert rows["rate-1"]["val.loss"] != rows["rate-2"]["val.loss"]
    # DVC writes 0.0006, or 6e-05, which a YAML 1.1 reader takes for a string: here it was a number.
    assert float(rows["rate-1"]["lr"]) == pytest.approx(last_lr(6e-4, read_page()["min_lr"]))
    # One checkpoint folder for each run of training, outside the copies, which are gone.
    assert len(os.listdir(finished / ".encore/checkpoints")) == 2
    assert list((finished / ".dvc/tmp/exps").glob("tmp*")) == []
    assert (finished / "model/model.safetensors").stat().st_mtime == trained_at
    git = subprocess.run(["git", "status", "--porcelain"], cwd=finished, capture_output=True, text=True, check=True)
    assert git.stdout == ""
