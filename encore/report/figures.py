"""The figures of a report, as Vega-Lite: the curves of one run, or those of several over each other."""

from dataclasses import dataclass
from typing import Any

import altair as alt

from encore.report.results import Results, Row

HEIGHT = 260
BILLIONS = "replace(format(datum.value, '~s'), 'G', 'B')"  # a thousand million tokens are 1B
SERIES = ["single steps", "train", "val"]
VAL_OF = "val_loss_"  # and the name of a source of a mixture: a column of eval.tsv


@dataclass(frozen=True)
class Figure:
    """A Vega-Lite specification whose data is the table named in it, and the words above it."""

    title: str
    note: str
    spec: dict[str, Any]


def datasets(runs: list[Results]) -> dict[str, list[Row]]:
    """The rows that the figures draw, each with the name of its run; in `losses` also with that of its series."""
    losses = []
    for run in runs:
        if len(runs) == 1:  # those of several runs would hide each other
            losses += [_loss(run, row, SERIES[0], "loss") for row in run.curves["train"]]
        for series in SERIES[1:]:
            losses += [_loss(run, row, series, f"{series}_loss") for row in run.curves["eval"]]
        if len(runs) == 1:
            for source in _sources(run):
                losses += [_loss(run, row, f"val, {source}", VAL_OF + source) for row in run.curves["eval"]]
    return {
        "losses": losses,
        "train": [{"run": run.name, **row} for run in runs for row in run.curves["train"]],
        "speed": [{"run": run.name, **row} for run in runs for row in run.curves["speed"]],
        "position": [{"run": run.name, **row} for run in runs for row in run.positions],
    }


def _sources(run: Results) -> list[str]:
    """The sources of a mixture whose val loss the run has."""
    return [column.removeprefix(VAL_OF) for column in run.curves["eval"][0] if column.startswith(VAL_OF)]


def _loss(run: Results, row: Row, series: str, column: str) -> Row:
    clocks = {key: row[key] for key in ("iter", "tokens", "hours")}
    return {"run": run.name, "series": series, **clocks, "loss": row[column]}


def figures(runs: list[Results]) -> list[Figure]:
    """All figures for which there is data."""
    hours = max(row["hours"] for run in runs for row in run.curves["speed"])
    unit, per_hour = ("hours", 1) if hours >= 1 else ("minutes", 60)
    time = alt.X("time:Q", title=f"{unit} of optimizer steps")
    tokens = alt.X("tokens:Q", title="tokens seen", axis=alt.Axis(labelExpr=BILLIONS))
    names = [run.name for run in runs]

    def losses(x: alt.X) -> dict[str, Any]:
        chart = _base("losses", x, "loss").transform_calculate(time=f"datum.hours * {per_hour}")
        if len(runs) == 1:
            series = alt.Scale(domain=[*SERIES, *(f"val, {source}" for source in _sources(runs[0]))])
            # What is measured the same way each time stands out from the noise of single steps.
            width = alt.condition(f"datum.series == '{SERIES[0]}'", alt.value(1), alt.value(2))
            chart = chart.encode(color=alt.Color("series:N", title=None, scale=series), strokeWidth=width)
        else:
            dashes = alt.Scale(domain=SERIES[1:], range=[[4, 3], [1, 0]])
            chart = chart.encode(
                color=_run_color(names), strokeDash=alt.StrokeDash("series:N", title=None, scale=dashes)
            )
        return _drawn(chart, ["run", "series", "iter", "tokens", "hours"], "loss", ".4f")

    def curve(table: str, y: str, form: str, x: alt.X = tokens) -> dict[str, Any]:
        chart = _base(table, x, y)
        if len(runs) > 1:
            chart = chart.encode(color=_run_color(names))
        return _drawn(
            chart, ["run", "position"] if table == "position" else ["run", "iter", "tokens", "hours"], y, form
        )

    clock = "the clock leaves out evaluations, checkpoints and restarts"
    found = [
        Figure("Loss against tokens", "nats a token", losses(tokens)),
        Figure("Loss against time", f"nats a token; {clock}", losses(time)),
        Figure("Learning rate", "of the logged steps", curve("train", "lr", ".2e")),
        Figure("Norm of the gradient", "before clipping", curve("train", "grad_norm", ".3f")),
        Figure("Speed", "tokens a second", curve("speed", "tokens_per_second", ",.0f")),
    ]
    if any(run.positions for run in runs):
        position = alt.X("position:Q", title="position in the context", scale=alt.Scale(type="log", nice=False))
        words = "nats a token, over the whole val split: does more context help?"
        found.append(Figure("Loss by position", words, curve("position", "loss", ".4f", position)))
    return found


def _base(table: str, x: alt.X, y: str) -> alt.Chart:
    y_axis = alt.Y(f"{y}:Q", title=None, scale=alt.Scale(zero=False))
    return alt.Chart(alt.NamedData(table)).encode(x=x, y=y_axis)


def _run_color(names: list[str]) -> alt.Color:
    return alt.Color("run:N", title=None, scale=alt.Scale(domain=names))


def _drawn(chart: alt.Chart, columns: list[str], y: str, form: str) -> dict[str, Any]:
    """The curve, and the point nearest to the pointer with its numbers."""
    nearest = alt.selection_point(nearest=True, on="pointerover", clear="pointerout", empty=False)
    formats = {"iter": ",", "tokens": ",", "hours": ".3f", "position": ","}
    # Names too have a format, which does nothing to them: without one, Vega-Lite does not find them beside `nearest`.
    tooltip = [
        alt.Tooltip(f"{name}:Q", format=formats[name])
        if name in formats
        else alt.Tooltip(f"{name}:N", format="", formatType="number")
        for name in columns
    ]
    tooltip.append(alt.Tooltip(f"{y}:Q", format=form))
    shown = alt.condition(nearest, alt.value(1), alt.value(0))
    points = chart.mark_point(filled=True, size=50).encode(opacity=shown, tooltip=tooltip).add_params(nearest)
    layers = alt.layer(chart.mark_line(), points).properties(width="container", height=HEIGHT)
    return dict(layers.to_dict())
