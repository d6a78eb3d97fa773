"""stages/tokenize.py stopped at any moment, or run twice at once: the next run ends in the same bytes."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encore.tokens import encode, parts
from encore.tokens.token_files import SPLITS, ShardWriter
from stages import tokenize
from tests.conftest import ROOT, pipeline_environment
from tests.raw_text import PLENTY, joined, prepare_root, read_folder, write_params

pytestmark = pytest.mark.slow

TOKENS, SCRATCH = Path("data/tokens"), Path(".encore/tokens")
TEXTS = ["" if number % 10 == 3 else f"the ünit {number}: {number**3} " * (1 + number % 5) for number in range(240)]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run the stage in, which makes several parts, and in them batches, of the corpus."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENCORE_WORKERS", "1")
    monkeypatch.setattr(encode, "BATCH_BYTES", 500)
    monkeypatch.setattr(parts, "PART_TEXT_BYTES", 3000)
    prepare_root(TEXTS)
    return tmp_path


def run() -> dict[str, bytes]:
    """Runs the stage and returns the files of data/tokens."""
    tokenize.main()
    return read_folder(TOKENS)


def test_a_failure_in_the_middle_leaves_the_old_tokens_and_finished_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add, writers = ShardWriter.add, set()

    def fail_in_the_second_part(self: ShardWriter, *arrays: np.ndarray) -> None:
        writers.add(self)
        if len(writers) == len(SPLITS) + 2:
            for writer in writers:
                writer._file.close()  # as the end of the process would
            raise OSError(28, "No space left on device")
        add(self, *arrays)

    write_params(token_cap=PLENTY)
    whole = run()
    write_params()
    old = run()
    assert joined(whole, "train").startswith(joined(old, "train"))
    write_params(token_cap=PLENTY)
    monkeypatch.setattr(ShardWriter, "add", fail_in_the_second_part)
    with pytest.raises(OSError, match="No space left"):
        tokenize.main()
    assert read_folder(TOKENS) == old
    assert sorted(path.name for path in Path("data").iterdir()) == ["raw", "tokens"]
    monkeypatch.setattr(ShardWriter, "add", add)
    capsys.readouterr()
    assert run() == whole
    assert capsys.readouterr().out.startswith("encore: note: 1 of 5 parts are in .encore/tokens/")


def test_parts_are_taken_away_only_once_the_tokens_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree, seen = shutil.rmtree, []

    def watched(folder: Path, **options: Any) -> None:
        if folder.parent == SCRATCH:
            seen.append(read_folder(TOKENS))
        rmtree(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    assert [run()] == seen


# Runs the stage and kills itself before the given one of the changes that it makes to the disk. Prints their number.
KILLED = """
import os, signal, sys
from encore.tokens import encode
from encore.tokens import parts
from stages import tokenize

encode.BATCH_BYTES, parts.PART_TEXT_BYTES = 500, 3000
changes = 0

def count(event, arguments):
    global changes
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir"):
        changes += 1
        if changes == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)

tokenize.record_stage = lambda *arguments: None  # comes when all results are there
sys.addaudithook(count)
tokenize.main()
print(changes)
"""


def start_python(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=pipeline_environment(ENCORE_WORKERS="2", PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        text=True,
    )


def test_killed_at_any_moment_the_next_run_ends_in_the_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    write_params(token_cap=PLENTY)
    whole = run()
    shutil.rmtree(TOKENS)  # as DVC does before it runs a stage
    output, _ = start_python(KILLED, "0").communicate()
    assert read_folder(TOKENS) == whole
    changes = int(output.splitlines()[-1])
    finished = set()
    for moment in np.linspace(1, changes, 8, dtype=int):
        shutil.rmtree(TOKENS)
        process = start_python(KILLED, str(moment))
        assert process.communicate()[0].count("tokens of") == 0
        assert process.returncode == -signal.SIGKILL
        assert not TOKENS.exists() or read_folder(TOKENS) == whole
        left = len(list(SCRATCH.glob("*/part-*/part.json")))
        capsys.readouterr()
        assert run() == whole
        assert (f"encore: note: {left} of 5 parts are in .encore/tokens/" in capsys.readouterr().out) == (left > 0)
        assert sorted(path.name for path in Path("data").iterdir()) == ["raw", "tokens"]
        assert [path for path in SCRATCH.iterdir() if path.is_dir()] == []
        finished.add(left)
    assert len(finished) > 3


# Says when it has to wait for a lock.
WAITING = """
from filelock import FileLock, Timeout
from encore.tokens import encode
from encore.tokens import parts
from stages import tokenize

class TellingLock(FileLock):
    def __enter__(self):
        try:
            return self.acquire(timeout=0)
        except Timeout:
            print("waits", flush=True)
            return self.acquire()

encode.BATCH_BYTES, parts.PART_TEXT_BYTES, parts.FileLock = 500, 3000, TellingLock
tokenize.main()
"""


def test_of_two_at_once_the_second_waits_and_both_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run()
    others: list[subprocess.Popen] = []
    encode_all = parts.encode_all

    def start_another_first(*arguments: Any) -> Iterator[Any]:
        if not others:
            others.append(start_python(WAITING))
            assert others[0].stdout.readline() == "waits\n"
        return encode_all(*arguments)

    monkeypatch.setattr(parts, "encode_all", start_another_first)
    assert run() == alone
    output, _ = others[0].communicate()
    assert others[0].returncode == 0
    said = [line.split(":")[0].split()[0] for line in output.splitlines()]
    assert said == ["learning", "train", "val"], "no note: it finds no parts"
    assert read_folder(TOKENS) == alone
