"""Where a report reads from: the working tree, or a commit of git, which is what an experiment of DVC's is."""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from encore.errors import EncoreError
from encore.pipeline.commit import describe_head

WORKSPACE = "workspace"
EXPERIMENTS = "refs/exps"  # .../xx/xxxx.../NAME; the first two parts are the commit that it began from


@dataclass(frozen=True)
class Revision:
    """A state of the repository. commit: None for the working tree."""

    name: str
    commit: str | None

    def read(self, path: str) -> bytes | None:
        """A file that git has, or of the working tree any file; None where it is not there."""
        if self.commit is None:
            file = Path(path)
            return file.read_bytes() if file.is_file() else None
        done = subprocess.run(["git", "show", f"{self.commit}:./{path}"], capture_output=True)
        return done.stdout if done.returncode == 0 else None

    def read_output(self, path: str) -> bytes | None:
        """A file that DVC keeps, from its cache or remote; None where neither has it."""
        if self.commit is None:
            return self.read(path)
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "output"
            command = [sys.executable, "-m", "dvc", "get", "--quiet", ".", path, "--rev", self.commit]
            done = subprocess.run([*command, "--out", str(target)], capture_output=True)
            return target.read_bytes() if done.returncode == 0 else None


def find_revision(name: str) -> Revision:
    """The working tree for "workspace", an experiment by its name, or any other name that git has for a commit.

    Raises EncoreError, with the experiments there are, where it is none of them.
    """
    if name == WORKSPACE:
        return Revision(name, None)
    if not name.isprintable():
        raise EncoreError(f"{name!r} is no name of an experiment or commit; `dvc exp list` has the experiments' names")
    commit = experiments().get(name) or _git(
        "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"
    )
    if not commit:
        known = ", ".join([WORKSPACE, *experiments()])
        raise EncoreError(f"there is no experiment or commit named {name}; there are {known}, and git's names")
    return Revision(name, commit)


def experiments() -> dict[str, str]:
    """The names of DVC's experiments and their commits, the newest first."""
    lines = _git("for-each-ref", "--sort=-committerdate", "--format=%(refname) %(objectname)", EXPERIMENTS).splitlines()
    refs = (line.split() for line in lines)
    # Beside them lie DVC's own, such as refs/exps/exec/EXEC_HEAD.
    return {ref.rsplit("/", 1)[1]: commit for ref, commit in refs if len(ref.split("/")[2]) == 2}


def describe_commit(revision: Revision) -> str:
    """git's short name of a commit; for the working tree that of HEAD, with a mark where code or parameters differ."""
    return _git("rev-parse", "--short=12", revision.commit) if revision.commit else describe_head()


def _git(*arguments: str) -> str:
    """What git prints; nothing where it fails or is missing."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
