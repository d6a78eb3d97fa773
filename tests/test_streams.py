"""encore/streams.py: printing never ends a stage. In processes of their own, whose streams are closed."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

STAGE = """
import os, sys
from pathlib import Path
from encore.errors import run_stage

def main():
    for number in range(3):
        print("line", number, "x" * 10_000, flush=True)
        print("a note", file=sys.stderr)
    os.system("echo from a child")
    Path(sys.argv[1]).write_text("done")

run_stage(main)
"""


def run(tmp_path, script=STAGE, **how):
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "done"], cwd=ROOT, **how)
    return done.returncode, (tmp_path / "done").exists() and (tmp_path / "done").read_text()


@pytest.mark.parametrize("streams", [["stdout"], ["stderr"], ["stdout", "stderr"]])
def test_a_pipe_that_nobody_reads_any_more(tmp_path, streams):
    read, write = os.pipe()
    os.close(read)
    others = {name: subprocess.PIPE for name in ("stdout", "stderr") if name not in streams}
    assert run(tmp_path, **dict.fromkeys(streams, write), **others) == (0, "done")
    os.close(write)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_under_a_log(tmp_path):
    with open("/dev/full", "wb") as full:
        assert run(tmp_path, stdout=full, stderr=full) == (0, "done")


def test_a_stream_that_was_never_open(tmp_path):
    assert run(tmp_path, preexec_fn=lambda: (os.close(1), os.close(2))) == (0, "done")


def test_a_failure_keeps_its_exit_code_where_nobody_reads_it(tmp_path):
    script = "from encore.errors import *\ndef main(): raise EncoreError('x')\nrun_stage(main)"
    read, write = os.pipe()
    os.close(read)
    assert run(tmp_path, script, stdout=write, stderr=write) == (1, False)
    os.close(write)


@pytest.mark.parametrize("settings", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_characters_that_the_output_does_not_have_are_escaped(settings):
    script = "from encore.errors import run_stage\nrun_stage(lambda: print('loss 2.0 \\xb1 0.1 \\ud800'))"
    environment = {**os.environ, "PYTHONUTF8": "0", **settings}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True)
    assert (done.stdout, done.stderr, done.returncode) == (b"loss 2.0 \\xb1 0.1 \\ud800\n", b"", 0)


def test_what_is_read_comes_in_order_and_whole(tmp_path):
    """What a stage printed before, and what its children print, is neither lost nor moved."""
    script = "print('before')\n" + STAGE
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "done"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "before\n" + "".join(f"line {n} {'x' * 10_000}\n" for n in range(3)) + "from a child\n"
    assert done.stderr == "a note\n" * 3


def test_without_a_buffer_what_is_printed_is_there_at_once():
    script = "import os\nfrom encore.errors import run_stage\nrun_stage(lambda: (print('a', end=''), os._exit(0)))"
    for setting, expected in (("1", b"a"), ("", b"")):
        environment = {**os.environ, "PYTHONUNBUFFERED": setting}
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True)
        assert done.stdout == expected
