"""How training is stopped, in processes of their own."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from encore.signals import SIGNALS, StopRequest
from tests.conftest import ROOT

WAIT = """
import os, signal, sys, time
from encore.signals import SIGNALS, StopRequest, stop_with_parent
stop = StopRequest()
print("ready", os.getpid(), flush=True)
give_up = time.monotonic() + 10
while not stop.signal_number and time.monotonic() < give_up:
    time.sleep(0.01)
print("noted", stop.signal_number, flush=True)
time.sleep(30)
"""


def start(script):
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_second_ends_the_process(first, second):
    with start(WAIT) as process:
        assert process.stdout.readline().startswith("ready")
        process.send_signal(first)
        assert process.stdout.readline() == f"noted {int(first)}\n"
        assert process.poll() is None
        process.send_signal(second)
        assert process.wait(timeout=10) == -second


def test_a_signal_that_the_parent_ignored_is_noted():
    """A shell lets what it starts in the background ignore SIGINT."""
    ignoring = f"import os, signal, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nscript = {WAIT!r}\n"
    with start(ignoring + "os.execv(sys.executable, [sys.executable, '-c', script])") as process:
        assert process.stdout.readline().startswith("ready")
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "noted 2\n"
        process.kill()


def test_the_first_signal_is_noted_and_gives_the_second_its_usual_effect():
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGHUP)}
    try:
        stop = StopRequest()
        assert stop.signal_number is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL, signal.SIG_DFL]
        assert signal.getsignal(signal.SIGHUP) == stop._note
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_hangup_is_noted_however_often_it_comes_and_is_not_the_first_of_two():
    with start(WAIT) as process:
        assert process.stdout.readline().startswith("ready")
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "noted 1\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGHUP)
        assert process.poll() is None
        while process.poll() is None:  # the other SIGTERM is one more than the first
            process.send_signal(signal.SIGTERM)
        assert process.returncode == -signal.SIGTERM


def test_nohup_is_honoured():
    ignoring = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + WAIT
    with start(ignoring) as process:
        assert process.stdout.readline().startswith("ready")
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "noted 15\n"
        process.kill()


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}])
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_child_is_told_when_its_parent_is_killed():
    child = WAIT.replace("stop = StopRequest()", "stop = StopRequest()\nstop_with_parent()")
    with start(PARENT.format(child=child)) as parent:
        ready = parent.stdout.readline()
        assert ready.startswith("ready")
        parent.kill()
        try:
            assert parent.stdout.readline() == "noted 15\n"
        finally:
            os.kill(int(ready.split()[1]), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("first", SIGNALS)
def test_a_parent_that_dies_of_the_same_signal_is_no_second_request(first):
    """A batch system, or a terminal, sends it to all processes at once."""
    child = WAIT.replace("stop = StopRequest()", "stop = StopRequest()\nstop_with_parent()")
    child = child.replace(
        "time.sleep(30)", "while os.getppid() == parent: time.sleep(0.01)\nprint('lives', flush=True)"
    )
    child = child.replace("print(", "parent = os.getppid()\nprint(", 1)
    with start(PARENT.format(child=child)) as parent:
        pid = int(parent.stdout.readline().split()[1])
        os.kill(pid, first)
        assert parent.stdout.readline() == f"noted {int(first)}\n"
        parent.kill()
        assert parent.stdout.readline() == "lives\n"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize(("session_of_1", "noted"), [(1, "15"), (7, "None")])
def test_an_orphan_from_the_start_is_not_what_process_1_started(session_of_1, noted):
    script = textwrap.dedent(f"""
        import os
        from encore.signals import StopRequest, stop_with_parent
        stop = StopRequest()
        os.getppid = lambda: 1
        os.getsid = {{0: 7, 1: {session_of_1}}}.get
        stop_with_parent()
        print("noted", stop.signal_number)
    """)
    assert start(script).communicate(timeout=10)[0] == f"noted {noted}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_parent_that_died_just_before_is_noticed():
    script = textwrap.dedent("""
        import os
        from encore.signals import SIGNALS, StopRequest, stop_with_parent
        stop = StopRequest()
        parents = iter([12345, 1])
        os.getppid = lambda: next(parents)
        stop_with_parent()
        print("noted", stop.signal_number)
    """)
    assert start(script).communicate(timeout=10)[0] == "noted 15\n"
