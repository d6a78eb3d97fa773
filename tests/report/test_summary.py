"""encore/report/summary.py: what a newcomer reads at the end of `make repro`."""

import json
from pathlib import Path

import pytest

from encore.errors import EncoreError
from encore.report import summary
from encore.report.summary import SAMPLE_LINES, first_sample, print_table, summary_rows

RUN = {
    "iter": 6000,
    "lr": 6e-05,
    "mfu": 0.13704,
    "peak_tflops": 312.0,
    "mfu_basis": "A100",
    "device": "cuda, bfloat16",
    "devices": 1,
    "tokens_seen": 6000 * 491_520,
    "tokens_per_second": 49_876.4,
    "train": {"loss": 3.2568},
    "val": {"loss": 3.26934},
}
EVALUATION = {"loss": 3.27016, "perplexity": 26.3155, "bits_per_byte": 1.07216}


def test_each_number_in_the_form_that_people_compare() -> None:
    assert summary_rows(RUN, EVALUATION) == [
        ("iter", "6,000"),
        ("lr", "6.00e-05"),
        ("mfu", "13.7% of 312 TFLOP/s, A100"),
        ("tokens/s", "49,876"),
        ("train loss", "3.2568"),
        ("val loss", "3.2693"),
        ("eval loss", "3.2702"),
        ("perplexity", "26.32"),
        ("bits per byte", "1.0722"),
    ]


def test_a_run_on_a_cpu_has_no_mfu() -> None:
    run = {key: value for key, value in RUN.items() if key not in ("mfu", "peak_tflops", "mfu_basis")}
    with_mfu, without = dict(summary_rows(RUN, EVALUATION)), dict(summary_rows(run, EVALUATION))
    assert with_mfu.pop("mfu")
    assert without == with_mfu


@pytest.mark.parametrize(("peak", "shown"), [(2250.0, "2250"), (70.0, "70"), (0.12345, "0.1235"), (42.741, "42.74")])
def test_large_and_small_peaks_are_plain_numbers(peak: float, shown: str) -> None:
    rows = dict(summary_rows({**RUN, "peak_tflops": peak}, EVALUATION))
    assert rows["mfu"] == f"13.7% of {shown} TFLOP/s, A100"


def test_values_stand_under_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([("a", "1"), ("long name", "2")])
    assert capsys.readouterr().out == "\n  a          1\n  long name  2\n"


def test_the_first_sample_is_the_first_block() -> None:
    markdown = "# Samples\n\n## Sample 1\n\n~~~~~~text\ndef one():\n\n    return 1\n~~~~~~\n\n~~~~~~text\ntwo\n~~~~~~\n"
    assert first_sample(markdown) == "  | def one():\n  | \n  |     return 1"


@pytest.mark.parametrize("lines", [1, SAMPLE_LINES, SAMPLE_LINES + 1, 500])
def test_a_long_sample_is_cut_and_says_so(lines: int) -> None:
    text = [f"line {number}" for number in range(lines)]
    shown = first_sample("\n".join(["~~~~~~text", *text, "~~~~~~", ""])).splitlines()
    assert shown[:SAMPLE_LINES] == [f"  | {line}" for line in text[:SAMPLE_LINES]]
    assert shown[SAMPLE_LINES:] == (["  | ..."] if lines > SAMPLE_LINES else [])


def test_a_sample_that_holds_a_fence_is_shown_whole() -> None:
    assert first_sample("~~~~~~~text\na\n~~~~~~\nb\n~~~~~~~\n") == "  | a\n  | ~~~~~~\n  | b"


def test_no_samples() -> None:
    assert first_sample("# Samples\n") == "  (num_samples is 0: no samples)"


def test_the_whole_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    (metrics / "metrics.json").write_text(json.dumps(RUN))
    (metrics / "eval.json").write_text(json.dumps({"eval": EVALUATION}))
    (metrics / "samples.md").write_text("~~~~~~text\nöäü 中\n~~~~~~\n", encoding="utf-8")
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    summary.main()
    out = capsys.readouterr().out
    assert [part in out for part in ("val loss       3.2693", "  | öäü 中", "training.log")] == [True] * 3
    assert out.index("perplexity") < out.index("öäü") < out.index("dvc plots show")


def test_before_the_first_run_it_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EncoreError, match=r"^dvc\.lock is missing, so this run has not ended; `dvc repro`"):
        summary.main()
