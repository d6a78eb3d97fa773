"""Transfers from a server that has every fault: what arrives, what is sent twice, what is said, and when it ends."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from io import FileIO
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from encore.download import retries, transfer
from encore.download.retries import Patience, TransferError, Trouble, wait_seconds
from encore.download.transfer import RemoteFile, bring, find_whole, read, read_tail
from encore.errors import EncoreError
from encore.threads import Stopped
from tests.hub import ALWAYS, COMMIT, REPOSITORY, Fault, Hub, connected, serving
from tests.text_sources import sha256

pytestmark = pytest.mark.slow

CONTENT = Random(1).randbytes(200_000)
NAME = "train.parquet"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving({NAME: CONTENT}) as server, connected(monkeypatch, server.url, "no token"):
        yield server


@pytest.fixture
def remote(hub: Hub, tmp_path: Path) -> Callable[..., RemoteFile]:
    """The file of a name in the Hub as the Hub lists it."""

    def remote(name: str = NAME, **changes: object) -> RemoteFile:
        content = hub.files[name]
        url = f"{hub.url}/datasets/{REPOSITORY}/resolve/{COMMIT}/{name}"
        values = {"bytes": len(content), "sha256": sha256(content), "git_id": ""}
        return RemoteFile(**{"what": name, "url": url, "path": tmp_path / "store" / name, **values, **changes})

    return remote


def lay(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


PASSING = {
    "429": (Fault("status", status=429, headers={"Retry-After": "2"}), "status 429", 0),
    "408": (Fault("status", status=408), "status 408", 0),
    "500": (Fault("status", status=500), "status 500", 0),
    "502": (Fault("status", status=502), "status 502", 0),
    "503": (Fault("status", status=503), "status 503", 0),
    "504": (Fault("status", status=504), "status 504", 0),
    "reset in the header": (Fault("reset", after_bytes=None), "ReadError", 0),
    "reset in the body": (Fault("reset", after_bytes=90_000), "ReadError", 0),
    "end in the header": (Fault("end", after_bytes=None), "RemoteProtocolError", 0),
    "end in the body": (Fault("end", after_bytes=90_000), "RemoteProtocolError", 0),
    "stall in the header": (Fault("stall", after_bytes=None), "ReadTimeout", 0),
    "stall in the body": (Fault("stall", after_bytes=90_000), "ReadTimeout", 0),
    "wrong bytes": (Fault("damage"), None, len(CONTENT)),
}


@pytest.mark.parametrize("name", PASSING)
def test_faults_that_pass(
    name: str,
    hub: Hub,
    remote: Callable[..., RemoteFile],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(transfer, "TIMEOUT_SECONDS", 0.2)
    fault, reason, again_bytes = PASSING[name]
    hub.faults[NAME] = [fault]
    file = remote()
    assert bring([file], {}, {}) == [sha256(CONTENT)]
    assert file.path.read_bytes() == CONTENT
    assert not file.partial.exists()
    assert hub.requests[f"GET {NAME}"] == 2
    assert hub.bytes_served[NAME] == len(CONTENT) + again_bytes
    said = f"{reason}; trying again in 0.01 s" if reason else "arrived with a sha256 that is not the listed one; fetch"
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1
    assert notes[0].startswith(f"encore: note: {NAME}")
    assert said in notes[0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_faults_that_do_not_pass(status: int, hub: Hub, remote, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults[NAME] = [Fault("status", ALWAYS, status)]
    with pytest.raises(TransferError, match=f"{NAME}: status {status}") as error:
        bring([remote()], {}, {})
    assert error.value.trouble.status == status
    assert hub.requests[f"GET {NAME}"] == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault("status", ALWAYS, 503), "status 503"),
        (Fault("reset", ALWAYS, after_bytes=None), "ReadError"),
        (Fault("end", ALWAYS, after_bytes=0), "RemoteProtocolError"),
    ],
)
def test_an_end_after_six_tries(
    fault: Fault, reason: str, hub: Hub, remote, capsys: pytest.CaptureFixture[str]
) -> None:
    fault.times = ALWAYS
    hub.faults[NAME] = [Fault("end", after_bytes=50_000), fault]
    file = remote()
    with pytest.raises(TransferError, match=f"{NAME}: {reason}"):
        bring([file], {}, {})
    # The first of the six brought something and so does not count; the note of each wait is one line.
    assert hub.requests[f"GET {NAME}"] == 1 + retries.TRIES - 1
    assert capsys.readouterr().err.count("\n") == retries.TRIES - 1
    assert file.partial.read_bytes() == CONTENT[:50_000]
    hub.faults.clear()
    assert bring([file], {}, {}) == [sha256(CONTENT)]
    assert hub.bytes_served[NAME] == len(CONTENT)


def test_every_new_byte_starts_the_count_anew(hub: Hub, remote) -> None:
    hub.faults[NAME] = [Fault("end", 39, after_bytes=5_000)]
    assert bring([remote()], {}, {}) == [sha256(CONTENT)]
    assert hub.requests[f"GET {NAME}"] == 40
    assert hub.bytes_served[NAME] == len(CONTENT)


def test_a_server_without_ranges_starts_over(hub: Hub, remote) -> None:
    hub.faults[NAME] = [Fault("end", after_bytes=50_000), Fault("no_range", ALWAYS)]
    assert bring([remote()], {}, {}) == [sha256(CONTENT)]
    assert hub.bytes_served[NAME] == 50_000 + len(CONTENT)


def test_a_server_without_ranges_that_always_ends_early_is_given_up(remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try brings bytes, and never a new one."""
    tries: list[str | None] = []

    @contextmanager
    def send_first_bytes(url: str, headers: dict[str, str], wanted_range: str | None) -> Iterator[SimpleNamespace]:
        tries.append(wanted_range)
        yield SimpleNamespace(status_code=200, headers={}, iter_raw=lambda: iter([CONTENT[:60_000]]))

    monkeypatch.setattr(transfer, "_get", send_first_bytes)
    with pytest.raises(TransferError, match="the answer ended early"):
        bring([remote()], {}, {})
    assert tries == [None] + ["bytes=60000-"] * (retries.TRIES - 1)


