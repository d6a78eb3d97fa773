"""wandb for real, without a network: an offline run is written and its file is read back."""

import json
import socket
import struct
import sys
import threading
from types import SimpleNamespace

import pytest

from encore.training import wandb_run
from encore.training.metrics import Records
from encore.training.wandb_run import WandbRun, start_wandb

wandb = pytest.importorskip("wandb")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The environment of an offline run; nothing is written outside the folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    wandb.teardown()  # it reads the environment once a process
    yield tmp_path
    wandb.teardown()


def read_chunks(data):
    """The records in a .wandb file: LevelDB's log format (7 bytes of header, blocks of 32 KiB) behind wandb's own 7."""
    position, parts = 7, []
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:  # what is left of a block is padding
            position += 2**15 - position % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def read_run(folder):
    """(run, history, summary, metrics' step names) of the only offline run in a folder."""
    from wandb.proto import wandb_internal_pb2 as protocol

    wandb.teardown()  # what writes the file is a process of its own
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    history, summary, metrics, run = [], {}, {}, None
    for chunk in read_chunks(data):
        record = protocol.Record()
        record.ParseFromString(chunk)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
        if kind == "metric":
            metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        if kind == "history":
            items = record.history.item
            history.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
        if kind == "summary":
            for item in record.summary.update:
                summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return run, history, summary, metrics


def test_an_offline_run_holds_config_history_and_summary(offline, capsys):
    run = start_wandb({"n_layer": 2, "learning_rate": 6e-4}, None)
    records = Records(offline / "metrics", offline / "training.log", run)
    for i in (1, 2):
        records.log_step(
            {"iter": i, "loss": 4.0 / i, "lr": 0.001 * i, "grad_norm": 0.5},
            {"iter": i, "ms_per_iter": 1.0, "tokens_per_second": 2.0, "tflops": 3.0, "mfu": 0.25},
            2,
            None,
            None,
        )
        records.log_eval({"iter": i, "train_loss": 3.0 / i, "val_loss": 3.5 / i})
    identity = records.state()["wandb_id"]
    records.finish({"iter": 2, "lr": 0.002, "mfu": 0.25, "train": {"loss": 1.5}, "val": {"loss": 1.75}})

    written, history, summary, metrics = read_run(offline)
    config = {item.key: json.loads(item.value_json) for item in written.config.update}
    assert written.run_id == identity
    assert written.project == "encore"
    assert {"n_layer": 2, "learning_rate": 6e-4}.items() <= config.items()
    assert metrics["*"] == "iter"

    rows = [{key: value for key, value in row.items() if not key.startswith("_")} for row in history]
    assert rows == [
        row
        for i in (1, 2)
        for row in (
            {
                "iter": i,
                "lr": 0.001 * i,
                "mfu": 0.25,
                "train/step_loss": 4.0 / i,
                "train/grad_norm": 0.5,
                "tokens_per_second": 2.0,
            },
            {"iter": i, "train/loss": 3.0 / i, "val/loss": 3.5 / i},
        )
    ]
    assert {"iter": 2, "lr": 0.002, "mfu": 0.25, "train/loss": 1.5, "val/loss": 1.75}.items() <= summary.items()
    assert capsys.readouterr().err == ""


def test_the_project_and_the_run_to_continue_can_be_named(offline, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "another")
    run = start_wandb({}, "run12345")
    assert run.id == "run12345"
    run.finish({})
    written = read_run(offline)[0]
    assert (written.run_id, written.project) == ("run12345", "another")


@pytest.mark.parametrize("mode", [None, "disabled", ""])
def test_wandb_is_off_unless_the_environment_asks(mode, monkeypatch, capsys):
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(wandb, "init", lambda **options: pytest.fail("wandb was started"))
    assert start_wandb({}, None) is None
    assert capsys.readouterr().err == ""


def test_the_old_word_for_offline_is_honoured(offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    run = start_wandb({}, "run12345")
    run.log({"iter": 1, "lr": 0.5})
    run.finish({})
    written, history, _, _ = read_run(offline)
    assert written.run_id == "run12345"
    assert [row["lr"] for row in history] == [0.5]


def test_a_mode_that_is_none_is_told(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    monkeypatch.setattr(wandb, "init", lambda **options: pytest.fail("wandb was started"))
    assert start_wandb({}, None) is None
    sentence = "WANDB_MODE=ofline is none of online, offline, run, dryrun; training goes on without wandb"
    assert capsys.readouterr().err == f"encore: note: {sentence}\n"


def test_a_wandb_that_is_not_installed_is_told_and_done_without(offline, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    start_wandb({}, None).finish({})
    error = capsys.readouterr().err
    assert error.startswith("encore: note: wandb did not start (")
    assert error.endswith("); training goes on without it\n")
    assert error.count("\n") == 1


def test_a_server_that_does_not_answer_costs_no_row(offline, monkeypatch, capsys):
    """Nobody listens there; the run is written offline instead."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setattr(wandb_run, "SECONDS_TO_START", 1.0)
        run = start_wandb({}, "run12345")
        run.log({"iter": 1, "lr": 0.5})
        run.finish({"iter": 1})
    assert "wandb's server cannot be reached" in capsys.readouterr().err
    written, history, summary, _ = read_run(offline)
    assert written.run_id == "run12345"
    assert [row["lr"] for row in history] == [0.5]
    assert summary["iter"] == 1


def act_on(calls, failing=None):
    """A stand-in for wandb's run that notes the calls; one of them fails."""

    def act(name):
        def action(*values):
            calls.append(name)
            if name == failing:
                raise RuntimeError("wandb is down")

        return action

    return SimpleNamespace(log=act("log"), summary=SimpleNamespace(update=act("summary")), finish=act("finish"))


@pytest.mark.parametrize("failing", ["log", "summary", "finish"])
def test_a_failing_wandb_is_told_once_and_never_raises(failing, capsys):
    calls = []
    run = WandbRun("name", lambda: act_on(calls, failing))
    run.log({"iter": 1})
    run.log({"iter": 2})
    run.finish({"iter": 2})
    expected = {"log": ["log"], "summary": ["log", "log", "summary"], "finish": ["log", "log", "summary", "finish"]}
    assert calls == expected[failing]
    assert capsys.readouterr().err == "encore: note: wandb failed (wandb is down); training goes on without it\n"


def test_a_wandb_that_hangs_is_not_waited_for(monkeypatch, capsys):
    calls, go_on = [], threading.Event()
    monkeypatch.setattr(wandb_run, "SECONDS_TO_FINISH", 0.05)

    def start():
        go_on.wait()
        return act_on(calls)

    run = WandbRun("name", start)
    run.log({"iter": 1})
    run.finish({})
    assert calls == []
    assert capsys.readouterr().err == (
        "encore: note: wandb has not ended the run in 0 s; `wandb sync` sends what lies in wandb/\n"
    )
    go_on.set()
    run._thread.join()
    assert calls == ["log", "summary", "finish"]


def test_calls_come_in_their_order(capsys):
    rows = []
    run = WandbRun("name", lambda: SimpleNamespace(log=rows.append, summary={}, finish=lambda: rows.append("end")))
    for i in range(100):
        run.log({"iter": i})
    run.finish({})
    assert rows == [*({"iter": i} for i in range(100)), "end"]
