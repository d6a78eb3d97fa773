"""Free room on the disks that are written to, and whether a file can have a second name."""

import os
from collections import namedtuple
from pathlib import Path

import pytest

from encore import files
from encore.errors import EncoreError
from encore.files import can_link, check_room

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def two_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """Folders a and b on a disk with 5 MB free, and c on one with 3 MB."""
    folders = tuple(tmp_path / name for name in "abc")
    for folder in folders:
        folder.mkdir()
    stat = Path.stat

    def fake_stat(path: Path, **options: bool) -> os.stat_result:
        values = list(stat(path, **options))
        values[2] = 2 if path.name == "c" else 1  # st_dev
        return os.stat_result(values)

    monkeypatch.setattr(Path, "stat", fake_stat)
    monkeypatch.setattr(
        files.shutil, "disk_usage", lambda path: Usage(0, 0, 3_000_000 if path.name == "c" else 5_000_000)
    )
    return folders


def test_what_goes_to_one_disk_is_added_up(two_disks: tuple[Path, Path, Path]) -> None:
    a, b, c = two_disks
    check_room([(a, 3_000_000), (b, 2_000_000), (c, 3_000_000)], "buy a disk")
    with pytest.raises(EncoreError) as error:
        check_room([(a, 3_000_000), (b, 2_500_000), (c, 3_000_000)], "buy a disk")
    assert str(error.value) == f"{a}: 5.5 MB are going to be written and 5.0 MB are free on its disk; buy a disk"
    with pytest.raises(EncoreError, match=rf"^{c}: 1,234\.5 MB are going to be written and 3\.0 MB are free"):
        check_room([(a, 0), (c, 1_234_500_000)], "buy a disk")


def test_real_disks(tmp_path: Path) -> None:
    check_room([(tmp_path, 1)], "")
    with pytest.raises(EncoreError, match="are free on its disk"):
        check_room([(tmp_path, 10**18)], "")


def test_can_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    assert can_link(one, other)

    def no_links(source: str, target: str) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    assert not can_link(one, other)
    assert [path.name for path in tmp_path.rglob("*")] in (["one", "other"], ["other", "one"])


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second file system")
def test_no_link_to_another_file_system(tmp_path: Path) -> None:
    if tmp_path.stat().st_dev == Path("/dev/shm").stat().st_dev:
        pytest.skip("no second file system")
    assert not can_link(tmp_path, Path("/dev/shm"))
