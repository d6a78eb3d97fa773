"""Weights & Biases, when the environment asks for it (WANDB_MODE=online or offline). It never stops a stage.

A thread of its own speaks to wandb, so that a stage waits neither for a slow server nor for one that is not there.

A resumed run gives wandb the rows of the checkpoint that wandb lacks, and then its own. Online the server says what it
has: where a kill came first, that is less than wandb was given. Offline SCRATCH/checkpoints/FINGERPRINT/wandb.json says
up to which iteration the folders have the rows that were closed. wandb writes a folder in blocks of 32 KiB, so a kill
leaves one torn, and `wandb sync` then sends none of the run's folders; so the next start removes it.
"""

import html
import os
import secrets
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from encore.errors import EncoreError
from encore.files import write_json
from encore.json_files import read_json
from encore.progress import note
from encore.schemas import WandbRecord
from encore.scratch import scratch_folder

MODES = (
    "online",
    "offline",
    "run",
    "dryrun",
)  # the last two are wandb's old words for the first two, and it knows them
RECORD = "wandb.json"
SECONDS_TO_START = 30.0
SECONDS_TO_FINISH = 60.0  # how long a finished stage waits for wandb to have sent the rest


class WandbRun:
    """A wandb run whose failures are told once and then ignored."""

    def __init__(self, folder: Path, record: WandbRecord, start: Callable[[], Any]) -> None:
        """folder: where the record is kept. start: opens the run; it and all that follows are done in a thread."""
        self.record = record
        self._folder = folder
        self._row: dict[str, Any] = {}  # not given to wandb yet, since more may come of the same iteration
        self._last_values: dict[str, Any] = {}  # what wandb makes a summary of by itself
        self._calls: SimpleQueue[Callable[[Any], object] | None] = SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._speak, args=(start,), name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        """A row of the run's history. What comes of one iteration becomes one row; what wandb has is left out."""
        if self._row and self._row["iter"] != row["iter"]:
            self._send_row()
        self._row |= row

    def ask(self, call: Callable[[Any], object]) -> None:
        """Does something with wandb's run, after all that was asked before."""
        if not self._failed:
            self._calls.put(call)

    def finish(self, summary: dict[str, Any], model_sha256: str) -> None:
        """Writes the summary and ends the run. model_sha256: of the model's encore.json, by which `find_run` knows the
        run."""
        self._send_row()
        self.ask(partial(self._summarize, summary, model_sha256))
        self.end()

    def end(self, exit_code: int = 0, seconds: float | None = None) -> None:
        """Ends the run; waits for it, but no longer than `seconds`. exit_code: other than 0, the run failed."""
        seconds = SECONDS_TO_FINISH if seconds is None else seconds
        self._send_row()
        self.ask(partial(self._close, exit_code))
        self._calls.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._failed = True  # what else goes wrong has been told with this
            note(f"wandb has not ended the run in {seconds:.0f} s; `wandb sync` sends what lies in wandb/")

    def _send_row(self) -> None:
        if row := self._row:
            self._row = {}
            self.ask(partial(self._log, row))

    def _log(self, row: dict[str, Any], run: Any) -> None:
        pages = {name: _make_page(value) for name, value in row.items() if isinstance(value, str)}
        if row["iter"] > self.record["iter"]:
            run.log(row | pages, step=row["iter"], commit=True)
            self.record["iter"] = row["iter"]
        else:
            for name, page in pages.items():  # a kill may have lost it: files are sent apart from the rows
                page.bind_to_run(run, name, row["iter"])
        self._last_values |= {name: value for name, value in row.items() if name not in pages}

    def _summarize(self, summary: dict[str, Any], model_sha256: str, run: Any) -> None:
        run.summary.update(summary)
        self.record["summary"] = {**self._last_values, **summary}
        self.record["model_sha256"] = model_sha256

    def _close(self, exit_code: int, run: Any) -> None:
        run.finish(exit_code=exit_code)
        self.record.pop("open_folder", None)
        self._keep()

    def _keep(self) -> None:
        write_json(self._folder / RECORD, self.record)

    def _speak(self, start: Callable[[], Any]) -> None:
        what = "did not start"
        try:
            run = start()
            self._keep()
            what = "failed"
            while call := self._calls.get():
                call(run)
        except (
            Exception
        ) as error:  # whatever wandb raises (not installed, not logged in, not reachable), the stage goes on
            if not self._failed:
                self._failed = True
                note(f"wandb {what} ({_on_one_line(error)}); the stage goes on without it")


def start_wandb(config: dict[str, Any], folder: Path, resumed: bool) -> WandbRun | None:
    """Starts the run of the checkpoints in `folder`, or continues it where training is resumed, in the mode that
    WANDB_MODE names; None where it asks for none."""
    record = _read_record(folder)
    if record and (torn := record.pop("open_folder", None)):
        shutil.rmtree(torn, ignore_errors=True)
    if not resumed:
        record = None
        (folder / RECORD).unlink(missing_ok=True)  # of a run that this one does anew
    if not is_wanted():
        return None
    new = WandbRecord(id=secrets.token_hex(4), project=os.environ.get("WANDB_PROJECT", "encore"), iter=-1)
    record = record or new
    return WandbRun(folder, record, partial(_open, config, record))


def find_run(model_sha256: str) -> WandbRun | None:
    """Continues the run of a model that was trained here; None where there is no such run. model_sha256: of the model's
    encore.json."""
    for path in (scratch_folder() / "checkpoints").glob(f"*/{RECORD}"):
        record = _read_record(path.parent)
        if record and record.get("model_sha256") == model_sha256:
            return WandbRun(path.parent, record, partial(_open, {}, record))
    return None


def is_wanted() -> bool:
    """Whether WANDB_MODE asks for wandb."""
    mode = os.environ.get("WANDB_MODE") or "disabled"
    if mode not in (*MODES, "disabled"):
        note(f"WANDB_MODE={mode} is none of {', '.join(MODES)}; the stage goes on without wandb")
    return mode in MODES


def _read_record(folder: Path) -> WandbRecord | None:
    """None where there is none, or a crash has damaged it: then a new run has the whole curve."""
    try:
        return read_json(folder / RECORD, WandbRecord)
    except EncoreError:
        return None


def _open(config: dict[str, Any], record: WandbRecord) -> Any:
    """wandb's run; where its server does not answer an offline one, so that nothing is lost. Says where it is."""
    import wandb

    settings = wandb.Settings(silent=True, init_timeout=SECONDS_TO_START)
    wandb.setup(settings=settings)  # which also keeps what comes before the run silent
    init = partial(
        wandb.init, project=record["project"], config=config, id=record["id"], resume="allow", settings=settings
    )
    try:
        run = init()
    except wandb.errors.CommError as error:
        note(f"wandb's server cannot be reached ({_on_one_line(error)}); the run is kept in wandb/")
        wandb.teardown()  # its own process holds the first attempt
        run = init(mode="offline")
    run.define_metric("*", step_metric="iter")
    if run.offline:
        record["open_folder"] = str(Path(run.dir).parent)
        folder = os.path.relpath(record["open_folder"])
        note(f"wandb: {folder} holds the run; `wandb sync {folder}` sends it")
    else:
        record["iter"] = run.starting_step - 1
        note(f"wandb: {run.url}")
    return run


def _make_page(text: str) -> Any:
    """Text as wandb shows it; a plain string in a row is not shown."""
    import wandb

    return wandb.Html(f"<pre>{html.escape(text)}</pre>")


def _on_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
