"""encore/system_errors.py: what disk and memory refuse, as a sentence that names file, cause and way out."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from encore.system_errors import WAYS_OUT, explain

AGAIN = ", then run the same command"


def caught(function: Callable[[], object]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("number", [*WAYS_OUT, errno.ETXTBSY, errno.ENOTCONN])
def test_every_refusal_names_file_cause_and_way_out(number: int) -> None:
    sentence = explain(OSError(number, os.strerror(number), "data/tokens/train_00000.bin"))
    way_out = WAYS_OUT.get(number, "mend that")
    assert sentence == f"data/tokens/train_00000.bin: {os.strerror(number)}; {way_out}{AGAIN}"


def test_two_names_and_names_in_bytes() -> None:
    error = OSError(errno.EXDEV, "Invalid cross-device link", "a", None, b"b")
    assert explain(error) == f"a -> b: Invalid cross-device link; mend that{AGAIN}"


def test_a_full_disk_that_names_no_file_names_the_working_directory() -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    assert explain(error) == f"{os.getcwd()}: No space left on device; make room{AGAIN}"


def refuse(*arguments: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


def write_with_a_failing_write(path: Path) -> None:
    with path.open("wb") as file:
        refuse(file)


def test_a_call_that_names_no_file_gets_the_name_of_the_file_it_was_at(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    assert (explain(caught(lambda: write_with_a_failing_write(path))) or "").startswith(f"{path}: Input/output error; ")


def test_a_network_has_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"

    def ask(where: Path) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    assert explain(caught(lambda: ask(path))) == f"Connection reset by peer; mend that{AGAIN}"
    assert explain(OSError("no\nroute")) == f"no; mend that{AGAIN}"


def test_a_name_of_300_characters_and_one_with_nul(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    assert explain(caught(long.read_bytes)) == f"{long}: File name too long; give it a shorter name{AGAIN}"
    nul = tmp_path / "a\0b"
    for read in (nul.read_bytes, partial(shutil.copyfile, str(nul), tmp_path / "b")):
        sentence = explain(caught(read))
        assert sentence == f"{str(nul)!r}: a name cannot hold the character NUL; give another name"


def test_a_lock_that_the_file_system_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    sentence = explain(caught(FileLock(tmp_path / "a.lock").acquire))
    assert sentence == f"{tmp_path}/a.lock: No locks available; {WAYS_OUT[errno.ENOLCK]}{AGAIN}"


def test_torch_and_numpy_without_memory() -> None:
    """Both are asked for 4 EB, which no machine has."""
    for demand in (lambda: torch.empty(10**18), lambda: np.zeros(5 * 10**17)):
        sentence = explain(caught(demand))
        assert sentence is not None
        assert re.match(r"the memory is used up( \(\S+ (EiB|GiB|PiB|bytes) more were asked for\))?; end what", sentence)


@pytest.mark.parametrize(
    ("error", "beginning"),
    [
        (MemoryError(), "the memory is used up; end what else uses it, or lower batch_size"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the memory is used up; "),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of"),
            "the memory of the GPU is used up (20.00 MiB more were asked for); ",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"),
            "the memory is used up (4096 bytes more were asked for); ",
        ),
        (RuntimeError("CUDA error: out of memory"), "the memory of the GPU is used up; "),
        (RuntimeError("unable to mmap 10 bytes from file <a>: Cannot allocate memory (12)"), "the memory is used up; "),
    ],
)
def test_used_up_memory_is_told_in_one_way(error: Exception, beginning: str) -> None:
    assert (explain(error) or "").startswith(beginning)


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("shapes (2) and (3)"), KeyError("memory")])
def test_a_bug_is_not_explained(error: Exception) -> None:
    assert explain(error) is None
