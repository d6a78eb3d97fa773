"""Files against the sha256 that a manifest has of them: what a stage reads it verifies, on each machine once.

A mark in scratch spares the next start: it is only good for the same file, by machine, path, inode, size and times.
"""

import hashlib
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from encore.errors import EncoreError
from encore.files import sha256_of, write_whole
from encore.scratch import scratch_folder
from encore.threads import Threads

MARKS = "verified"  # in scratch
MOST_THREADS = 4
# A file system's clock stands still for some milliseconds, in which a second write would leave the times as they are.
SETTLED_SECONDS = 2.0


class Verification:
    """Hashes files in threads, beside other work, beginning at once.

    files: the sha256 that each must have. way_out: what brings a damaged one back, the end of the sentence.
    """

    def __init__(self, files: dict[Path, str], way_out: str) -> None:
        self._files, self._way_out = files, way_out
        self._problems: list[str] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="verify", daemon=True)
        self._thread.start()

    def wait(self) -> str | None:
        """A sentence about each file that is missing or has other bytes, once all are read; None where there is none.
        Raises what reading has raised."""
        self._thread.join()
        if self._error:
            raise self._error
        return f"{'; '.join(self._problems)}; {self._way_out}" if self._problems else None

    def check(self) -> None:
        """Raises EncoreError, once all are read, where a file is missing or has other bytes."""
        if problem := self.wait():
            raise EncoreError(problem)

    def _work(self) -> None:
        # Training, which needs the processors, goes on meanwhile.
        count = min(MOST_THREADS, max(1, (os.cpu_count() or 1) // 4))
        try:
            with Threads(count) as threads:
                found = threads.map(lambda file: _find_problem(*file), self._files.items())
                self._problems = [problem for problem in found if problem]
        except BaseException as error:  # for the thread that waits
            self._error = error


def check_files(folder: Path, files: dict[str, str], way_out: str) -> None:
    """Raises EncoreError, which ends with `way_out`, where one of these files of a folder is missing or has another
    sha256 than is given."""
    Verification({folder / name: sha256 for name, sha256 in files.items()}, way_out).check()


def _find_problem(path: Path, sha256: str) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    return None if is_right(path, sha256) else f"{path} has other bytes than its manifest says"


def is_right(path: Path, sha256: str) -> bool:
    """Whether a file's bytes have this sha256: read, unless a mark says that they were and the file is still the same.

    Raises OSError where it cannot be read. A scratch folder that cannot be written leaves no mark.
    """
    mark, line = _mark_of(path), _describe(path, sha256)
    with suppress(OSError):
        if mark.read_bytes() == line:
            return True
    if sha256_of(path) != sha256:
        return False
    settled = time.time() - max(path.stat().st_mtime, path.stat().st_ctime) > SETTLED_SECONDS
    if settled and _describe(path, sha256) == line:  # nobody has written meanwhile
        with suppress(OSError):
            write_whole(mark, line)
    return True


def _mark_of(path: Path) -> Path:
    place = f"{socket.gethostname()}:{path.resolve()}"
    return scratch_folder() / MARKS / hashlib.sha256(os.fsencode(place)).hexdigest()[:32]


def _describe(path: Path, sha256: str) -> bytes:
    found = path.stat()
    return b"%s %d %d %d %d\n" % (
        sha256.encode(),
        found.st_ino,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
    )
