"""Weights & Biases, when the environment asks for it (WANDB_MODE=online or offline). It never stops a training."""

import os
import sys
from collections.abc import Callable
from typing import Any


class WandbRun:
    """A wandb run whose failures are told once and then ignored."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._healthy = True

    @property
    def id(self) -> str:
        """wandb's name for the run, by which it is continued."""
        return str(self._run.id)

    def log(self, values: dict[str, Any]) -> None:
        """A row of the run's history."""
        self._try(lambda: self._run.log(values))

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes the summary and ends the run."""
        self._try(lambda: self._run.summary.update(summary))
        self._try(self._run.finish)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            if self._healthy:
                action()
        except Exception as error:  # whatever wandb raises, training goes on
            self._healthy = False
            print(f"encore: note: wandb failed ({error}); training goes on without it", file=sys.stderr)


def start_wandb(config: dict[str, Any], run_id: str | None) -> WandbRun | None:
    """Starts a run, or continues `run_id`, in the mode that WANDB_MODE names; None where it asks for none."""
    if os.environ.get("WANDB_MODE", "disabled") not in ("online", "offline"):
        return None
    try:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "encore")
        settings = wandb.Settings(silent=True)
        run = wandb.init(project=project, config=config, id=run_id, resume="allow", settings=settings)
        run.define_metric("*", step_metric="iter")
    except Exception as error:  # not installed, not logged in, not reachable
        print(f"encore: note: wandb did not start ({error}); training goes on without it", file=sys.stderr)
        return None
    return WandbRun(run)
