"""How Encore fails: one sentence on standard error and a non-zero exit code. A traceback means a bug of ours."""

import sys
from collections.abc import Callable

from encore.notify import notify_of_failure
from encore.streams import keep_printing
from encore.system_errors import explain

CTRL_C = 130  # the exit code of what it ends


class EncoreError(Exception):
    """Something that the user can mend. The message names the file, key or value, and the way out."""


class Interrupted(Exception):
    """A signal asked the stage to stop early, and the stage has saved what it had.

    The exit code is 128 + `signal_number`, as a shell would give it. It must not be 0: DVC would commit
    the unfinished stage as complete. Without a message it ends in silence, as a rank does that only went along.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def bring_back(output: str, stage: str) -> str:
    """The way out where an output of a stage is damaged, as the end of a sentence."""
    return (
        f"`dvc repro -s -f {stage}` makes {output} anew, and `encore verify` tells whether "
        f"`dvc checkout --force {output}` is enough"
    )


def run_stage(main: Callable[[], None]) -> None:
    """Runs a stage's `main` and turns the failures that a user can mend into a sentence and an exit code."""
    keep_printing()
    try:
        main()
    except EncoreError as error:
        _exit(str(error), 1)
    except Interrupted as stop:
        _exit(str(stop), stop.exit_code)
    except KeyboardInterrupt:
        _exit("stopped by Ctrl-C; run the same command to go on", CTRL_C)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            notify_of_failure(f"{type(error).__name__}: {error}")
            raise
        _exit(sentence, 1)


def _exit(message: str, exit_code: int) -> None:
    sys.stdout.flush()
    if message:
        print(f"encore: {message}", file=sys.stderr, flush=True)
    if exit_code != CTRL_C:  # whoever pressed it knows
        notify_of_failure(message)
    raise SystemExit(exit_code)