def test_a_partial_file_is_continued_from_where_it_ends(hub: Hub, remote) -> None:
    lay(remote().partial, CONTENT[:123_456])
    assert bring([remote()], {}, {}) == [sha256(CONTENT)]
    assert hub.bytes_served[NAME] == len(CONTENT) - 123_456


def test_a_partial_file_that_is_whole_needs_no_request(hub: Hub, remote) -> None:
    lay(remote().partial, CONTENT)  # killed between the last byte and the rename
    assert bring([remote()], {}, {}) == [sha256(CONTENT)]
    assert not hub.requests


@pytest.mark.parametrize("partial", [CONTENT + b"more", b"x" * len(CONTENT), b"x" * 50_000], ids=len)
def test_a_partial_file_that_is_wrong_is_fetched_anew(partial: bytes, hub: Hub, remote) -> None:
    lay(remote().partial, partial)
    assert bring([remote()], {}, {}) == [sha256(CONTENT)]
    assert remote().path.read_bytes() == CONTENT


def test_a_part_that_the_server_does_not_have(hub: Hub, remote) -> None:
    lay(remote().partial, CONTENT[:100])
    hub.faults[NAME] = [Fault("status", status=416)]
    assert bring([remote()], {}, {}) == [sha256(CONTENT)]
    assert hub.bytes_served[NAME] == len(CONTENT)


@pytest.mark.parametrize("listed_bytes", [len(CONTENT) - 10, len(CONTENT) + 10])
@pytest.mark.parametrize("partial_bytes", [0, 100_000, len(CONTENT) - 10])
def test_a_file_of_another_size_is_not_taken(listed_bytes: int, partial_bytes: int, hub: Hub, remote) -> None:
    """Nor is a page of a network that wants a log-in."""
    file = remote(bytes=listed_bytes, sha256="0" * 64)
    lay(file.partial, CONTENT[:partial_bytes])
    with pytest.raises(TransferError, match="another size than the listed one"):
        bring([file], {}, {})
    assert file.partial.stat().st_size == 0


