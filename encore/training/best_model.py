"""ENCORE_BEST_MODEL=FOLDER: the model with the run's lowest val loss, kept as a folder like model/.

The rows of eval.tsv decide, which a resumed run takes up from its checkpoint; so a run that was killed behind the
writing of the folder finds the same model again and writes it again. What training starts from is never written:
random weights are of no use, and others lie in data/init.
"""

import os
from operator import itemgetter
from pathlib import Path
from typing import Any

from encore.errors import EncoreError
from encore.pretrained.init_from import RECORD, read_record
from encore.pretrained.model_card import CARD
from encore.progress import note
from encore.schemas import ModelRecord
from encore.training import run_folder

SETTING = "ENCORE_BEST_MODEL"
OUTPUTS = ("data", "metrics", "model", "training.log")  # of the pipeline, which DVC removes and replaces


def find_best_folder() -> Path | None:
    """The folder that the environment names, None where it names none. A link is followed.

    Raises EncoreError where a model cannot be put there, or something else would be lost.
    """
    name = os.environ.get(SETTING)
    if not name:
        return None
    folder = Path(name).resolve() if Path(name).is_symlink() else Path(name)
    place = folder.resolve()
    if output := next((each for each in OUTPUTS if place.is_relative_to(Path(each).resolve())), None):
        raise EncoreError(f"{SETTING}: {folder} lies in {output}, an output of the pipeline; name a folder elsewhere")
    parent = existing_parent(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK) or (folder.exists() and not folder.is_dir()):
        raise EncoreError(f"{SETTING}: there can be no folder {folder}; name one in a folder that you may write to")
    if stranger := _find_stranger(folder):
        raise EncoreError(
            f"{SETTING}: {folder} holds {stranger}, which belongs to no model of Encore's and would be lost; name "
            "another folder, which need not be there"
        )
    return folder


def existing_parent(folder: Path) -> Path:
    """The nearest one that is there."""
    return next(each for each in folder.absolute().parents if each.exists())


def is_best(rows: list[dict[str, Any]]) -> bool:
    """Whether the last of a run's evaluations has a lower val loss than every other one, and is not the one before the
    first step."""
    *earlier, last = rows
    return last["iter"] > 0 and all(last["val_loss"] < row["val_loss"] for row in earlier)


def note_what_is_past(folder: Path, rows: list[dict[str, Any]], identity: dict[str, Any], max_iters: int) -> None:
    """Says so where the lowest val loss of a resumed run is that of a model which the folder does not hold.

    The folder may hold a later one: that of a step which a kill has undone, and which is done again.
    """
    best = min(rows, key=itemgetter("val_loss"))
    record = read_record(folder) if folder.is_dir() else None
    is_there = record and _is_of_run(record, identity) and best["iter"] <= record.get("iter", 0) <= max_iters
    if best["iter"] > 0 and not is_there:
        note(
            f"{SETTING}: the model with the lowest val loss so far, {best['val_loss']:.4f} at iteration "
            f"{best['iter']}, was not kept; {folder} gets the first one that is better"
        )


def _find_stranger(folder: Path) -> str | None:
    """The name of something in the folder that is no file of a model of ours."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    record = read_record(folder) if RECORD in there else None
    ours = {*record.get("files_sha256", {}), RECORD, CARD} if record else set()
    return min(there - ours, default=None)


def _is_of_run(record: ModelRecord, identity: dict[str, Any]) -> bool:
    try:
        return run_folder.identity(record["params"], record["data_sha256"], record["init_sha256"]) == identity
    except KeyError:  # it was saved without training, or by an Encore that had other parameters
        return False
