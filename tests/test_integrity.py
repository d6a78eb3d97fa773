"""encore/integrity.py: what is read is verified, once on each machine, and what has changed is read again."""

import os
import socket
import threading
import time
from hashlib import sha256
from pathlib import Path

import pytest

from encore import integrity
from encore.errors import EncoreError
from encore.integrity import Verification, check_files, is_right

WAY_OUT = "`dvc repro` makes it"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, str]:
    """Six files, written long ago, and their hashes; scratch is an empty folder."""
    monkeypatch.setenv("ENCORE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(integrity, "SETTLED_SECONDS", -1.0)
    paths = [tmp_path / f"shard-{number}.bin" for number in range(6)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 1000)
    return {path: sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read."""
    names: list[str] = []

    def hash_and_note(path: Path) -> str:
        names.append(path.name)
        return sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(integrity, "sha256_of", hash_and_note)
    return names


def flip(path: Path, keep_times: bool = False) -> None:
    """Another bit in the place of one, written into the file as it lies there."""
    before = path.stat()
    with path.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_all_that_is_wrong_is_told_at_once(files: dict[Path, str]) -> None:
    Verification(files, WAY_OUT).check()
    first, second, third, *_ = files
    flip(first)
    second.unlink()
    third.write_bytes(third.read_bytes()[:-1])
    told = f"{first} has other bytes than its manifest says; {second} is missing; "
    told += f"{third} has other bytes than its manifest says; {WAY_OUT}"
    assert Verification(files, WAY_OUT).wait() == told
    with pytest.raises(EncoreError) as error:
        check_files(first.parent, {path.name: sha256 for path, sha256 in files.items()}, WAY_OUT)
    assert str(error.value) == told


def test_it_goes_on_beside_other_work(files: dict[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(integrity, "sha256_of", lambda path: files[path] if go_on.wait(20) else "")
    verification = Verification(files, WAY_OUT)  # returns at once
    go_on.set()
    assert verification.wait() is None


def test_what_reading_raises_comes_to_the_one_who_waits(
    files: dict[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(integrity, "sha256_of", fail)
    with pytest.raises(OSError, match="Input/output error"):
        Verification(files, WAY_OUT).check()


def test_a_second_start_reads_nothing(files: dict[Path, str], hashed: list[str]) -> None:
    for _ in range(3):
        Verification(files, WAY_OUT).check()
    assert sorted(hashed) == sorted(path.name for path in files)


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_changed_file_is_read_again_though_size_and_time_are_the_same(
    files: dict[Path, str], hashed: list[str], keep_times: bool
) -> None:
    Verification(files, WAY_OUT).check()
    hashed.clear()
    path = next(iter(files))
    flip(path, keep_times)
    assert not is_right(path, files[path])
    flip(path, keep_times)
    assert is_right(path, files[path])
    assert hashed == [path.name] * 2


def test_a_mark_is_only_good_for_its_file_hash_and_machine(
    files: dict[Path, str], hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Verification(files, WAY_OUT).check()
    hashed.clear()
    path, other = list(files)[:2]
    assert not is_right(path, files[other])
    twin = tmp_path / "twin"
    os.link(other, twin)  # which changes the time of the other one's inode
    assert is_right(twin, files[other])
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    assert is_right(path, files[path])
    assert hashed == [path.name, "twin", path.name]


def test_a_file_that_was_just_written_leaves_no_mark(
    files: dict[Path, str], hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second write within a tick of the file system's clock would not show in its times."""
    monkeypatch.setattr(integrity, "SETTLED_SECONDS", 2.0)
    path = next(iter(files))
    now = time.time()
    for seconds_later, reads in ((0, 1), (0, 2), (10, 3), (10, 3)):
        monkeypatch.setattr(time, "time", lambda later=now + seconds_later: later)
        assert is_right(path, files[path])
        assert len(hashed) == reads


def test_a_damaged_mark_and_a_scratch_folder_that_cannot_be_written_only_cost_time(
    files: dict[Path, str], hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(iter(files))
    assert is_right(path, files[path])
    (mark,) = (tmp_path / "scratch/verified").iterdir()
    mark.write_bytes(b"\xff\xfe")
    assert is_right(path, files[path])
    monkeypatch.setenv("ENCORE_SCRATCH", str(path / "no folder"))
    assert is_right(path, files[path])
    assert is_right(path, files[path])
    assert len(hashed) == 4
