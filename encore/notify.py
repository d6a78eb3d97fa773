"""ENCORE_NOTIFY: a command of the user's that is told when training or evaluation has ended, and when a stage fails.

    ENCORE_NOTIFY='curl -d "$1" ntfy.sh/my-runs' dvc repro

The sentence is `$1` of the command, which a shell runs. What the command does or fails to do changes nothing else.
"""

import os
import subprocess
import sys

SETTING = "ENCORE_NOTIFY"
SECONDS_TO_WAIT = 60


def notify(sentence: str) -> None:
    """Runs the command, with the stage's name before the sentence; nothing where none is set."""
    command = os.environ.get(SETTING)
    if not command:
        return
    text = f"{os.environ.get('DVC_STAGE', 'encore')}: {sentence}"
    try:
        done = subprocess.run(["/bin/sh", "-c", command, "sh", text], stdout=sys.stderr, timeout=SECONDS_TO_WAIT)
        trouble = f"it ended with exit code {done.returncode}" if done.returncode else None
    except subprocess.TimeoutExpired:
        trouble = f"it was not done within {SECONDS_TO_WAIT} s"
    except OSError as error:
        trouble = str(error)
    if trouble:
        print(f"encore: note: {SETTING}: {trouble}; it was to be told: {text}", file=sys.stderr, flush=True)


def notify_of_failure(sentence: str) -> None:
    """The same, of a stage that dvc runs; of several processes only the one that started them speaks."""
    if sentence and "DVC_STAGE" in os.environ and "LOCAL_RANK" not in os.environ:
        notify(sentence)