def test_wrong_bytes_twice_are_refused_and_not_kept(hub: Hub, remote) -> None:
    hub.faults[NAME] = [Fault("damage", 2)]
    file = remote()
    with pytest.raises(EncoreError, match=f"^{NAME} arrived twice with a sha256 .*, and was deleted; run again, "):
        bring([file], {}, {})
    assert hub.requests[f"GET {NAME}"] == 2
    assert not file.path.exists()
    assert file.partial.stat().st_size == 0
    assert bring([file], {}, {}) == [sha256(CONTENT)]


def test_a_file_that_is_there_with_wrong_bytes_is_replaced_and_not_written_into(hub: Hub, remote) -> None:
    """Other names of it, in data/raw and DVC's cache, are other results' business."""
    file = remote()
    lay(file.path, bytes(len(CONTENT)))
    other = file.path.with_name("link")
    os.link(file.path, other)
    assert find_whole(file) is None
    assert bring([file], {}, {}) == [sha256(CONTENT)]
    assert find_whole(file) == sha256(CONTENT)
    assert other.read_bytes() == bytes(len(CONTENT))


def test_many_files_at_once_in_their_order(hub: Hub, remote, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {f"{number}.parquet": Random(number).randbytes(1_000 + number) for number in range(30)}
    open_now, most, lock = 0, 0, threading.Lock()
    honest = transfer._get

    def counting(*arguments: object):
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
        time.sleep(0.005)
        with lock:
            open_now -= 1
        return honest(*arguments)

    monkeypatch.setattr(transfer, "_get", counting)
    files = [remote(name) for name in hub.files]
    known = {files[3]: "known", files[17]: "known"}
    expected = [sha256(content) for content in hub.files.values()]
    expected[3] = expected[17] = "known"
    assert bring(files, {}, known) == expected
    assert hub.requests == {f"GET {name}": 1 for name in hub.files if name not in ("3.parquet", "17.parquet")}
    assert 1 < most <= transfer.FILES_AT_ONCE


def test_the_bar_counts_every_byte_once(hub: Hub, remote, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {f"{number}.parquet": CONTENT for number in range(5)}
    files = [remote(name) for name in hub.files]
    lay(files[1].partial, CONTENT[:70_000])
    lay(files[2].partial, CONTENT + b"too long")
    lay(files[3].partial, bytes(50_000))
    hub.faults["4.parquet"] = [Fault("end", after_bytes=30_000), Fault("no_range"), Fault("status")]
    bars = []

    class Recorded(transfer.Progress):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            bars.append(self)
            self.first = self.done

    monkeypatch.setattr(transfer, "Progress", Recorded)
    bring(files, {}, {files[0]: "known"})
    (bar,) = bars
    assert (bar.what, bar.unit, bar.total) == ("download", "bytes", 5 * len(CONTENT))
    assert bar.first == len(CONTENT) + 70_000 + len(CONTENT) + 50_000
    assert bar.done == 5 * len(CONTENT)


class NearlyFull(FileIO):
    """Writes at most 1,000 bytes at once, and none behind byte 20,000, as a disk that fills up."""

    def write(self, data) -> int:
        room = 20_000 - os.fstat(self.fileno()).st_size
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(bytes(data[: min(1_000, room)]))


def test_a_full_disk_ends_all_threads(hub: Hub, remote, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {f"{number}.parquet": CONTENT for number in range(20)}
    hub.faults["1.parquet"] = [Fault("status", ALWAYS)]
    monkeypatch.setattr(retries, "LONGEST_WAIT_SECONDS", 60.0)
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 60.0)
    monkeypatch.setattr(transfer, "FileIO", NearlyFull)
    with pytest.raises(OSError, match="No space left") as error:
        bring([remote(name) for name in hub.files], {}, {})
    assert error.value.errno == errno.ENOSPC
    assert Path(error.value.filename).suffix == ".partial"
    assert Path(error.value.filename).read_bytes() == CONTENT[:20_000]
    assert not [thread for thread in threading.enumerate() if "_work" in thread.name]


def test_a_failure_ends_the_other_downloads(hub: Hub, remote) -> None:
    """The other file would take ten seconds."""
    hub.files = {"slow.parquet": CONTENT * 10, "gone.parquet": CONTENT}
    hub.seconds_for_piece = 0.08
    hub.faults["gone.parquet"] = [Fault("status", status=404)]
    slow = remote("slow.parquet")
    with pytest.raises(TransferError, match=r"gone\.parquet: status 404"):
        bring([slow, remote("gone.parquet")], {}, {})
    assert not [thread for thread in threading.enumerate() if "_work" in thread.name]
    assert slow.partial_bytes < slow.bytes


def test_who_waits_for_a_file_finds_it(hub: Hub, remote) -> None:
    """Ten at once: each opens the partial file, and nine of them find that it was renamed meanwhile."""
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(bring([remote()], {}, {}))) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[sha256(CONTENT)]] * 10
    assert hub.requests[f"GET {NAME}"] == 1
    assert [path.name for path in remote().path.parent.iterdir()] == [NAME]


