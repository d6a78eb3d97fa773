"""wandb for real, against a server of its protocol on loopback: an interrupted run is one curve there, and the stage
evaluate adds to it."""

import ast
import html
import json
import re
import shutil
import signal
import subprocess
import sys

import pytest

from encore.download.task_data import fetch_tasks
from tests.conftest import ROOT, TINY, pipeline_environment, write_page
from tests.wandb_server import ENTITY, serving

pytest.importorskip("wandb")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forking")]

PAGE = {**TINY, "max_iters": 10, "eval_interval": 5, "checkpoint_interval": 4, "start": "ab", "num_samples": 2}
# Trains; in the step after iteration N, a while after wandb was given row N - 1, comes the signal. Or trains and
# evaluates.
STAGES = """
import os, sys, time
from encore.training.trainer import Trainer
from stages import evaluate, train

step = Trainer.step

def interrupted_step(trainer):
    if trainer.iter == int(sys.argv[2]):
        while trainer.records._wandb.record["iter"] < trainer.iter - 1:
            time.sleep(0.01)
        time.sleep(1.5)
        os.kill(os.getpid(), int(sys.argv[3]))
    step(trainer)

if len(sys.argv) > 2:
    Trainer.step = interrupted_step
train.run_stage(train.main)
evaluate.run_stage(evaluate.main)
"""


@pytest.fixture
def stages(tmp_path, tokens_folder):
    """Runs the stages in tmp_path, with the server's address and all that wandb writes in there."""
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    write_page(tmp_path / "params.yaml", **PAGE)
    fetch_tasks([], tokens_folder.parent / "tasks")

    def run(url, arguments, exit_code=0, **environment):
        folders = {f"WANDB_{name}": str(tmp_path) for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR")}
        key = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "local".ljust(40, "0"), "HOME": str(tmp_path)}
        key["WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL"] = "1"  # second; 15 unless told
        settings = {"ENCORE_DEVICE": "cpu", "PYTHONPATH": str(ROOT), **folders, **key, **environment}
        command = [sys.executable, *map(str, arguments)]
        environment = pipeline_environment(**settings)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == exit_code, done.stderr
        return done.stderr

    return run


def training(*interruption):
    return ["-c", STAGES, "stages.train", *interruption]


def read_tsv(path):
    header, *rows = (line.split("\t") for line in path.read_text().splitlines())
    return [dict(zip(header, map(float, row), strict=True)) for row in rows]


def expected_rows(folder):
    """One row for each iteration, of the files that the stage leaves."""
    rows = {}
    for row in read_tsv(folder / "metrics/train.tsv"):
        rows[row["iter"]] = {"train/step_loss": row["loss"], "lr": row["lr"], "train/grad_norm": row["grad_norm"]}
    for row in read_tsv(folder / "metrics/eval.tsv"):
        rows.setdefault(row["iter"], {}).update({"train/loss": row["train_loss"], "val/loss": row["val_loss"]})
    return [{"iter": iteration, **rows[iteration]} for iteration in sorted(rows)]


def check_run(server, folder):
    """What the server has is one curve with each iteration once, the config, and all that evaluate has found."""
    assert server.errors == []
    (run,) = server.runs.values()
    assert run.project == "encore"
    assert [row["_step"] for row in run.history] == list(range(11))
    clocks = ("tokens_per_second",)  # no mfu on a CPU
    assert [{key: row[key] for key in row if key not in clocks} for row in run.rows()] == expected_rows(folder)
    assert [sorted(set(clocks) & set(row)) for row in run.rows()] == [[], *[sorted(clocks)] * 10]
    assert {key: run.settings[key] for key in ("n_layer", "max_iters", "devices")} == {
        "n_layer": 2,
        "max_iters": 10,
        "devices": 1,
    }

    metrics, evaluation = (json.loads((folder / f"metrics/{name}.json").read_text()) for name in ("metrics", "eval"))
    expected = {f"eval/{key}": value for key, value in evaluation["eval"].items() if value is not None}
    expected |= {"train/loss": metrics["train"]["loss"], "val/loss": metrics["val"]["loss"], "iter": 10}
    expected |= {"train/step_loss": run.history[-1]["train/step_loss"]}
    assert {key: run.summary[key] for key in expected} == expected
    table = json.loads(run.files[run.summary["samples"]["path"]])
    assert table["columns"] == ["prompt", "sample"]
    samples = (folder / "metrics/samples.md").read_text()
    assert len(table["data"]) == 2
    for prompt, sample in table["data"]:
        assert prompt == "ab"
        assert f"~\n{prompt.lstrip('~')}{sample}" in samples or f"text\n{prompt}{sample}\n" in samples
    return run


