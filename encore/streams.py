"""What a stage prints: whoever reads it, and whatever characters they can show, printing never ends the stage."""

import io
import os
import sys
from typing import Any


class Outlet(io.FileIO):
    """A standard stream that may be closed at the other end, as by `| head`: what is written then goes nowhere."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:  # a closed pipe, a terminal that is gone, a full disk under a log
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def keep_printing() -> None:
    """Puts outlets in the places of stdout and stderr, which spell as an escape what their encoding does not have."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the stage began, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif _is_standard(stream):
            stream.flush()
            raw = Outlet(stream.fileno(), "w", closefd=False)
            outlet = io.TextIOWrapper(
                raw if stream.write_through else io.BufferedWriter(raw),  # `python -u` has no buffer
                encoding=stream.encoding,
                errors="backslashreplace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, outlet)


def _is_standard(stream: Any) -> bool:
    """Whether it is the process's own, and not one that a test or a notebook has put in its place."""
    try:
        return stream.fileno() in (1, 2)
    except (AttributeError, OSError):
        return False
