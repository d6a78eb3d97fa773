"""Threads that work ahead of their reader, pass on what fails, and keep no process from ending."""

import subprocess
import sys
import threading
import time

import pytest

from encore.threads import Threads
from tests.conftest import ROOT


def test_map_keeps_the_order_and_takes_few_items_ahead() -> None:
    taken: list[int] = []

    def items():
        for number in range(1_000):
            taken.append(number)
            yield number

    def square(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number**2

    with Threads(4) as threads:
        results = threads.map(square, items())
        assert [next(results) for _ in range(10)] == [number**2 for number in range(10)]
        assert len(taken) <= 10 + 4 - 1
        assert list(threads.map(square, range(3))) == [0, 1, 4]


def test_map_raises_in_its_turn() -> None:
    with Threads(4) as threads:
        results = threads.map(lambda number: 1 // number, [1, 1, 0, 1])
        assert [next(results), next(results)] == [1, 1]
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_run_all_works_at_once_and_does_not_wait_behind_a_failure() -> None:
    together = threading.Barrier(3)
    begun: list[int] = []

    def work(number: int, stopping: threading.Event) -> int:
        begun.append(number)
        if number < 3:
            together.wait(10)  # only three at once get past
        elif number == 4:
            raise ValueError("four")
        elif number > 4:
            stopping.wait(10)
        return -number

    with Threads(3) as threads:
        assert threads.run_all(lambda number: work(number, threads.stopping), range(3)) == [0, -1, -2]
        with pytest.raises(ValueError, match="four"):
            threads.run_all(lambda number: work(number, threads.stopping), range(3, 100))
    assert len(begun) < 10
    assert not [thread for thread in threading.enumerate() if "_work" in thread.name]


def test_a_thread_that_hangs_does_not_keep_the_process() -> None:
    code = """
import threading
from encore import threads
threads.SECONDS_TO_END = 0.1
with threads.Threads(2) as two:
    begun = threading.Event()
    def hang(item):
        begun.set()
        threading.Event().wait()
    two._submit(hang, 0)
    begun.wait()
print("end")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
