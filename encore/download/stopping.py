"""How a stage that downloads ends when it is stopped: with a sentence, and with what it has fetched kept."""

import signal
from collections.abc import Callable
from types import FrameType

from encore.errors import Interrupted, run_stage


def run_download(main: Callable[[], None]) -> None:
    """run_stage for a stage that downloads. SIGTERM and SIGHUP end it as Ctrl-C does: its unfinished output goes."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup lets it be ignored
        signal.signal(signal.SIGHUP, _stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs in the background ignore it
    run_stage(main)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    name = signal.Signals(number).name
    raise Interrupted(number, f"stopped by {name}; what is downloaded is kept, run the same command to go on")