def documented_steps():
    """The last column of the table in docs/watching.md."""
    rows = re.findall(r"^\| (?:killed|resumed) .*\| (\d+) to (\d+) \|$", (ROOT / "docs/watching.md").read_text(), re.M)
    return [list(range(int(first), int(last) + 1)) for first, last in rows]


def read_samples(log):
    """(iteration, text) of the samples in training.log."""
    found = re.findall(r"^iter (\d+): sample: (.*)$", log.read_text(), re.M)
    return [(int(iteration), ast.literal_eval(text)) for iteration, text in found]


def models(server):
    return [artifact for artifact in server.artifacts if artifact.type == "model"]


def test_a_run_killed_and_stopped_online_is_one_curve(stages, tmp_path):
    after_kill, after_stop, after_end = documented_steps()
    with serving() as server:
        stages(server.url, training(6, int(signal.SIGKILL)), -signal.SIGKILL, WANDB_MODE="online")
        (run,) = server.runs.values()
        assert [row["iter"] for row in run.rows()] == after_kill  # 5 and 6 will be done again
        stopped = stages(server.url, training(6, int(signal.SIGTERM)), 143, WANDB_MODE="online")
        assert "SIGTERM: saved at iteration 7 of 10" in stopped
        assert [row["iter"] for row in run.rows()] == after_stop
        error = stages(server.url, training(), WANDB_MODE="online")
        run = check_run(server, tmp_path)
    assert [row["_step"] for row in run.history] == after_end
    assert run.exit_codes == [1, 0, 0]  # stopped, trained, evaluated; who is killed says nothing
    assert error.count(f"encore: note: wandb: {server.url}/{ENTITY}/encore/runs/{run.id}\n") == 2
    assert models(server) == []


def test_a_run_killed_offline_is_one_curve_after_wandb_sync(stages, tmp_path):
    nowhere = "http://127.0.0.1:9"
    stages(nowhere, training(6, int(signal.SIGKILL)), -signal.SIGKILL, WANDB_MODE="offline")
    error = stages(nowhere, training(), WANDB_MODE="offline", WANDB_LOG_MODEL="true")
    folders = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("wandb/offline-run-*"))
    assert len(folders) == 2  # training's and evaluate's
    for folder in folders:
        assert f"encore: note: wandb: {folder} holds the run; `wandb sync {folder}` sends it\n" in error
    with serving() as server:
        stages(server.url, ["-m", "wandb", "sync", *folders])
        check_run(server, tmp_path)
    (model,) = models(server)
    assert model.committed
    assert model.files == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}


def test_samples_of_a_run_that_was_killed_are_there_once_each(stages, tmp_path):
    samples = {"WANDB_MODE": "online", "ENCORE_SAMPLE_INTERVAL": "3", "ENCORE_SAMPLE_PROMPT": "<b>"}
    with serving() as server:
        stages(server.url, training(7, int(signal.SIGKILL)), -signal.SIGKILL, **samples)
        stages(server.url, training(), **samples)
        assert server.errors == []
        (run,) = server.runs.values()
    assert [row["_step"] for row in run.history] == list(range(11))
    pages = [(row["iter"], run.files[row["sample"]["path"]].decode()) for row in run.rows() if "sample" in row]
    expected = read_samples(tmp_path / "training.log")
    assert [iteration for iteration, _ in expected] == [3, 6, 9]
    assert [iteration for iteration, _ in pages] == [3, 6, 9]
    for (_, page), (_, text) in zip(pages, expected, strict=True):
        assert text.startswith("<b>")
        assert f"<pre>{html.escape(text)}</pre>" in page
