"""encore/report/revisions.py: what may be a name of an experiment or a commit."""

import re
import subprocess
from pathlib import Path

import pytest

from encore.errors import EncoreError
from encore.report.revisions import Revision, find_revision


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The working directory is a repository with one commit, whose hash this is."""
    monkeypatch.chdir(tmp_path)
    for command in (
        ["init", "-q"],
        ["-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "--allow-empty", "-m", "start"],
        ["branch", "a;b<i>$(c)&"],
    ):
        subprocess.run(["git", *command], check=True)
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", ["HEAD", "a;b<i>$(c)&", "HEAD^{commit}"])
def test_a_name_of_gits(repository: str, name: str) -> None:
    assert find_revision(name) == Revision(name, repository)


@pytest.mark.parametrize("name", ["--git-dir", "-h", "--output=x"])
def test_an_option_is_none(repository: str, name: str) -> None:
    with pytest.raises(EncoreError, match=rf"^there is no experiment or commit named {name}; there are workspace, "):
        find_revision(name)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "a\0b", "a\u202eb"])
def test_what_a_terminal_would_obey_is_no_name(repository: str, name: str) -> None:
    with pytest.raises(EncoreError, match=rf"^{re.escape(repr(name))} is no name of an experiment or commit; "):
        find_revision(name)
