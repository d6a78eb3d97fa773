"""commit.py: which changes make a commit dirty."""

import subprocess
from pathlib import Path

import pytest

from encore.pipeline.commit import describe_head
from tests.conftest import commit


def test_a_commit_is_dirty_where_code_or_parameters_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert describe_head() == "none"
    for command in (["init", "-q"], ["config", "user.name", "test"], ["config", "user.email", "test@localhost"]):
        subprocess.run(["git", *command], check=True)
    assert describe_head() == "none"
    for name in ("params.yaml", "encore/code.py", "dvc.lock", "metrics/eval.json", "metrics/train.tsv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    commit(tmp_path, "first")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout[:12]
    assert describe_head() == head

    # What DVC has removed or written by the time that training asks.
    (tmp_path / "metrics/eval.json").unlink()
    (tmp_path / "metrics/train.tsv").write_text("2")
    (tmp_path / "dvc.lock").write_text("2")
    (tmp_path / "report.html").write_text("new")
    assert describe_head() == head

    for name in ("params.yaml", "encore/code.py", "encore/new.py"):
        before = (tmp_path / name).read_text() if (tmp_path / name).exists() else None
        (tmp_path / name).write_text("2")
        assert describe_head() == f"{head}-dirty", name
        (tmp_path / name).unlink() if before is None else (tmp_path / name).write_text(before)
    assert describe_head() == head
