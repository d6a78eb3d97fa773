"""encore/report/pipeline_graph.py: what the history says of the stages, and how they are drawn."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from encore.report import pipeline_graph
from tests.sealed import with_seal

PIPELINE = {
    "check": {"outs": ["checked"]},
    "load": {"deps": ["checked", "code.py"], "outs": ["raw.txt", "init.txt"]},
    "count": {"deps": ["raw.txt"], "metrics": [{"count.json": {"cache": False}}]},
    "train": {"deps": ["raw.txt", "init.txt"], "outs": ["model.txt"], "plots": [{"loss.tsv": {"cache": False}}]},
    "judge": {"deps": ["raw.txt", "model.txt"], "metrics": ["judge.json"]},
}


def line(stage: str, witness: str, content: str, run: str, pid: int = 7) -> dict[str, Any]:
    """A line of the history, of a stage that wrote `content` in the dvc that started at second `run`."""
    started = f"2026-01-01T00:00:{run}+00:00"
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return {
        "stage": stage,
        "started": started,
        "seconds": 1.5,
        "run": {"pid": pid, "started": started},
        "witness": witness,
        "sha256": sha256,
    }


def test_the_history_says_what_ran_and_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("checked", "raw.txt", "count.json", "model.txt", "judge.json"):
        Path(name).write_text(name)
    history = [
        line("check", "checked", "checked", "10"),
        line("load", "raw.txt", "raw.txt", "10"),
        line("train", "model.txt", "model.txt", "10"),
        line("judge", "judge.json", "judge.json", "40", pid=8),  # the same number of seconds, another process
        line("train", "model.txt", "of other parameters", "40"),
        line("count", "count.json", "count.json", "40.300"),  # the same process, its start read 0.3 s later
        line("check", "checked", "checked", "40"),
    ]
    stages = {stage.name: stage for stage in pipeline_graph.read_stages(PIPELINE, history)}
    assert {name: stage.status for name, stage in stages.items()} == {
        "check": "ran",
        "load": "cached",
        "count": "ran",
        "train": "cached",
        "judge": "cached",
    }
    assert f"{stages['train'].started:%S}" == "10"
    assert stages["judge"].reads == ["raw.txt", "model.txt"]
    assert stages["train"].writes == ["model.txt", "loss.tsv"]
    assert {stage.status for stage in pipeline_graph.read_stages(PIPELINE, [])} == {"elsewhere"}


def test_the_drawing_has_the_arrows_that_no_others_imply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drawing = pipeline_graph.draw(pipeline_graph.read_stages(PIPELINE, []))
    arrows = {(before.stage.name, after.stage.name) for before, after in drawing.arrows}
    assert arrows == {("check", "load"), ("load", "count"), ("load", "train"), ("train", "judge")}
    rows = {box.stage.name: box.y for box in drawing.boxes}
    assert rows["check"] < rows["load"] < rows["count"] == rows["train"] < rows["judge"]
    assert all(box.x >= 0 and box.x + box.width <= drawing.width for box in drawing.boxes)
    assert max(rows.values()) + pipeline_graph.BOX_HEIGHT < drawing.height


def test_a_damaged_history_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ENCORE_SCRATCH", str(tmp_path))
    old = line("train", "model.txt", "x", "10")  # as Encore wrote it before there were seals
    good = with_seal(old)
    flipped = json.dumps(good).replace('"seconds": 1.5', '"seconds": 9.5')
    lines = [json.dumps(good), '{"stage": "tra', "[]", "{}", flipped, json.dumps(old)]
    (tmp_path / "history.jsonl").write_text("".join(f"{each}\n" for each in lines))
    assert pipeline_graph.read_history() == [good, old]
    numbers = re.findall(r"history\.jsonl, line (\d), is damaged", capsys.readouterr().err)
    assert numbers == ["2", "3", "4", "5"]
