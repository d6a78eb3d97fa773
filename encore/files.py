"""Whole files: what is visible under its final name is complete (written beside, synced, renamed). And whether the disk
has room for them, asked before anything is written.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from encore.errors import EncoreError

# What NFS, CIFS, FUSE and others answer to a call that they do not have.
NOT_ABLE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON in the order given.

    Raises ValueError on NaN and infinity, which JSON does not have.
    """
    write_whole(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Tab-separated values under a header; floats in the shortest form that reads back as the same bits.

    A cell is empty where a row has None or no such column: a CPU's rows have no MFU where a GPU went on with the run.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [["" if row.get(name) is None else repr(row[name]) for name in names] for row in rows]
    write_whole(path, "".join("\t".join(line) + "\n" for line in [names, *cells]).encode())


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`; on success it takes `folder`'s place, on failure it goes."""
    partial, old = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        sync(partial)
        if folder.exists():
            os.replace(folder, old)  # as a whole, as it was there
        os.replace(partial, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """What kills in the middle of a write into `folder` have left. Only for the one who alone writes there."""
    for path in [*folder.glob(".*.partial"), *folder.glob(".*.old")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, which takes no room, or a copy where the file system has none or `target` is on another one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def sync(path: Path) -> None:
    """Asks the disk to hold a file's bytes, or a folder's entries, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with where_able() if path.is_dir() else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def where_able() -> Iterator[None]:
    """For what some file systems cannot do, and what no result depends on: it is then left undone."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_ABLE:
            raise


def check_room(writes: list[tuple[Path, int]], way_out: str) -> None:
    """Raises EncoreError where a disk has less free than the bytes that are going to be written into folders on it."""
    for folder, _ in writes:
        device = folder.stat().st_dev
        needed_bytes = sum(count for other, count in writes if other.stat().st_dev == device)
        free_bytes = shutil.disk_usage(folder).free
        if needed_bytes > free_bytes:
            raise EncoreError(
                f"{folder}: {needed_bytes / 1e6:,.1f} MB are going to be written and {free_bytes / 1e6:,.1f} MB are "
                f"free on its disk; {way_out}"
            )


def can_link(source: Path, target: Path) -> bool:
    """Whether a file in the folder `source` can have a hard link in the folder `target`; found by trying."""
    with tempfile.NamedTemporaryFile(dir=source, prefix=".link-") as probe:
        link = target / Path(probe.name).name
        try:
            os.link(probe.name, link)
        except OSError:
            return False
        link.unlink()
        return True
