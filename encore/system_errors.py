"""What the system refuses, disk or memory, as one sentence: the file, the cause, and what to do."""

import errno
import io
import os
import re
import traceback
from pathlib import Path
from typing import Any

CAN_DO_MORE = "its file system cannot do this: work on a local disk, or set ENCORE_SCRATCH to a folder on one"
PERMISSIONS = "change the permissions"
ROOM = "make room"
OPEN_FILES = "raise `ulimit -n`"
SERVER = "see that its disk or file server is there"
IN_THE_WAY = "move away what is in its place"
WAYS_OUT = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EACCES: PERMISSIONS,
    errno.EPERM: PERMISSIONS,
    errno.EROFS: "mount its disk for writing, or work in another folder",
    errno.EIO: "check the disk, or the way to it (`dmesg` tells more)",
    errno.EFBIG: "raise `ulimit -f`, or work on a file system that holds larger files",
    errno.ENOLCK: CAN_DO_MORE,
    errno.ENOTSUP: CAN_DO_MORE,
    errno.ENOSYS: CAN_DO_MORE,
    errno.EINVAL: CAN_DO_MORE,
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ELOOP: "mend its symbolic links, which lead to themselves",
    errno.ENOENT: "bring it back",
    errno.EEXIST: IN_THE_WAY,
    errno.ENOTDIR: IN_THE_WAY,
    errno.EISDIR: IN_THE_WAY,
    errno.ENOTEMPTY: IN_THE_WAY,
    errno.EMFILE: OPEN_FILES,
    errno.ENFILE: OPEN_FILES,
    errno.ESTALE: SERVER,
    errno.ENODEV: SERVER,
    errno.ENXIO: SERVER,
}
LESS_MEMORY = (
    "end what else uses it, or lower batch_size and raise gradient_accumulation_steps as much "
    "(in tokenize, lower ENCORE_WORKERS), then run the same command"
)
# torch tells of used-up memory in words, in a RuntimeError or a child of it.
NO_MEMORY = re.compile(r"out of memory|(can't|cannot|unable to|failed to) allocate|not enough memory|bad_alloc", re.I)
AMOUNT = re.compile(r"\ballocate ([\d.,]+ ?[KMGT]?i?B(?:ytes)?)\b", re.I)


def explain(error: BaseException) -> str | None:
    """The sentence; None where the error is a bug of ours, whose traceback is wanted."""
    if _is_of_memory(error):
        amount = AMOUNT.search(str(error))
        wanted = f" ({amount[1]} more were asked for)" if amount else ""
        return f"the memory{' of the GPU' if 'CUDA' in str(error) else ''} is used up{wanted}; {LESS_MEMORY}"
    if isinstance(error, OSError):
        lines = (error.strerror or str(error) or type(error).__name__).splitlines()
        where, way_out = _name_file(error), WAYS_OUT.get(error.errno or 0, "mend that")
        return f"{where}{lines[0]}; {way_out}, then run the same command"
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return f"{_find_name_with_nul(error)}: a name cannot hold the character NUL; give another name"
    return None


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error))))


def _name_file(error: OSError) -> str:
    """The file or files before a colon; nothing for errors that are of no file, such as those of a network."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    if not names and error.errno in WAYS_OUT:
        names = [_find_file(error)]
    return " -> ".join(names) + ": " if names else ""


def _find_file(error: BaseException) -> str:
    """What the innermost function was at, an open file or a path, since `read`, `write` and `fsync` do not name theirs;
    the working directory where it was at none."""
    for values in _local_values(error):
        names = [value.name for value in values if isinstance(value, io.IOBase) and hasattr(value, "name")]
        names += [value.lock_file for value in values if type(value).__name__.endswith("FileLock")]
        names += [str(value) for value in values if isinstance(value, Path)]
        if found := next((name for name in names if isinstance(name, str)), None):
            return found
    return os.getcwd()


def _local_values(error: BaseException) -> list[list[Any]]:
    """Of the functions that the error came through, the innermost first."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return [list(frame.f_locals.values()) for frame in reversed(frames)]


def _find_name_with_nul(error: BaseException) -> str:
    values = [value for values in _local_values(error) for value in values]
    return next((repr(str(value)) for value in values if isinstance(value, str | Path) and "\0" in str(value)), "NUL")
