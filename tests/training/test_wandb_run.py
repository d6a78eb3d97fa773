"""wandb for real, without a network: an offline run is written and its file is read back."""

import json
import shutil
import socket
import struct
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from encore.training import wandb_run
from encore.training.metrics import Records
from encore.training.wandb_evaluation import send_evaluation
from encore.training.wandb_run import RECORD, WandbRun, find_run, start_wandb

pytestmark = pytest.mark.slow

wandb = pytest.importorskip("wandb")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The environment of an offline run; nothing is written outside the folder, which is the working directory."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
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


def read_rows(history):
    """Without wandb's own columns."""
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in history]


def folder_of(run):
    """Where an offline run writes, as the note names it."""
    (path,) = Path("wandb").glob(f"offline-run-*-{run.record['id']}")
    return path


def test_an_offline_run_holds_config_history_and_summary(offline, capsys):
    run = start_wandb({"n_layer": 2, "learning_rate": 6e-4}, offline, resumed=False)
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
    records.finish({"iter": 2, "lr": 0.002, "mfu": 0.25, "train": {"loss": 1.5}, "val": {"loss": 1.75}}, "ab" * 32)

    written, history, summary, metrics = read_run(offline)
    config = {item.key: json.loads(item.value_json) for item in written.config.update}
    assert written.run_id == run.record["id"]
    assert written.project == "encore"
    assert {"n_layer": 2, "learning_rate": 6e-4}.items() <= config.items()
    assert metrics["*"] == "iter"

    assert [row["_step"] for row in history] == [1, 2]
    assert read_rows(history) == [
        {
            "iter": i,
            "lr": 0.001 * i,
            "mfu": 0.25,
            "train/step_loss": 4.0 / i,
            "train/grad_norm": 0.5,
            "tokens_per_second": 2.0,
            "train/loss": 3.0 / i,
            "val/loss": 3.5 / i,
        }
        for i in (1, 2)
    ]
    assert {"iter": 2, "lr": 0.002, "mfu": 0.25, "train/loss": 1.5, "val/loss": 1.75}.items() <= summary.items()
    folder = folder_of(run)
    assert capsys.readouterr().err == f"encore: note: wandb: {folder} holds the run; `wandb sync {folder}` sends it\n"


def test_the_project_can_be_named_and_a_resumed_run_stays_in_it(offline, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "another")
    first = start_wandb({}, offline, resumed=False)
    first.end()
    written = read_run(offline)[0]
    assert (written.run_id, written.project) == (first.record["id"], "another")
    monkeypatch.delenv("WANDB_PROJECT")
    monkeypatch.setenv("WANDB_MODE", "offline")
    second = start_wandb({}, offline, resumed=True)
    second.end()
    assert (second.record["id"], second.record["project"]) == (first.record["id"], "another")
    third = start_wandb({}, offline, resumed=False)
    third.end()
    assert third.record["id"] != first.record["id"]
    assert third.record["project"] == "encore"


def test_a_resumed_run_is_given_what_comes_after_the_rows_that_were_closed(offline):
    first = start_wandb({}, offline, resumed=False)
    for i in (1, 2, 3):
        first.log({"iter": i, "lr": 0.5})
    first.end(exit_code=1)
    shutil.rmtree("wandb")
    second = start_wandb({}, offline, resumed=True)
    for i in (1, 2, 3, 4, 5):
        second.log({"iter": i, "lr": 0.5})
    second.end()
    assert [row["iter"] for row in read_run(offline)[1]] == [4, 5]


@pytest.mark.parametrize("resumed", [True, False])
def test_a_folder_that_was_never_closed_is_removed_and_its_rows_are_given_again(resumed, offline):
    """wandb sync would stumble over it. Only the folder that the record names goes."""
    torn, other = offline / "wandb/offline-run-torn", offline / "wandb/offline-run-other"
    for folder in (torn, other):
        folder.mkdir(parents=True)
    record = {"id": "run12345", "project": "encore", "iter": 2, "open_folder": str(torn)}
    (offline / RECORD).write_text(json.dumps(record))
    run = start_wandb({}, offline, resumed)
    for i in (1, 2, 3, 4):
        run.log({"iter": i, "lr": 0.5})
    run.end()
    assert (torn.exists(), other.exists()) == (False, True)
    assert [row["iter"] for row in read_run(offline)[1]] == ([3, 4] if resumed else [1, 2, 3, 4])
    assert json.loads((offline / RECORD).read_text())["iter"] == 4
    assert "open_folder" not in json.loads((offline / RECORD).read_text())


def test_a_damaged_record_costs_the_run_s_name_and_no_row(offline):
    (offline / RECORD).write_text("{")
    run = start_wandb({}, offline, resumed=True)
    run.log({"iter": 7, "lr": 0.5})
    run.end()
    assert [row["iter"] for row in read_run(offline)[1]] == [7]


def test_a_run_is_found_by_its_model(offline):
    folder = offline / ".encore/checkpoints/0123456789abcdef"
    run = start_wandb({}, folder, resumed=False)
    run.finish({"iter": 1}, "ab" * 32)
    assert find_run("cd" * 32) is None
    found = find_run("ab" * 32)
    found.end()
    assert found.record == {**run.record, "summary": {"iter": 1}, "model_sha256": "ab" * 32}


