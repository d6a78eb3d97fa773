"""What make hands on: nothing in a variable of the command line is run, neither by make nor by the shell."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")

# Writes down its arguments, one a line with a mark before each.
PYTHON = """#!/bin/sh
for argument; do printf '>%s\\n' "$argument"; done >> arguments.txt
"""
NASTY = [
    "a b;touch ran",
    "a&&touch ran",
    "a|touch ran",
    "`touch ran`",
    "$(shell touch ran)",
    "$$(touch ran)",
    "$(touch ran)",
    "'; touch ran; '",
    '"; touch ran; "',
    "a\ntouch ran",
    "a > ran",
    "$(error stopped)",
    "* ? [a-z]*",
    "--out ran",
    "#a \\",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository whose set-up is done, with a Python that only writes down what it is asked."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.lock").touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    sources = ("encore/report/plots_page.py", "encore/report/vega.py")
    for name in (*sources, ".venv/ready", ".venv/bin/encore", ".dvc/plots_template.html"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".venv/bin/python").write_text(PYTHON)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def run_make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "GIT_"))}
    environment = {**inherited, "GIT_CEILING_DIRECTORIES": str(folder.parent), **environment}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def arguments_of(folder: Path) -> list[str]:
    return (folder / "arguments.txt").read_text().removeprefix(">").removesuffix("\n").split("\n>")


@pytest.mark.parametrize("origin", ["command line", "environment"])
@pytest.mark.parametrize("names", NASTY)
def test_a_name_is_handed_on_and_not_run(folder: Path, names: str, origin: str) -> None:
    if origin == "command line":
        done = run_make(folder, "report", f"EXPERIMENTS={names}")
    else:
        done = run_make(folder, "report", EXPERIMENTS=names)
    assert done.returncode == 0, done.stderr
    assert arguments_of(folder) == ["-m", "encore", "report", "--", *names.split()]
    assert not (folder / "ran").exists()


def test_without_names_there_are_none(folder: Path) -> None:
    assert run_make(folder, "report").returncode == 0
    assert arguments_of(folder) == ["-m", "encore", "report", "--"]


@pytest.mark.parametrize("python", ["./my python", "./it's python", "./$(shell touch ran)", "./a;touch ran"])
def test_a_python_of_any_name_is_started(folder: Path, python: str) -> None:
    (folder / ".venv/ready").unlink()
    shutil.copy(folder / ".venv/bin/python", folder / python)
    run_make(folder, "setup", f"PYTHON={python}")  # it ends at pip, which is not there
    assert arguments_of(folder)[-3:] == ["venv", "--clear", ".venv"]
    assert not (folder / "ran").exists()


def test_the_frame_of_the_curves_is_written_anew_where_its_source_is_newer(folder: Path) -> None:
    (folder / ".venv/bin/dvc").symlink_to("python")
    os.utime(folder / "encore/report/plots_page.py", (2**32, 2**32))
    assert run_make(folder, "setup").returncode == 0
    config = ["config", "--local", "plots.html_template", "plots_template.html"]
    assert arguments_of(folder) == ["-m", "encore.report.plots_page", *config]


@pytest.mark.parametrize("target", ["repro", "report"])
def test_a_folder_without_git_is_told_before_anything_is_installed(folder: Path, target: str) -> None:
    shutil.rmtree(folder / ".git")
    (folder / ".venv/ready").unlink()
    done = run_make(folder, target)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "encore: this folder is no git repository, which DVC needs: git clone it instead, or run here: git init "
    )
    assert done.stdout == ""
    assert not (folder / "arguments.txt").exists()
