"""ENCORE_TENSORBOARD=FOLDER: the run's curves for TensorBoard, in FOLDER/FINGERPRINT.

A resumed run writes its curves anew, from the checkpoint's rows on, so that each iteration is there once.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encore.progress import note

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SETTING = "ENCORE_TENSORBOARD"
SECONDS_BETWEEN_WRITES = 10


class TensorBoard:
    """The curves of one run. Takes the same rows as wandb."""

    def __init__(self, writer: "SummaryWriter") -> None:
        self._writer = writer

    def log(self, row: dict[str, Any]) -> None:
        """A point of each curve that the row has a number for, and the text that it has."""
        for name, value in row.items():
            if isinstance(value, str):
                self._writer.add_text(name, _as_code(value), row["iter"])
            elif name != "iter" and value is not None:
                self._writer.add_scalar(name, value, row["iter"])

    def end(self) -> None:
        """Writes what is left."""
        self._writer.close()


def open_tensorboard(run: str) -> TensorBoard | None:
    """The curves of the run of this name, begun anew; None where nobody asks for them, or, with a note, where
    tensorboard is not installed."""
    folder = os.environ.get(SETTING)
    if not folder:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        note(f"{SETTING}: tensorboard is not installed (`pip install tensorboard`); training goes on without it")
        return None
    place = Path(folder, run)
    for old in place.glob("events.out.tfevents.*"):
        old.unlink()
    note(f"{SETTING}: {place} has the curves; `tensorboard --logdir {folder}` shows them")
    return TensorBoard(SummaryWriter(str(place), flush_secs=SECONDS_BETWEEN_WRITES))


def _as_code(text: str) -> str:
    """Text as a block of Markdown that is shown as it is."""
    return "".join(f"    {line}\n" for line in text.split("\n"))
