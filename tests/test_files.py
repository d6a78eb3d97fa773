"""encore/files.py: whatever is visible under its final name is whole."""

import errno
import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from encore.errors import EncoreError
from encore.files import (
    link_or_copy,
    sha256_of,
    sync,
    where_able,
    whole_folder,
    write_json,
    write_tsv,
    write_whole,
)

AWKWARD = [0.1 + 0.2, 1 / 3, 6e-05, 1e-320, 1.7976931348623157e308, 5e-324, 2**53 + 1.0, -0.0]


def refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")


def fail_half_way(folder: Path, error: BaseException) -> None:
    with whole_folder(folder) as partial:
        (partial / "half").write_bytes(b"1")
        raise error


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size", [0, 1, 2**20 + 3])
def test_sha256_is_hashlibs(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_write_whole_makes_folders_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_whole(path, b"old content")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert names_in(path.parent) == ["file"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    monkeypatch.setattr(f"encore.files.os.{moment}", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("encore.files.os.fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr("encore.files.os.replace", lambda a, b: (events.append("replace"), replace(a, b)))
    write_whole(tmp_path / "file", b"data")
    assert events == ["fsync", "replace"]


def test_json_keeps_the_order_and_can_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"z": 1, "a": [1.5, None, True], "m": {"text": "ä\n"}}
    write_json(path, value)
    assert path.read_text() == json.dumps(value, indent=2) + "\n"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_json_refuses_what_json_does_not_have_and_keeps_the_old_file(tmp_path: Path, number: float) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": number})
    assert json.loads(path.read_text()) == {"loss": 1.0}


def test_a_folder_appears_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "tokens"
    with whole_folder(folder) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_bytes(b"1")
        assert partial.parent == folder.parent  # the same file system: a rename suffices
        assert not folder.exists()
    assert (folder / "deep" / "file").read_bytes() == b"1"
    assert names_in(tmp_path / "data") == ["tokens"]


def test_a_new_folder_takes_the_old_ones_place_with_nothing_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    (folder / "old").write_bytes(b"old")
    with whole_folder(folder) as partial:
        (partial / "new").write_bytes(b"new")
        assert names_in(folder) == ["old"]
    assert names_in(folder) == ["new"]
    assert names_in(tmp_path) == ["tokens"]


@pytest.mark.parametrize("error", [EncoreError("a sentence"), KeyboardInterrupt(), ValueError("a bug")])
def test_a_failure_leaves_no_trace_and_the_old_folder(tmp_path: Path, error: BaseException) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    (folder / "old").write_bytes(b"old")
    with pytest.raises(type(error)):
        fail_half_way(folder, error)
    assert names_in(tmp_path) == ["tokens"]
    assert names_in(folder) == ["old"]


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    with whole_folder(folder) as partial:
        where = partial
    where.mkdir()  # as SIGKILL would leave it
    (where / "train_00009.bin").write_bytes(b"of another run")
    with whole_folder(folder) as partial:
        assert partial == where
        assert names_in(partial) == []
        (partial / "new").write_bytes(b"new")
    assert names_in(folder) == ["new"]


def test_a_link_takes_no_room_and_a_copy_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"data")
    link_or_copy(source, tmp_path / "link")
    assert source.stat().st_ino == (tmp_path / "link").stat().st_ino
    monkeypatch.setattr("encore.files.os.link", refuse)
    link_or_copy(source, tmp_path / "copy")
    assert source.stat().st_ino != (tmp_path / "copy").stat().st_ino
    assert (tmp_path / "copy").read_bytes() == b"data"
    assert names_in(tmp_path) == ["copy", "link", "source"]


def fsync_that_fails_for(is_folder: bool, number: int) -> Callable[[int], None]:
    """fsync of a file system that refuses folders, or of a disk that fails."""

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}") == is_folder:
            raise OSError(number, os.strerror(number))

    return fsync


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr("encore.files.os.fsync", fsync_that_fails_for(True, number))
    with whole_folder(tmp_path / "model") as partial:
        write_whole(partial / "a", b"data")
    assert (tmp_path / "model" / "a").read_bytes() == b"data"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
@pytest.mark.parametrize(("is_folder", "number"), [(True, errno.EIO), (False, errno.EINVAL), (False, errno.EIO)])
def test_a_disk_that_fails_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_folder: bool, number: int
) -> None:
    (tmp_path / "a").touch()
    monkeypatch.setattr("encore.files.os.fsync", fsync_that_fails_for(is_folder, number))
    with pytest.raises(OSError, match=os.strerror(number)):
        sync(tmp_path if is_folder else tmp_path / "a")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS])
def test_what_a_file_system_cannot_do_is_left_undone(number: int) -> None:
    with where_able():
        raise OSError(number, os.strerror(number))
    with pytest.raises(OSError, match=r"Errno 5\b"), where_able():
        raise OSError(errno.EIO, "Input/output error")


def test_floats_read_back_as_the_same_bits(tmp_path: Path) -> None:
    rows = [{"iter": i, "loss": value} for i, value in enumerate(AWKWARD)]
    write_tsv(tmp_path / "a.tsv", rows)
    header, *lines = (tmp_path / "a.tsv").read_text().removesuffix("\n").split("\n")
    assert header == "iter\tloss"
    read = [line.split("\t") for line in lines]
    assert [int(i) for i, _ in read] == list(range(len(AWKWARD)))
    assert [struct.pack("d", float(value)) for _, value in read] == [struct.pack("d", value) for value in AWKWARD]


def test_a_value_that_is_missing_is_an_empty_cell(tmp_path: Path) -> None:
    write_tsv(tmp_path / "a.tsv", [{"iter": 1, "grad_norm": None, "lr": 0.5}])
    assert (tmp_path / "a.tsv").read_text() == "iter\tgrad_norm\tlr\n1\t\t0.5\n"


def test_rows_with_other_columns_have_empty_cells(tmp_path):
    write_tsv(tmp_path / "a.tsv", [{"iter": 1, "ms": 2.0}, {"iter": 2, "ms": 1.0, "mfu": 0.5}])
    assert (tmp_path / "a.tsv").read_text() == "iter\tms\tmfu\n1\t2.0\t\n2\t1.0\t0.5\n"
