"""What recipes reach: a table and a picture of DVC experiments that differ in their seed alone.

    python -m bench.learning_curves PICTURE.svg 'TITLE: LABEL=EXPERIMENT,EXPERIMENT,... LABEL=...' ...

Each TITLE is a corpus, and a row of the picture: the loss against steps, and against minutes. Curves are of training
steps, each on tokens that were never seen before, averaged over the experiments and over the steps around; points are
the val loss at the end of each experiment.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import altair as alt
import numpy as np

from encore.errors import EncoreError, run_stage
from encore.report.results import Row, add_clocks, read_tsv
from encore.report.revisions import Revision, find_revision

AROUND = 0.05  # share of a run that a point of a curve is the mean of
SKIPPED = 0.02  # and of its first steps, which would leave the rest no room


@dataclass(frozen=True)
class Run:
    """An experiment. curve: rows of iter, hours, loss. step_seconds: the median over the logged steps."""

    steps: int
    val_loss: float
    step_seconds: float
    curve: list[Row]

    @property
    def minutes(self) -> float:
        """Of optimizer steps."""
        return self.steps * self.step_seconds / 60


def load_run(name: str) -> Run:
    """Raises EncoreError where there is no such experiment, or it has not ended."""
    revision = find_revision(name)
    curves = {table: read_tsv(_need(revision, f"metrics/{table}.tsv")) for table in ("train", "speed")}
    metrics = json.loads(_need(revision, "metrics/metrics.json"))
    tokens_per_step = metrics["tokens_seen"] // metrics["iter"]
    add_clocks(curves, tokens_per_step)
    step_seconds = tokens_per_step / metrics["tokens_per_second"]
    return Run(metrics["iter"], metrics["val"]["loss"], step_seconds, curves["train"])


def _need(revision: Revision, path: str) -> bytes:
    data = revision.read(path)
    if data is None:
        raise EncoreError(f"{path} of {revision.name} is missing; `dvc queue status` says whether it has run")
    return data


def smooth(runs: list[Run]) -> list[Row]:
    """The mean curve of runs that logged the same steps."""
    table = np.array([[[row["iter"], row["hours"] * 60, row["loss"]] for row in run.curve] for run in runs]).mean(0)
    width = max(1, round(AROUND * len(table)))
    means = np.stack([np.convolve(column, np.full(width, 1 / width), "valid") for column in table.T], axis=1)
    shown = means[means[:, 0] >= SKIPPED * runs[0].steps]
    return [{"steps": steps, "minutes": minutes, "loss": loss} for steps, minutes, loss in shown]


def draw(corpora: dict[str, dict[str, list[Run]]]) -> alt.VConcatChart:
    """A row for each corpus: the loss against steps and against minutes."""
    rows = []
    for title, recipes in corpora.items():
        labels = list(recipes)
        curves = [{"recipe": label, **row} for label, runs in recipes.items() for row in smooth(runs)]
        ends = [
            {"recipe": label, "steps": run.steps, "minutes": run.minutes, "loss": run.val_loss}
            for label, runs in recipes.items()
            for run in runs
        ]
        color = alt.Color("recipe:N", title=None, scale=alt.Scale(domain=labels), legend=alt.Legend(orient="top"))
        panels = []
        for x in ("steps", "minutes"):
            base = alt.Chart().encode(x=alt.X(f"{x}:Q", title=x), color=color)
            y = alt.Y("loss:Q", title=f"{title}: nats a token" if x == "steps" else None, scale=alt.Scale(zero=False))
            line = base.mark_line(strokeWidth=1.5).encode(y=y).properties(data=alt.Data(values=curves))
            points = base.mark_point(size=40, filled=True).encode(y=y).properties(data=alt.Data(values=ends))
            panels.append(alt.layer(line, points).properties(width=380, height=240))
        rows.append(alt.hconcat(*panels))
    return alt.vconcat(*rows).configure(background="white")


def parse(text: str) -> tuple[str, dict[str, list[Run]]]:
    """A corpus from the command line: its title, and the runs of each label. Raises EncoreError."""
    title, found, recipes = text.partition(": ")
    parts = [recipe.partition("=") for recipe in recipes.split()]
    if not found or not all(names for _, _, names in parts):
        raise EncoreError(f"{text!r} is not of the form 'TITLE: LABEL=EXPERIMENT,EXPERIMENT ...'")
    return title, {label.replace("_", " "): [load_run(name) for name in names.split(",")] for label, _, names in parts}


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.learning_curves", description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("corpora", nargs="+", metavar="'TITLE: LABEL=EXPERIMENT,...'")
    arguments = parser.parse_args()
    corpora = dict(parse(text) for text in arguments.corpora)
    print("| corpus | recipe | steps | val loss of each seed | mean | ms a step | minutes |")
    print("|---" * 7 + "|")
    for title, recipes in corpora.items():
        for label, runs in recipes.items():
            losses = [run.val_loss for run in runs]
            milliseconds = 1e3 * statistics.median(run.step_seconds for run in runs)
            minutes = statistics.median(run.minutes for run in runs)
            print(
                f"| {title} | {label} | {runs[0].steps:,} | {', '.join(f'{loss:.4f}' for loss in losses)} "
                f"| {statistics.mean(losses):.4f} | {milliseconds:.0f} | {minutes:.1f} |"
            )
    draw(corpora).save(str(arguments.picture))


if __name__ == "__main__":
    run_stage(main)
