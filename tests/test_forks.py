"""tests/forks.py against Python as it starts by itself."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import pipeline_environment
from tests.forks import fast_starts

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="a fork is Linux's here")]

# What a program can see of how it was started, its process and its session aside.
LOOKS = """
import json, os, signal, sys

def split(name):
    return open(f"/proc/self/{name}").read().rstrip("\\0").split("\\0")

print(json.dumps({
    "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "name": __name__, "file": globals().get("__file__"),
    "folder": os.getcwd(), "environment": dict(os.environ), "shown": [split("cmdline"), sorted(split("environ"))],
    "signals": [str(signal.getsignal(number)) for number in signal.valid_signals()],
    "parent": os.getppid(), "leads": [os.getpid() == os.getsid(0), os.getpid() == os.getpgid(0)],
    "group": os.getpgid(0) == os.getpgid(os.getppid()), "threads": len(os.listdir("/proc/self/task")),
    "typed": sys.stdin.read(), "files": sorted(set(os.listdir("/proc/self/fd")) & set("012")),
}))
"""


@pytest.fixture
def program(tmp_path):
    """A module that writes down how it was started, in a folder that is on no path but its own."""
    (tmp_path / "looks.py").write_text(LOOKS)
    (tmp_path / "sitecustomize.py").write_text("import os\nos.environ['SITE'] = 'seen'\n")
    return tmp_path


def start(folder, *words, fast, **how):
    environment = pipeline_environment(PYTHONPATH=str(folder), MINE="a=b\nc")
    command = [sys.executable, *words]
    settings = {"cwd": folder, "env": environment, "input": "typed", "capture_output": True, "text": True, **how}
    if not fast:
        return subprocess.run(command, **settings)
    with fast_starts():
        return subprocess.run(command, **settings)


@pytest.mark.parametrize("words", [["-m", "looks", "-x", "a b"], ["-u", "-m", "looks"], ["-c", LOOKS, "y"]])
@pytest.mark.parametrize("how", [{}, {"start_new_session": True}])
def test_a_program_sees_what_it_would_see_if_python_had_started_it(program, words, how):
    there, here = (json.loads(start(program, *words, fast=fast, **how).stdout) for fast in (False, True))
    assert here["parent"] == os.getpid()
    assert here["environment"]["SITE"] == "seen"
    assert here == {**there, "orig_argv": [word for word in there["orig_argv"] if word != "-u"], "shown": here["shown"]}
    assert here["shown"][0] == here["orig_argv"]
    assert set(there["shown"][1]) == set(here["shown"][1])


def test_torch_is_there_already(program):
    code = "import sys; print('torch' in sys.modules, 'encore' in sys.modules, 'stages' in sys.modules)"
    assert start(program, "-c", code, fast=True).stdout == "True False False\n"
    assert start(program, "-c", code, fast=False).stdout == "False False False\n"


ENDINGS = {
    "the end": "",
    "a number": "sys.exit(7)",
    "a large number": "sys.exit(300)",
    "a sentence": "sys.exit('a sentence')",
    "nothing": "sys.exit()",
    "at once": "os._exit(9)",
    "an error": "raise ValueError('wrong')",
    "Ctrl-C": "raise KeyboardInterrupt",
    "a signal": "os.kill(os.getpid(), signal.SIGTERM)",
    "a thread": "threading.Thread(target=lambda: (time.sleep(0.1), print('later'))).start()",
    "what comes last": "atexit.register(print, 'last')",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_ends_as_under_python(program, ending):
    code = f"import atexit, os, signal, sys, threading, time; print('begun'); {ENDINGS[ending]}"
    there, here = (start(program, "-c", code, fast=fast) for fast in (False, True))
    assert (here.returncode, here.stdout) == (there.returncode, there.stdout)
    assert here.stderr.splitlines()[-1:] == there.stderr.splitlines()[-1:]


def test_ignored_signals_stay_ignored(program):
    code = "import signal; print(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP))"
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        there, here = (start(program, "-c", code, fast=fast).stdout for fast in (False, True))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert here == there == "1 1\n"


def test_what_a_program_starts_is_its_child_and_fast_too(program):
    (program / "below.py").write_text("import os, sys; print(os.getppid(), 'torch' in sys.modules)")
    code = """
import os, subprocess, sys
print(os.getpid(), True, flush=True)
subprocess.run([sys.executable, "-m", "below"], check=True)
subprocess.run(["/bin/sh", "-c", "exec python -m below"], check=True)
"""
    first, *others = start(program, "-c", code, fast=True).stdout.splitlines()
    assert others == [first, first]


def test_a_program_that_is_killed_leaves_nothing_behind(program):
    code = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
    with fast_starts():
        process = subprocess.Popen([sys.executable, "-c", code], env=pipeline_environment(), stdout=subprocess.PIPE)
    with process:
        assert int(process.stdout.readline()) == process.pid
        process.kill()
        assert process.stdout.read() == b""  # nobody else holds it open
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("name", "value"), [("OMP_NUM_THREADS", "2"), ("PYTHONHASHSEED", "1"), ("LC_ALL", "C")])
def test_other_settings_of_python_itself_are_heeded(program, name, value):
    """By an ordinary start, where torch has not been imported."""
    environment = pipeline_environment(**{name: value})
    code = "import os, sys; print('torch' in sys.modules)"
    assert start(program, "-c", code, fast=True, env=environment).stdout == "False\n"
