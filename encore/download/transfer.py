"""Bytes over HTTP: continued where they ended, and checked as they arrive.

Ours, since huggingface_hub compares sizes and not hashes: of a file with one wrong byte, hf_hub_download said nothing.
"""

import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from encore.download.retries import Patience, Trouble, persist, trouble_of, try_once
from encore.errors import EncoreError
from encore.files import sha256_of
from encore.progress import Progress, note
from encore.threads import Stopped, Threads

FILES_AT_ONCE = 8
TIMEOUT_SECONDS = 30.0  # for a connection, and between two pieces of an answer
# A slower answer is given up: a byte a second would never time out, and never end.
PACE_SECONDS, LEAST_BYTES = 60.0, 60_000
TOO_SLOW = Trouble("it sends less than a kilobyte a second")
SMALL_BYTES = 2**24  # more than any list of ranks


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, and its place on this disk. what: its name in messages. sha256: of its bytes, None where
    only git_id is known, the id that git gives to these bytes."""

    what: str
    url: str
    path: Path
    bytes: int
    sha256: str | None
    git_id: str

    @property
    def partial(self) -> Path:
        """What has arrived so far."""
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def partial_bytes(self) -> int:
        """How much has arrived so far."""
        return min(self.partial.stat().st_size, self.bytes) if self.partial.exists() else 0


def read(url: str, what: str) -> bytes:
    """The bytes at an address, SMALL_BYTES at most. Raises TransferError."""

    def attempt() -> bytes | Trouble:
        with _get(url, {}, None) as response:
            return _receive_at_most(response, SMALL_BYTES) if response.status_code == 200 else trouble_of(response)

    return persist(what, attempt, threading.Event())


def read_tail(file: RemoteFile, count: int, headers: dict[str, str], stopping: threading.Event) -> bytes | None:
    """The last `count` bytes of a file; None where the server does not give parts of it. Raises TransferError."""
    first = file.bytes - count

    def attempt() -> bytes | Trouble | None:
        with _get(file.url, headers, f"bytes={first}-{file.bytes - 1}") as response:
            if response.status_code == 206 and _is_part(response, first, file.bytes):
                tail = _receive_at_most(response, count)
                return tail if isinstance(tail, Trouble) or len(tail) == count else Trouble("the answer ended early")
            if response.status_code in (200, 206, 416):
                return None
            return trouble_of(response)

    return persist(file.what, attempt, stopping)


def find_whole(file: RemoteFile) -> str | None:
    """The sha256 of the file on this disk, where it is there with the right bytes."""
    if not file.path.exists() or file.path.stat().st_size != file.bytes:
        return None
    sha256 = sha256_of(file.path)
    return sha256 if _is_right(file, file.path, sha256) else None


def bring(files: list[RemoteFile], headers: dict[str, str], known: dict[RemoteFile, str]) -> list[str]:
    """Fetches what this disk lacks of the files, and returns the sha256 of each. Another process that wants the same
    file waits and finds it.

    known: the sha256 of those that are whole; these are not looked at. Raises TransferError where the server fails,
    and EncoreError for a file that arrives damaged twice.
    """
    done_bytes = sum(file.bytes if file in known else file.partial_bytes for file in files)
    lock = threading.Lock()
    with (
        Progress("download", sum(file.bytes for file in files), "bytes", done_bytes) as progress,
        Threads(FILES_AT_ONCE) as threads,
    ):

        def count(more_bytes: int) -> None:
            with lock:
                progress.add(more_bytes)

        missing = [file for file in files if file not in known]
        fetched = threads.run_all(lambda file: _Download(file, headers, count, threads.stopping).run(), missing)
    found = {**known, **dict(zip(missing, fetched, strict=True))}
    return [found[file] for file in files]


class Pace:
    """Whether an answer comes at LEAST_BYTES every PACE_SECONDS."""

    def __init__(self) -> None:
        self._since, self._bytes = time.monotonic(), 0

    def is_too_slow(self, more_bytes: int) -> bool:
        """Takes note of so many bytes more. True at the end of PACE_SECONDS that brought fewer than LEAST_BYTES."""
        self._bytes += more_bytes
        if time.monotonic() - self._since < PACE_SECONDS:
            return False
        too_slow = self._bytes < LEAST_BYTES
        self._since, self._bytes = time.monotonic(), 0
        return too_slow


def _receive_at_most(response: Any, most_bytes: int) -> bytes | Trouble:
    """The body of an answer. No more of it is read than a piece beyond `most_bytes`."""
    pace, received = Pace(), bytearray()
    for piece in response.iter_raw():
        received += piece
        if len(received) > most_bytes:
            return Trouble(f"more comes than the {most_bytes:,} bytes that were asked for", again=False)
        if pace.is_too_slow(len(piece)):
            return TOO_SLOW
    return bytes(received)


class _Download:
    """One file on its way: the bytes of its partial file are always the first ones of the file."""

    def __init__(
        self, file: RemoteFile, headers: dict[str, str], count: Callable[[int], None], stopping: threading.Event
    ) -> None:
        self.file, self.headers, self.count, self.stopping = file, headers, count, stopping
        self.counted_bytes = file.partial_bytes
        self.have_bytes = 0
        self.digest = hashlib.sha256()
        self.stream: FileIO

    def run(self) -> str:
        """Brings the file, and returns its sha256."""
        try:
            self.file.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.file) as self.stream:
                sha256 = find_whole(self.file)  # another process may have brought it while this one waited
                if sha256:
                    self.file.partial.unlink()
                    self.have_bytes = self.file.bytes
                    self._show()
                else:
                    sha256 = self._fill()
                    os.replace(self.file.partial, self.file.path)
                return sha256
        except OSError as error:
            error.filename = error.filename or str(self.file.partial)  # a write does not say where
            raise

    def _fill(self) -> str:
        self._take_up()
        for tries_left in (1, 0):
            self._continue()
            sha256 = self.digest.hexdigest()
            if _is_right(self.file, self.file.partial, sha256):
                return sha256
            self._start_over()
            if tries_left:
                note(f"{self.file.what} arrived with a sha256 that is not the listed one; fetching it anew")
        raise EncoreError(
            f"{self.file.what} arrived twice with a sha256 that is not the listed one, and was deleted; run again, "
            "and where that does not help, take another network or ask the owner of the data set"
        )

    def _take_up(self) -> None:
        """Begins behind what an earlier process has left."""
        self.have_bytes = os.fstat(self.stream.fileno()).st_size
        if self.have_bytes > self.file.bytes:
            self._start_over()
        with self.file.partial.open("rb") as file:
            self.digest = hashlib.file_digest(file, "sha256")
        self._show()

    def _start_over(self) -> None:
        self.stream.truncate(0)
        self.have_bytes, self.digest = 0, hashlib.sha256()
        self._show()

    def _continue(self) -> None:
        """Fetches the rest, however often that breaks off, as long as each few tries bring a new byte."""
        patience = Patience(self.file.what, self.stopping)
        furthest_bytes = self.have_bytes
        while self.have_bytes < self.file.bytes:
            trouble = try_once(self._receive)
            if self.have_bytes > furthest_bytes and trouble is not TOO_SLOW:
                furthest_bytes = self.have_bytes
                patience.failures = 0
            if trouble:
                patience.wait(trouble)

    def _receive(self) -> Trouble | None:
        """Appends what one answer holds of the rest."""
        wanted_range = f"bytes={self.have_bytes}-" if self.have_bytes else None
        with _get(self.file.url, self.headers, wanted_range) as response:
            if response.status_code == 416 or (
                response.status_code == 206 and not _is_part(response, self.have_bytes, self.file.bytes)
            ):
                self._start_over()
                return Trouble("it does not have the part that is wanted")
            if response.status_code not in (200, 206):
                return trouble_of(response)
            if response.status_code == 200:
                if response.headers.get("Content-Length", str(self.file.bytes)) != str(self.file.bytes):
                    return Trouble("what it sends has another size than the listed one")
                self._start_over()  # the whole file, whatever part was wanted
            pace = Pace()
            for piece in response.iter_raw():
                if self.stopping.is_set():
                    raise Stopped
                self._append(piece[: self.file.bytes - self.have_bytes])
                if self.have_bytes == self.file.bytes:
                    return None
                if pace.is_too_slow(len(piece)):
                    return TOO_SLOW
        return Trouble("the answer ended early")

    def _append(self, piece: bytes) -> None:
        rest = memoryview(piece)
        while rest:  # on an almost full disk only a part of it may be written
            rest = rest[self.stream.write(rest) :]
        self.digest.update(piece)
        self.have_bytes += len(piece)
        self._show()

    def _show(self) -> None:
        """Tells the progress bar how much is there now."""
        self.count(self.have_bytes - self.counted_bytes)
        self.counted_bytes = self.have_bytes


@contextmanager
def _locked(file: RemoteFile) -> Iterator[FileIO]:
    """The partial file, opened for appending, while no other process has it."""
    while True:
        with FileIO(file.partial, "ab") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note(f"{file.what}: another process is fetching it; waiting for that")
                fcntl.flock(stream, fcntl.LOCK_EX)
            # Who had the lock may have finished, and so renamed what was opened here.
            if _is_at(file.partial, stream):
                yield stream
                return


def _is_at(path: Path, stream: FileIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _is_right(file: RemoteFile, path: Path, sha256: str) -> bool:
    """Whether the bytes at `path`, whose sha256 this is, are the listed ones."""
    if file.sha256:
        return sha256 == file.sha256
    content = path.read_bytes()  # git holds small files only
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.git_id


@contextmanager
def _get(url: str, headers: dict[str, str], wanted_range: str | None) -> Iterator[Any]:
    """The answer to a GET, its body not yet read and as it lies on the server: a compressed one has no parts."""
    from huggingface_hub import get_session

    headers = {**headers, "Accept-Encoding": "identity", **({"Range": wanted_range} if wanted_range else {})}
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as response:
        yield response


def _is_part(response: Any, first: int, file_bytes: int) -> bool:
    """Whether an answer says that it holds the bytes from `first` on, of a file of this size."""
    said = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    return said is not None and (int(said[1]), int(said[2])) == (first, file_bytes)
