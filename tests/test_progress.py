"""encore/progress.py: a bar in a terminal, lines now and then in a log."""

import io
import sys

import pytest

from encore.progress import SECONDS_BETWEEN_LINES, Progress, as_duration, as_size, print_line


class Clock:
    """A monotonic clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("encore.progress.time.monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_short_work_says_nothing_in_a_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    with Progress("encode", 100, "tokens") as progress:
        for _ in range(100):
            clock.now += 0.99 * SECONDS_BETWEEN_LINES / 100
            progress.add(1)
    assert capsys.readouterr() == ("", "")


def test_long_work_says_share_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """4,000 units of 10,000 in 20 s, then 9,000 in 40 s."""
    clock = Clock(monkeypatch)
    with Progress("encode", 10_000, "tokens") as progress:
        for at, count in [(10, 1500), (20, 2500), (30, 2000), (40, 3000), (50, 1000)]:
            clock.now = 1000.0 + at
            progress.add(count)
    assert capsys.readouterr().out.splitlines() == [
        "encode: 40%, 4,000 tokens, 200 a second, 30 s left",
        "encode: 90%, 9,000 tokens, 225 a second, 4.4 s left",
    ]


def test_work_that_goes_on_counts_the_old_part_in_the_share_and_not_in_the_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Progress("train", 1000, "steps", done=900) as progress:
        clock.now += 20
        progress.add(40)
    assert capsys.readouterr().out == "train: 94%, 940 steps, 2 a second, 30 s left\n"


def test_more_than_the_total_is_all_of_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    with Progress("encode", 100, "tokens") as progress:
        clock.now += 20
        progress.add(120)
        clock.now += 20
        progress.add(0)
    assert capsys.readouterr().out.splitlines() == [
        "encode: 100%, 120 tokens, 6 a second",
        "encode: 100%, 120 tokens, 3 a second",
    ]


def test_work_that_stands_still_divides_by_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Progress("encode", 0, "tokens") as progress:
        clock.now += 20
        progress.add(0)
    assert capsys.readouterr().out == "encode: 0%, 0 tokens, 0 a second\n"


def test_work_that_prints_its_own_lines_gets_no_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Progress("train", 10, "steps", lines=False) as progress:
        clock.now += 1000
        progress.add(5)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_that_goes_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("encode", 4_000_000, "tokens", done=1_000_000) as progress:
        drawn_at_first = terminal.getvalue()
        progress.add(2_000_000)
        progress._bar.refresh()
    assert "encode:  25%|" in drawn_at_first
    assert "1.00M/4.00M" in drawn_at_first
    assert "encode:  75%|" in terminal.getvalue()
    assert terminal.getvalue().split("\r")[-2].strip() == "", "the bar is wiped off"
    assert capsys.readouterr().out == ""


def test_a_line_is_printed_as_it_is_with_and_without_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    print_line("step 1: loss 2.5")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("train", 10, "steps"):
        print_line("step 2: loss 2.4")
    assert capsys.readouterr().out == "step 1: loss 2.5\nstep 2: loss 2.4\n"


def test_a_bar_of_few_counts_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("train", 300, "iters", done=62):
        assert " 62/300 [" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.54, "0.5 s"), (42.4, "42 s"), (59.6, "1 min 0 s"), (192, "3 min 12 s"), (57_720, "16 h 2 min")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert as_duration(seconds) == shown


@pytest.mark.parametrize(
    ("count_bytes", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (23_456, "23 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (4_140_000, "4.1 MB"),
        (999_949_999, "999.9 MB"),
        (999_950_000, "1.0 GB"),
        (11_200_000_000, "11.2 GB"),
    ],
)
def test_sizes(count_bytes: int, shown: str) -> None:
    assert as_size(count_bytes) == shown
