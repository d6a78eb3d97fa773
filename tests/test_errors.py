"""encore/errors.py: what a user sees and what DVC gets when a stage fails."""

import errno
import signal
from collections.abc import Callable

import pytest

from encore.errors import EncoreError, Interrupted, run_stage
from encore.system_errors import explain


def stage_that_raises(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        print("the stage's own line")
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "exit_code", "sentence"),
    [
        (EncoreError("params.yaml is missing; write one"), 1, "params.yaml is missing; write one"),
        (Interrupted(signal.SIGTERM, "stopped; run it again"), 143, "stopped; run it again"),
        (Interrupted(signal.SIGUSR1, "out of time"), 128 + signal.SIGUSR1, "out of time"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C; run the same command to go on"),
    ],
)
def test_one_sentence_and_an_exit_code(
    error: BaseException, exit_code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_stage(stage_that_raises(error))
    assert stop.value.code == exit_code
    printed = capsys.readouterr()
    assert printed.err == f"encore: {sentence}\n"
    assert printed.out == "the stage's own line\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), KeyError("x"), AssertionError()])
def test_any_other_exception_is_a_bug_of_ours_and_keeps_its_traceback(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error)) as raised:
        run_stage(stage_that_raises(error))
    assert raised.value is error
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error", "a.bin"), MemoryError()])
def test_what_the_system_refuses_is_a_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_stage(stage_that_raises(error))
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"encore: {explain(error)}\n"


def test_a_stage_that_succeeds_just_returns(capsys: pytest.CaptureFixture[str]) -> None:
    run_stage(lambda: print("done"))
    assert capsys.readouterr() == ("done\n", "")