def test_tails(hub: Hub, remote) -> None:
    stopping = threading.Event()
    assert read_tail(remote(), 1_000, {}, stopping) == CONTENT[-1_000:]
    assert read_tail(remote(), len(CONTENT), {}, stopping) == CONTENT
    hub.faults[f"{NAME}#tail"] = [Fault("status"), Fault("reset", after_bytes=10), Fault("end", after_bytes=999)]
    assert read_tail(remote(), 1_000, {}, stopping) == CONTENT[-1_000:]
    hub.faults[f"{NAME}#tail"] = [Fault("no_range")]
    assert read_tail(remote(), 1_000, {}, stopping) is None
    assert read_tail(remote(bytes=len(CONTENT) + 5), 1_000, {}, stopping) is None  # not the listed file
    assert read_tail(remote(bytes=len(CONTENT) + 5_000), 1_000, {}, stopping) is None  # not a byte of it
    hub.faults[f"{NAME}#tail"] = [Fault("status", status=404)]
    with pytest.raises(TransferError, match="status 404"):
        read_tail(remote(), 1_000, {}, stopping)


def test_small_files(hub: Hub, remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "TIMEOUT_SECONDS", 0.2)
    hub.faults[NAME] = [Fault("status", status=429), Fault("end", after_bytes=5), Fault("stall", after_bytes=5)]
    assert read(remote().url, "ranks") == CONTENT
    hub.faults[NAME] = [Fault("status", ALWAYS, 503)]
    with pytest.raises(TransferError, match="ranks: status 503"):
        read(remote().url, "ranks")


def test_a_wait_ends_when_the_work_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 300.0)
    stopping = threading.Event()
    threading.Timer(0.05, stopping.set).start()
    with pytest.raises(Stopped):
        Patience("it", stopping).wait(Trouble("status 503"))
    assert capsys.readouterr().err == "encore: note: it: status 503; trying again in 300 s\n"
    with pytest.raises(Stopped):
        Patience("it", stopping).wait(Trouble("status 404", again=False))
    assert capsys.readouterr().err == ""  # nobody wants to know any more


def test_waits_grow_and_heed_the_server() -> None:
    assert [wait_seconds(failures, 0) for failures in range(1, 6)] == [1, 2, 4, 8, 16]
    assert wait_seconds(1, 55) == 55
    assert wait_seconds(4, 3) == 8  # asking for less does not make us hurry
    assert wait_seconds(1, 86_400) == wait_seconds(12, 0) == 300


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"Retry-After": "120"}, 120),
        ({"Retry-After": " 7 "}, 7),
        ({"Retry-After": "soon"}, 0),
        ({"Retry-After": "-5"}, 0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=0;t=55', "Retry-After": "9"}, 9),
    ],
)
def test_what_the_server_asks_for(headers: dict[str, str], seconds: float) -> None:
    assert retries._retry_after(headers) == seconds


def test_a_date_to_come_back() -> None:
    assert 3_598 <= retries._retry_after({"Retry-After": formatdate(time.time() + 3_600, usegmt=True)}) <= 3_600
