"""How training is asked to stop: SIGTERM, SIGINT, SIGHUP, or the death of the process that started it."""

import ctypes
import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class StopRequest:
    """Remembers the first SIGTERM, SIGINT or SIGHUP, so that the loop can save at the next step boundary.

    A second SIGTERM or SIGINT ends the process at once. Their handlers are installed even where the parent ignored
    them, as a shell does for what it starts in the background. An ignored SIGHUP stays ignored: that is what nohup is
    for. Where a terminal goes, SIGHUP may come several times, and is then no sign of impatience.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        for number in SIGNALS:
            signal.signal(number, self._note)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = self.signal_number or number
        _tell_of_parents_death(0)  # it often dies of the same signal, and that is no second request
        if number != signal.SIGHUP:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)


def stop_with_parent() -> None:
    """On Linux, asks for SIGTERM when the parent dies: a `dvc` that is killed would else leave its stage behind."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    _tell_of_parents_death(signal.SIGTERM)
    # It died in between, or before: an orphan is process 1's, which in a container may have started it indeed.
    if os.getppid() != parent or (parent == 1 and os.getsid(1) != os.getsid(0)):
        os.kill(os.getpid(), signal.SIGTERM)


def _tell_of_parents_death(number: int) -> None:
    """0: no more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
