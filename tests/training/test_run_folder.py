"""Which run a checkpoint belongs to, one trainer at a time, and the code that makes it."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from encore.errors import EncoreError
from encore.training import run_folder
from encore.training.run_folder import find_other_schedule, fingerprint, locked
from tests.conftest import ROOT

HOLD_LOCK = """
import sys, time
from pathlib import Path
from encore.training.run_folder import locked
with locked(Path(sys.argv[1]), {"seed": 1}):
    print("held", flush=True)
    time.sleep(60)
"""
DATA = "a" * 64
FREE = ("max_iters", "checkpoint_interval", "keep_checkpoints")


def name_of(params, data_sha256=DATA, init_sha256=None, **changes):
    return fingerprint(run_folder.identity({**params, **changes}, data_sha256, init_sha256))


@pytest.fixture
def params(tiny_params):
    """The train stage's, 6 iterations long, with the end of the decay as a number."""
    return tiny_params(lr_decay_iters=6).as_dict()


def test_the_fingerprint_changes_with_the_data_and_every_parameter_that_changes_a_step(params):
    name = name_of(params)
    assert re.fullmatch("[0-9a-f]{16}", name)
    assert name_of(dict(reversed(params.items()))) == name
    assert {name_of(params, **{key: 7}) for key in FREE} == {name}
    others = [name_of(params, **{key: "other"}) for key in params if key not in FREE]
    assert len({name, name_of(params, "b" * 64), *others}) == len(params) - len(FREE) + 2


def test_the_fingerprint_changes_with_the_weights_that_training_starts_from(params):
    assert params["init_from"] == "scratch"
    starts = [None, "c" * 64, "d" * 64]
    assert [run_folder.identity(params, DATA, start)["init_sha256"] for start in starts] == starts
    assert len({name_of(params, init_sha256=start) for start in starts}) == 3
    assert name_of(params, "c" * 64, "d" * 64) != name_of(params, "d" * 64, "c" * 64)


def test_a_decay_that_follows_max_iters_is_one_that_ends_there(params):
    name = name_of(params)
    assert name_of(params, lr_decay_iters=None) == name
    assert name_of(params, lr_decay_iters=None, max_iters=7) == name_of(params, lr_decay_iters=7) != name
    assert name_of(params, lr_decay_iters=7, max_iters=9) == name_of(params, lr_decay_iters=None, max_iters=7)


@pytest.fixture
def make_run(tmp_path, params):
    """Makes a run's folder and returns it with the run's identity."""

    def make(data_sha256=DATA, init_sha256=None, **changes):
        identity = run_folder.identity({**params, **changes}, data_sha256, init_sha256)
        folder = tmp_path / fingerprint(identity)
        with locked(folder, identity):
            return folder, identity

    return make


def test_a_run_with_another_end_of_the_decay_is_found(make_run):
    mine = make_run(lr_decay_iters=None, max_iters=9)
    assert find_other_schedule(*mine) is None
    other, _ = make_run(lr_decay_iters=None, max_iters=4, checkpoint_interval=50, keep_checkpoints=9)
    assert find_other_schedule(*mine) == other
    assert find_other_schedule(other, make_run(lr_decay_iters=4)[1]) == mine[0]


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"n_layer": 3}, {"min_lr": 0.0}, {"data_sha256": "b" * 64}, {"init_sha256": "c" * 64}]
)
def test_a_run_that_differs_in_anything_else_is_not_found(make_run, changes):
    mine = make_run(lr_decay_iters=None, max_iters=9)
    make_run(lr_decay_iters=None, max_iters=4, **changes)
    make_run(**changes)
    assert find_other_schedule(*mine) is None


def test_no_run_is_found_among_what_is_none(make_run, tmp_path):
    folder, identity = make_run()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "older").mkdir()
    older = {key: value for key, value in identity.items() if key != "dtype"}
    (tmp_path / "older" / run_folder.IDENTITY).write_text(json.dumps({**older, "lr_decay_iters": 4}))
    assert find_other_schedule(folder, identity) is None
    assert find_other_schedule(tmp_path / "nowhere" / folder.name, identity) is None


def test_the_folder_says_what_its_name_is_the_hash_of(make_run):
    folder, identity = make_run()
    assert fingerprint(json.loads((folder / "run.json").read_text())) == folder.name
    assert (identity["lr_decay_iters"], identity["data_sha256"]) == (6, DATA)


def test_the_lock_refuses_a_second_trainer_and_goes_with_a_killed_one(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, tmp_path], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(EncoreError, match=rf"{tmp_path}: another trainer \(process {holder.pid}\)"),
            locked(tmp_path, {"seed": 2}),
        ):
            pass
        assert (tmp_path / "lock.pid").read_text() == str(holder.pid)
        assert json.loads((tmp_path / "run.json").read_text()) == {"seed": 1}
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert holder.returncode == -signal.SIGKILL
    with locked(tmp_path, {"seed": 1}):
        assert (tmp_path / "lock.pid").read_text() == str(os.getpid())
    assert not (tmp_path / "lock.pid").exists()


def test_the_lock_is_given_back_after_a_failure(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(tmp_path / "new", {}):
            raise ZeroDivisionError


def test_checkpoints_that_kills_cut_off_go_with_the_next_start_and_never_those_of_the_living(tmp_path):
    folder, stranger = tmp_path / "run", tmp_path / "other"
    for path in (folder / ".iter-0000004.partial", folder / ".iter-0000008.old", stranger / ".iter-0000004.partial"):
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"half")
    (folder / "iter-0000002").mkdir()
    with locked(folder, {}):
        assert sorted(path.name for path in folder.iterdir() if "iter" in path.name) == ["iter-0000002"]
        assert (stranger / ".iter-0000004.partial").exists()
        (folder / ".iter-0000006.partial").mkdir()
        with pytest.raises(EncoreError), locked(folder, {}):
            pass
        assert (folder / ".iter-0000006.partial").exists()
