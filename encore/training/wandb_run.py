"""Weights & Biases, when the environment asks for it (WANDB_MODE=online or offline). It never stops a training.

A thread of its own speaks to wandb, so that training waits neither for a slow server nor for one that is not there.
"""

import os
import secrets
import sys
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

MODES = (
    "online",
    "offline",
    "run",
    "dryrun",
)  # the last two are wandb's old words for the first two, and it knows them
SECONDS_TO_START = 30.0
SECONDS_TO_FINISH = 60.0  # how long a finished training waits for wandb to have sent the rest


class WandbRun:
    """A wandb run whose failures are told once and then ignored. id: its name at wandb, by which it is continued."""

    def __init__(self, id: str, start: Callable[[], Any]) -> None:
        """start: opens the run; it and all that follows are done in a thread."""
        self.id = id
        self._calls: SimpleQueue[Callable[[Any], object] | None] = SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._speak, args=(start,), name="wandb", daemon=True)
        self._thread.start()

    def log(self, values: dict[str, Any]) -> None:
        """A row of the run's history."""
        self._ask(lambda run: run.log(values))

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes the summary and ends the run; waits for it, but not for ever."""
        self._ask(lambda run: run.summary.update(summary))
        self._ask(lambda run: run.finish())
        self._calls.put(None)
        self._thread.join(SECONDS_TO_FINISH)
        if self._thread.is_alive():
            _note(f"wandb has not ended the run in {SECONDS_TO_FINISH:.0f} s; `wandb sync` sends what lies in wandb/")

    def _ask(self, call: Callable[[Any], object]) -> None:
        if not self._failed:
            self._calls.put(call)

    def _speak(self, start: Callable[[], Any]) -> None:
        what = "did not start"
        try:
            run = start()
            what = "failed"
            while call := self._calls.get():
                call(run)
        except (
            Exception
        ) as error:  # whatever wandb raises (not installed, not logged in, not reachable), training goes on
            self._failed = True
            _note(f"wandb {what} ({error}); training goes on without it")


def start_wandb(config: dict[str, Any], run_id: str | None) -> WandbRun | None:
    """Starts a run, or continues `run_id`, in the mode that WANDB_MODE names; None where it asks for none."""
    mode = os.environ.get("WANDB_MODE") or "disabled"
    if mode not in MODES:
        if mode != "disabled":
            _note(f"WANDB_MODE={mode} is none of {', '.join(MODES)}; training goes on without wandb")
        return None
    name = run_id or secrets.token_hex(4)
    return WandbRun(name, partial(_open, config, name))


def _open(config: dict[str, Any], run_id: str) -> Any:
    """wandb's run; where its server does not answer an offline one, so that nothing is lost."""
    import wandb

    settings = wandb.Settings(silent=True, init_timeout=SECONDS_TO_START)
    project = os.environ.get("WANDB_PROJECT", "encore")
    init = partial(wandb.init, project=project, config=config, id=run_id, resume="allow", settings=settings)
    try:
        run = init()
    except wandb.errors.CommError as error:
        _note(f"wandb's server cannot be reached ({error}); the run is kept in wandb/, and `wandb sync` sends it")
        wandb.teardown()  # its own process holds the first attempt
        run = init(mode="offline")
    run.define_metric("*", step_metric="iter")
    return run


def _note(message: str) -> None:
    print(f"encore: note: {message}", file=sys.stderr, flush=True)
