"""What `make repro` ends with: the run in a table, a sample of what the model writes, and where to look next."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encore.report.results import SAMPLES, check_lock, read_metrics, read_yaml
from encore.report.revisions import WORKSPACE, find_revision
from encore.schemas import EvalMetrics, Lockfile, RunMetrics

SAMPLE_LINES = 24


def main() -> None:
    here = find_revision(WORKSPACE)
    lock = read_yaml(here, "dvc.lock", Lockfile).get("stages", {})
    run = read_metrics(here, "metrics/metrics.json", RunMetrics, lock)
    evaluation = read_metrics(here, "metrics/eval.json", EvalMetrics, lock)["eval"]
    print_table(summary_rows(run, evaluation))
    print("\n" + first_sample(check_lock(Path(SAMPLES).read_bytes(), SAMPLES, lock).decode()))
    print(
        "\nModel: model/    More samples: metrics/samples.md    Log: training.log"
        '\nAll of it on a page: report.html    Compare runs: make report EXPERIMENTS="workspace NAME"'
        "\nCurves: dvc plots show    Numbers: dvc metrics show    Again, longer: dvc exp run -S max_iters=2000"
        "\n(dvc is in .venv/bin; `. .venv/bin/activate` puts it on the path)"
    )


def summary_numbers(run: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """What people compare, and Python's format for it. MFU only of a run on a GPU."""
    return {
        "iter": (run["iter"], ","),
        "lr": (run["lr"], ".2e"),
        **({"mfu": (run["mfu"], ".1%")} if "mfu" in run else {}),
        "tokens/s": (run["tokens_per_second"], ",.0f"),
        "train loss": (run["train"]["loss"], ".4f"),
        "val loss": (run["val"]["loss"], ".4f"),
        "eval loss": (evaluation["loss"], ".4f"),
        "perplexity": (evaluation["perplexity"], ".2f"),
        "bits per byte": (evaluation["bits_per_byte"], ".4f"),
    }


def summary_rows(run: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and formatted values."""
    numbers = summary_numbers(run, evaluation)
    rows = {name: format(value, form) for name, (value, form) in numbers.items()}
    if "mfu" in rows:
        rows["mfu"] += f" of {describe_peak(run)}"
    return list(rows.items())


def describe_peak(run: Mapping[str, Any]) -> str:
    """What MFU is a share of."""
    return f"{run['peak_tflops']:.4g} TFLOP/s, {run['mfu_basis']}"


def print_table(rows: list[tuple[str, str]]) -> None:
    """Names to the left, values under each other."""
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def first_sample(markdown: str) -> str:
    """The first code block of samples.md, its first lines, indented."""
    lines = markdown.splitlines()
    fences = [number for number, line in enumerate(lines) if line.startswith("~~~~~~")]
    if not fences:
        return "  (num_samples is 0: no samples)"
    block = lines[fences[0] + 1 :]
    block = block[: block.index(lines[fences[0]].removesuffix("text"))]
    rest = ["..."] if len(block) > SAMPLE_LINES else []
    return "\n".join(f"  | {line}" for line in [*block[:SAMPLE_LINES], *rest])
