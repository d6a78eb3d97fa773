"""Which run a checkpoint belongs to: a folder in scratch, named by what the weights depend on, for one trainer.

A changed parameter has another folder and never meets a stranger's state; an unchanged one always resumes.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from encore.errors import EncoreError
from encore.files import remove_leftovers, write_json
from encore.json_files import read_json
from encore.schemas import RunIdentity

IDENTITY = "run.json"
# Where to stop and what to keep: they change no step on the way.
FREE = {"max_iters", "checkpoint_interval", "keep_checkpoints"}


def identity(params: dict[str, Any], data_sha256: str, init_sha256: str | None = None) -> dict[str, Any]:
    """What every step of a run depends on. max_iters is among it only where the schedule follows it.

    The hashes are those of the manifests of data/tokens and, where training does not start from scratch, data/init.
    """
    steps = {key: value for key, value in params.items() if key not in FREE}
    decay = params["lr_decay_iters"] or params["max_iters"]
    return {**steps, "lr_decay_iters": decay, "data_sha256": data_sha256, "init_sha256": init_sha256}


def fingerprint(identity: dict[str, Any]) -> str:
    """16 hex digits that name a run."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def find_other_schedule(folder: Path, identity: dict[str, Any]) -> Path | None:
    """A run beside `folder` that differs from `identity` in where its learning rate's decay ends, and in nothing else.

    Who has raised max_iters may have meant to go on with it.
    """
    for path in sorted(folder.parent.glob(f"*/{IDENTITY}")):
        try:
            other = read_json(path, RunIdentity)
        except EncoreError:  # a stranger's, damaged
            continue
        if path.parent != folder and {**other, "lr_decay_iters": None} == {**identity, "lr_decay_iters": None}:
            return path.parent
    return None


@contextmanager
def locked(folder: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Holds the run's folder for this process; the lock goes with the process however it ends. What earlier ones were
    killed in the middle of writing is removed.

    Raises EncoreError where another trainer, an orphan perhaps, holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / "lock"), folder / "lock.pid"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        process = owner.read_text() if owner.exists() else "unknown"
        raise EncoreError(
            f"{folder}: another trainer (process {process}) is at work on this run; wait for it, or end it"
        ) from None
    try:
        owner.write_text(str(os.getpid()))
        remove_leftovers(folder)  # checkpoints that a kill cut off; who wrote them is dead, or would hold the lock
        write_json(folder / IDENTITY, identity)
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
