"""history.jsonl: which stage ran here, when, and for how long; what a report cannot learn from the results themselves.

Results must not change with the clock, so these lines lie in the scratch folder, one for each stage that has succeeded.
A result is found again by the hash of a small file of it, its witness.
"""

import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil

from encore.files import sha256_of
from encore.json_files import seal
from encore.scratch import scratch_folder

HISTORY = "history.jsonl"


def record_stage(stage: str, witness: Path, started: float) -> None:
    """Appends the line of a stage that began at `started` (seconds of time.time()); call it when all results are there.

    witness: a small file of the result, another one where the result is another. A history that cannot be written is
    no reason to fail a stage that has succeeded: a note says so.
    """
    try:
        run = _find_dvc()
        line = {
            "stage": stage,
            "started": as_utc(started),
            "seconds": round(time.time() - started, 2),
            "run": {"pid": run.pid, "started": as_utc(run.create_time())},
            "witness": witness.as_posix(),
            "sha256": sha256_of(witness),
        }
        path = scratch_folder() / HISTORY
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:  # one write, so that stages which end together do not mix
            file.write((json.dumps(seal(line)) + "\n").encode())
    except (OSError, psutil.Error) as error:
        print(f"encore: note: this run is not in {HISTORY} ({error}); its results are whole", file=sys.stderr)


def as_utc(seconds: float) -> str:
    """ISO 8601 with milliseconds, of seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _find_dvc() -> psutil.Process:
    """The dvc that started the stage; the stage's own process where none did."""
    process = psutil.Process()
    return next((parent for parent in process.parents() if _is_dvc(parent)), process)


def _is_dvc(process: psutil.Process) -> bool:
    try:
        return any(os.path.basename(part) == "dvc" for part in process.cmdline()[:3])  # dvc ..., python -m dvc ...
    except psutil.Error:  # another user's, or just gone
        return False
