"""Mends what the death of dvc can leave behind, and what then makes dvc refuse.

`make repro` runs it first. dvc writes dvc.lock and .dvc/tmp/rwlock in place, so that a kill leaves them empty or cut
off; and it stages dvc.lock, where a kill leaves git's index locked. A file that DVC can read is never touched.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from encore.errors import EncoreError
from encore.files import write_whole
from encore.json_files import parse_yaml
from encore.schemas import Lockfile

RESULTS = Path("dvc.lock")
TMP = Path(".dvc/tmp")
PROCESSES = TMP / "rwlock"  # which dvc reads or writes what


def main() -> None:
    """A sentence for each file that is mended. Raises EncoreError where one is broken and dvc or git is at work."""
    if not find_broken() and not find_index_lock():
        return
    with alone():
        for path in find_broken():
            committed = find_committed(path) if path == RESULTS else None
            if committed:
                write_whole(path, committed)
                way_out = "git's is back in its place, and what is newer comes out of DVC's run cache"
            else:
                path.unlink()
                way_out = "it is removed, and dvc writes it anew"
            tell(f"{path} was cut off when dvc was killed; {way_out}")
        if lock := find_index_lock():
            lock.unlink()
            tell(f"{lock} was left when dvc or git was killed; it is removed, and git's index is as it was before")


def tell(sentence: str) -> None:
    print(f"encore: note: {sentence}", file=sys.stderr)


def find_broken() -> list[Path]:
    """Those of the two files that are there and that DVC would refuse."""
    checks = {RESULTS: is_lockfile, PROCESSES: is_json_object}
    return [path for path, check in checks.items() if path.is_file() and not check(path.read_bytes())]


def is_json_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


def is_lockfile(data: bytes) -> bool:
    """Whether this is a dvc.lock as DVC's schema has it, as far as cutting one off can break it."""
    try:
        parse_yaml(data, Lockfile, "dvc.lock")
    except EncoreError:
        return False
    return True


def find_committed(path: Path) -> bytes | None:
    """What git has of dvc.lock: as it is staged, or as the last commit has it. None where neither is whole."""
    for version in (f":./{path}", f"HEAD:./{path}"):
        done = subprocess.run(["git", "show", version], capture_output=True)
        if done.returncode == 0 and is_lockfile(done.stdout):
            return done.stdout
    return None


def find_index_lock() -> Path | None:
    """The lock of git's index, where it is still the same a second later: what holds it so long is dead, or git's own
    process is there to be seen."""
    done = subprocess.run(["git", "rev-parse", "--git-path", "index.lock"], capture_output=True, text=True)
    path = Path(done.stdout.strip())
    if done.returncode != 0 or not path.is_file():
        return None
    try:
        before = path.stat()
        time.sleep(1)
        return path if os.path.samestat(before, path.stat()) else None
    except FileNotFoundError:
        return None


@contextmanager
def alone() -> Iterator[None]:
    """Holds DVC's own lock on the repository. Raises EncoreError where dvc or git is at work in it."""
    TMP.mkdir(parents=True, exist_ok=True)
    with (TMP / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            at_work = find_process()  # while a stage runs, dvc does not hold the lock
        except BlockingIOError:
            at_work = f"dvc holds {TMP / 'lock'}"
        if at_work:
            raise EncoreError(f"{at_work} and works in this folder; wait for its end, or end it, and run this again")
        yield


def find_process() -> str | None:
    """A process of dvc or git that works in this folder or below, in words."""
    here = Path.cwd().resolve()
    for process in psutil.process_iter(["pid", "cwd", "cmdline"]):
        words, cwd = process.info["cmdline"] or [], process.info["cwd"]
        if not cwd or not Path(cwd).is_relative_to(here) or any(word.endswith("daemon") for word in words):
            continue
        if names := {"dvc", "git"} & {Path(word).name for word in words[:3]}:
            return f"process {process.info['pid']} is {names.pop()}"
    return None
