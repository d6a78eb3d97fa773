"""Progress that suits whoever watches: tqdm's bar with rate and time left in a terminal, a line now and then in a log.

tqdm alone writes a bar into a log as well, ten times a second.
"""

import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0
SCALED = 100_000  # from this total on, a bar counts in k, M and G


def print_line(line: str) -> None:
    """Prints a line at once and without tearing a bar that stands below."""
    with tqdm.external_write_mode(file=sys.stdout):
        print(line, flush=True)


def note(text: str) -> None:
    """Prints a line on standard error without tearing a bar that stands there."""
    with tqdm.external_write_mode(file=sys.stderr):
        print(f"encore: note: {text}", file=sys.stderr, flush=True)


def as_duration(seconds: float) -> str:
    """The two largest of hours, minutes and seconds."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, whole_seconds = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole_seconds} s" if minutes else f"{whole_seconds} s"


def as_size(count_bytes: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point: 23 kB, 4.1 MB, 11.2 GB."""
    if count_bytes < 999_500:
        return f"{count_bytes / 1e3:.0f} kB" if count_bytes >= 1000 else f"{count_bytes} bytes"
    return f"{count_bytes / 1e6:.1f} MB" if count_bytes < 999_950_000 else f"{count_bytes / 1e9:.1f} GB"


class Progress:
    """Counts up to `total` units of `unit`; a context manager that takes its bar away at the end.

    lines: whether to print lines where there is no terminal; no, for work that prints lines of its own. bar: whether
    to draw one where there is a terminal; no, where another process draws it.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0, lines: bool = True, bar: bool = True) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._started = self._last_line = time.monotonic()
        self._first = done
        self._lines = lines
        self._bar = None
        if bar and sys.stderr.isatty():
            self._bar = tqdm(
                desc=what,
                total=total,
                initial=done,
                unit=f" {unit}",
                unit_scale=total >= SCALED,  # 62/300, and not 62.0/300
                dynamic_ncols=True,
                leave=False,
            )

    def add(self, count: int) -> None:
        """Notes that `count` more units are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._lines and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def _print_line(self) -> None:
        now = time.monotonic()
        self._last_line = now
        rate = (self.done - self._first) / max(now - self._started, 1e-9)
        share = min(1.0, self.done / max(self.total, 1))
        left = f", {as_duration((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        print(f"{self.what}: {share:.0%}, {self.done:,} {self.unit}, {rate:,.0f} a second{left}", flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
