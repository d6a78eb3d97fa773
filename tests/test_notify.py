"""ENCORE_NOTIFY: what the user's command is told, and that nothing else depends on it."""

import signal
from pathlib import Path

import pytest

from encore import notify
from encore.errors import EncoreError, Interrupted, run_stage


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to which the command appends what it is told."""
    path = tmp_path / "told.txt"
    monkeypatch.setenv("ENCORE_NOTIFY", f'printf "%s\\n" "$1" >> {path}')
    monkeypatch.setenv("DVC_STAGE", "train")
    path.touch()
    return path


def fail(error: BaseException) -> None:
    def main() -> None:
        raise error

    with pytest.raises((SystemExit, type(error))):
        run_stage(main)


def test_the_command_gets_the_sentence_as_it_is(told: Path) -> None:
    notify.notify("""it's 2 > 1 "and" $HOME `true` \\ 50 %""")
    assert told.read_text() == """train: it's 2 > 1 "and" $HOME `true` \\ 50 %\n"""


def test_failures_are_told_and_ctrl_c_is_not(told: Path) -> None:
    fail(EncoreError("the loss is nan; lower learning_rate"))
    fail(Interrupted(signal.SIGTERM, "SIGTERM: saved at iteration 5"))
    fail(OSError(28, "No space left on device", "model.safetensors"))
    fail(ZeroDivisionError("division by zero"))
    fail(Interrupted(signal.SIGINT, "SIGINT: saved at iteration 5"))
    fail(KeyboardInterrupt())
    lines = told.read_text().splitlines()
    assert lines[:2] == ["train: the loss is nan; lower learning_rate", "train: SIGTERM: saved at iteration 5"]
    assert "No space left" in lines[2] or "full" in lines[2]
    assert lines[3:] == ["train: ZeroDivisionError: division by zero"]


def test_one_process_of_several_speaks_and_commands_do_not(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    fail(EncoreError("a rank's"))
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.delenv("DVC_STAGE")
    fail(EncoreError("of `encore generate`"))
    assert told.read_text() == ""


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("exit 3", "it ended with exit code 3"),
        ("exec sleep 10", "it was not done within 0.2 s"),
    ],
)
def test_a_command_that_fails_is_a_note(
    command: str, reason: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ENCORE_NOTIFY", command)
    monkeypatch.setattr(notify, "SECONDS_TO_WAIT", 0.2)
    notify.notify("ended")
    said = capfd.readouterr().err
    assert said == f"encore: note: ENCORE_NOTIFY: {reason}; it was to be told: encore: ended\n"


def test_what_the_command_prints_goes_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ENCORE_NOTIFY", "echo sent")
    notify.notify("ended")
    assert capfd.readouterr() == ("", "sent\n")
