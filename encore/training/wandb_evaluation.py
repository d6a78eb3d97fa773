"""What the evaluate stage adds to the wandb run of the model: its numbers, its samples and, if asked for, the model."""

import os
from pathlib import Path
from typing import Any

from encore.files import sha256_of
from encore.json_files import flatten
from encore.progress import note
from encore.training.wandb_run import SECONDS_TO_FINISH, find_run, is_wanted

LOG_MODEL = ("true", "1", "end", "checkpoint")  # wandb's own words; the trained model is sent for each of them
SLOWEST_BYTES_PER_SECOND = 1e6


def send_evaluation(model: Path, record: Path, result: dict[str, Any], start: str, samples: list[str]) -> None:
    """Adds to the run of the model in the folder `model`; a note says so where no such run is known here.

    record: the model's encore.json, which others' models have not. result: what eval.json holds. Each sample follows
    the prompt `start`.
    """
    if not is_wanted():
        return
    run = find_run(sha256_of(record)) if record.is_file() else None
    if run is None:
        note("wandb gets no evaluation: the model was not trained here with WANDB_MODE set, or trained again since")
        return
    # In the summary and not in the history, whose steps are the iterations: a longer training may go on after the last.
    # `wandb sync` puts the newest folder's summary in the place of the earlier ones', so it is given whole.
    numbers = {**run.record["summary"], **flatten(result, "/")}
    run.ask(lambda wandb_run: wandb_run.summary.update({**numbers, "samples": _make_table(start, samples)}))
    seconds = SECONDS_TO_FINISH
    if os.environ.get("WANDB_LOG_MODEL", "").lower() in LOG_MODEL:
        run.ask(lambda wandb_run: _send_model(wandb_run, model))
        seconds += sum(path.stat().st_size for path in model.iterdir()) / SLOWEST_BYTES_PER_SECOND
    run.end(seconds=seconds)


def _make_table(start: str, samples: list[str]) -> Any:
    import wandb

    return wandb.Table(columns=["prompt", "sample"], data=[[start, sample] for sample in samples])


def _send_model(run: Any, folder: Path) -> None:
    import wandb

    artifact = wandb.Artifact(f"model-{run.id}", type="model")
    for path in sorted(folder.iterdir()):  # add_dir would print a line
        artifact.add_file(str(path), policy="immutable")
    run.log_artifact(artifact)
