"""encore/pipeline/stage_history.py: a line for each stage that has succeeded, and never a reason for one to fail."""

import hashlib
import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from encore.pipeline.stage_history import record_stage
from tests.conftest import ROOT, pipeline_environment

pytestmark = pytest.mark.usefixtures("forking")

STAGES = [
    "check",
    "count_tokens",
    "download",
    "download_tasks",
    "download_weights",
    "evaluate",
    "tokenize",
    "train",
]


def read_history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_line_says_when_how_long_and_of_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENCORE_SCRATCH", str(tmp_path / "scratch"))
    (tmp_path / "manifest.json").write_bytes(b"{}\n")
    started = time.time() - 90
    for _ in range(2):
        record_stage("download", tmp_path / "manifest.json", started)
    first, second = read_history(tmp_path / "scratch")
    assert first["stage"] == "download"
    assert datetime.fromisoformat(first["started"]).timestamp() == pytest.approx(started, abs=1e-3)
    assert first["started"].endswith("+00:00")
    assert 90 <= first["seconds"] < 150
    assert first["witness"] == (tmp_path / "manifest.json").as_posix()
    assert first["sha256"] == second["sha256"] == hashlib.sha256(b"{}\n").hexdigest()
    assert first["run"] == second["run"]


def test_the_dvc_that_started_a_stage_names_the_run(tmp_path: Path) -> None:
    """Two stages of one dvc, behind a shell, are of one run; a stage by itself is a run."""
    (tmp_path / "result").write_text("x")
    lines = ("from pathlib import Path", "from encore.pipeline.stage_history import record_stage")
    (tmp_path / "stage.py").write_text("\n".join([*lines, "record_stage('train', Path('result'), 0)"]))
    command = f"{sys.executable} stage.py; true"
    script = f"import os, subprocess\nfor _ in range(2): subprocess.run(['/bin/sh', '-c', {command!r}], check=True)\n"
    (tmp_path / "dvc").write_text(script + "print(os.getpid())\n")
    environment = pipeline_environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "dvc", "repro"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    alone = subprocess.Popen([sys.executable, "stage.py"], cwd=tmp_path, env=environment)
    assert alone.wait() == 0
    runs = [line["run"]["pid"] for line in read_history(tmp_path / ".encore")]
    # Where dvc itself runs these tests, it is the one that started the last stage too.
    assert runs[:2] == [int(done.stdout)] * 2
    assert runs[2] not in runs[:2]


def test_a_history_that_cannot_be_written_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ENCORE_SCRATCH", str(tmp_path / "file"))
    record_stage("train", tmp_path / "file", time.time())
    printed = capsys.readouterr()
    assert printed.err.startswith("encore: note: this run is not in history.jsonl (")
    assert printed.err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_whole_run_has_a_line_for_each_stage(finished: Path) -> None:
    history = read_history(finished / ".encore")
    assert sorted(line["stage"] for line in history) == STAGES
    assert len({line["run"]["pid"] for line in history}) == 1
    for line in history:
        assert hashlib.sha256((finished / line["witness"]).read_bytes()).hexdigest() == line["sha256"]
        assert 0 < line["seconds"] < 600


def run_train(repository: Path, **environment: str) -> int:
    command = [sys.executable, "-m", "stages.train"]
    env = pipeline_environment(ENCORE_DEVICE="cpu", **environment)
    return subprocess.run(command, cwd=repository, env=env, capture_output=True).returncode


def test_several_ranks_write_one_line(finished: Path) -> None:
    before = read_history(finished / ".encore")
    assert run_train(finished, ENCORE_TORCHRUN="--standalone --nproc-per-node=2") == 0
    after = read_history(finished / ".encore")
    assert after[: len(before)] == before
    assert [line["stage"] for line in after[len(before) :]] == ["train"]


def test_a_stage_that_fails_writes_none(finished: Path) -> None:
    before = read_history(finished / ".encore")
    os.remove(finished / "data" / "tokens" / "manifest.json")
    assert run_train(finished) == 1
    assert read_history(finished / ".encore") == before