def test_an_evaluation_without_a_run_is_told_and_done_without(offline, monkeypatch, capsys):
    send_evaluation(offline / "model", offline / "model/encore.json", {"eval": {"loss": 1.0}}, "ab", ["c"])
    sentence = "the model was not trained here with WANDB_MODE set, or trained again since"
    assert capsys.readouterr().err == f"encore: note: wandb gets no evaluation: {sentence}\n"
    monkeypatch.delenv("WANDB_MODE")
    send_evaluation(offline / "model", offline / "model/encore.json", {"eval": {"loss": 1.0}}, "ab", ["c"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mode", [None, "disabled", ""])
def test_wandb_is_off_unless_the_environment_asks(mode, tmp_path, monkeypatch, capsys):
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(wandb, "init", lambda **options: pytest.fail("wandb was started"))
    assert start_wandb({}, tmp_path, resumed=False) is None
    assert capsys.readouterr().err == ""


def test_the_old_word_for_offline_is_honoured(offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    run = start_wandb({}, offline, resumed=False)
    run.log({"iter": 1, "lr": 0.5})
    run.end()
    _, history, _, _ = read_run(offline)
    assert [row["lr"] for row in history] == [0.5]


def test_a_mode_that_is_none_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    monkeypatch.setattr(wandb, "init", lambda **options: pytest.fail("wandb was started"))
    assert start_wandb({}, tmp_path, resumed=False) is None
    sentence = "WANDB_MODE=ofline is none of online, offline, run, dryrun; the stage goes on without wandb"
    assert capsys.readouterr().err == f"encore: note: {sentence}\n"


def test_a_wandb_that_is_not_installed_is_told_and_done_without(offline, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    start_wandb({}, offline, resumed=False).end()
    error = capsys.readouterr().err
    assert error.startswith("encore: note: wandb did not start (")
    assert error.endswith("); the stage goes on without it\n")
    assert error.count("\n") == 1


def test_a_server_that_does_not_answer_costs_no_row(offline, monkeypatch, capsys):
    """Nobody listens there; the run is written offline instead."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setattr(wandb_run, "SECONDS_TO_START", 1.0)
        run = start_wandb({}, offline, resumed=False)
        run.log({"iter": 1, "lr": 0.5})
        run.finish({"iter": 1}, "ab" * 32)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("encore: note: wandb's server cannot be reached")
    folder = folder_of(run)
    assert second == f"encore: note: wandb: {folder} holds the run; `wandb sync {folder}` sends it"
    _, history, summary, _ = read_run(offline)
    assert [row["lr"] for row in history] == [0.5]
    assert summary["iter"] == 1


RECORDED = {"id": "run12345", "project": "encore", "iter": -1}


def act_on(calls, failing=None):
    """A stand-in for wandb's run that notes the calls; one of them fails."""

    def act(name):
        def action(*values, **options):
            calls.append(name)
            if name == failing:
                raise RuntimeError("wandb is down")

        return action

    return SimpleNamespace(log=act("log"), summary=SimpleNamespace(update=act("summary")), finish=act("finish"))


@pytest.mark.parametrize("failing", ["log", "summary", "finish"])
def test_a_failing_wandb_is_told_once_and_never_raises(failing, tmp_path, capsys):
    calls = []
    run = WandbRun(tmp_path, {**RECORDED}, lambda: act_on(calls, failing))
    run.log({"iter": 1})
    run.log({"iter": 2})
    run.finish({"iter": 2}, "ab" * 32)
    expected = {"log": ["log"], "summary": ["log", "log", "summary"], "finish": ["log", "log", "summary", "finish"]}
    assert calls == expected[failing]
    assert capsys.readouterr().err == "encore: note: wandb failed (wandb is down); the stage goes on without it\n"


def test_a_wandb_that_hangs_is_not_waited_for(tmp_path, monkeypatch, capsys):
    calls, go_on = [], threading.Event()
    monkeypatch.setattr(wandb_run, "SECONDS_TO_FINISH", 0.05)

    def start():
        go_on.wait()
        return act_on(calls)

    run = WandbRun(tmp_path, {**RECORDED}, start)
    run.log({"iter": 1})
    run.finish({}, "ab" * 32)
    assert calls == []
    assert capsys.readouterr().err == (
        "encore: note: wandb has not ended the run in 0 s; `wandb sync` sends what lies in wandb/\n"
    )
    go_on.set()
    run._thread.join()
    assert calls == ["log", "summary", "finish"]
    assert capsys.readouterr().err == ""


def test_what_fails_after_the_wait_is_not_told_again(tmp_path, monkeypatch, capsys):
    go_on = threading.Event()
    monkeypatch.setattr(wandb_run, "SECONDS_TO_FINISH", 0.05)

    def start():
        go_on.wait()
        raise RuntimeError("the process ends")

    run = WandbRun(tmp_path, {**RECORDED}, start)
    run.end()
    go_on.set()
    run._thread.join()
    assert capsys.readouterr().err.count("\n") == 1


def test_rows_come_in_their_order_and_those_of_an_iteration_as_one(tmp_path):
    rows = []

    def log(row, step, commit):
        rows.append((step, row, commit))

    run = WandbRun(
        tmp_path, {**RECORDED}, lambda: SimpleNamespace(log=log, finish=lambda exit_code: rows.append("end"))
    )
    for i in range(100):
        run.log({"iter": i, "lr": 0.5})
        if i % 2:
            run.log({"iter": i, "val/loss": 1.0 * i})
    run.end()
    odd = [{"iter": i, "lr": 0.5, **({"val/loss": 1.0 * i} if i % 2 else {})} for i in range(100)]
    assert rows == [*((row["iter"], row, True) for row in odd), "end"]
