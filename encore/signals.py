"""How training is asked to stop: SIGTERM, SIGINT, or the death of the process that started it."""

import ctypes
import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class StopRequest:
    """Remembers the first SIGTERM or SIGINT, so that the loop can save at the next step boundary.

    A second signal ends the process at once. Handlers are installed even where the parent ignored the signals, as a
    shell does for what it starts in the background.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)


def stop_with_parent() -> None:
    """On Linux, asks for SIGTERM when the parent dies: a `dvc` that is killed would else leave training behind."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)
