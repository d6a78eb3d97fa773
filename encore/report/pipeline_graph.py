"""The pipeline as a graph: which stages feed which, and where the results that lie here came from.

Drawn here, since graphviz wants a program that pip does not install, and mermaid 3.6 MB of script in a page of 1 MB.
"""

import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from encore.errors import EncoreError
from encore.files import sha256_of
from encore.json_files import parse_old_too
from encore.pipeline.stage_history import HISTORY
from encore.schemas import HistoryLine
from encore.scratch import scratch_folder

BOX_WIDTH, BOX_HEIGHT = 142, 54
GAP, RISE, MARGIN = 14, 30, 4  # between boxes, between rows, around all
SAME_RUN_SECONDS = 5  # by how much two readings of when a process started may differ

RAN = "ran"  # in the last run of dvc that ran a stage
CACHED = "cached"  # made here before that, and not run again
ELSEWHERE = "elsewhere"  # no line in the history: the result came with git, or from a cache


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml. `after`: the stages whose outputs it reads; started and seconds: of the run that made what
    lies here, where this machine's history has it."""

    name: str
    desc: str
    reads: list[str]
    writes: list[str]
    after: list[str]
    status: str
    started: datetime | None
    seconds: float | None


@dataclass(frozen=True)
class Box:
    """A stage's place in the drawing: its top left corner, in pixels."""

    stage: Stage
    x: float
    y: float
    width: int = BOX_WIDTH
    height: int = BOX_HEIGHT


@dataclass(frozen=True)
class Drawing:
    """The pipeline's graph; an arrow goes from one box to another."""

    width: int
    height: int
    boxes: list[Box]
    arrows: list[tuple[Box, Box]]


def read_history() -> list[HistoryLine]:
    """The lines of the history, oldest first. One that cannot be read is told of and left out."""
    path = scratch_folder() / HISTORY
    lines = []
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines() if path.exists() else [], start=1):
        try:
            lines.append(parse_old_too(line.encode(), HistoryLine, f"{path}, line {number}"))
        except EncoreError:
            print(f"encore: note: {path}, line {number}, is damaged and left out", file=sys.stderr)
    return lines


def read_stages(pipeline: dict[str, Any], history: list[HistoryLine]) -> list[Stage]:
    """The stages of dvc.yaml, in its order, with what the history says of the results in the working tree."""
    made_by = {path: name for name, stage in pipeline.items() for path in _outputs(stage)}
    stages = []
    for name, stage in pipeline.items():
        reads = [dep for dep in stage.get("deps", []) if dep in made_by]
        lines = [line for line in history if line["stage"] == name and _is_here(line)]
        status = ELSEWHERE if not lines else RAN if _same_run(lines[-1], history[-1]) else CACHED
        started = datetime.fromisoformat(lines[-1]["started"]) if lines else None
        seconds = lines[-1]["seconds"] if lines else None
        after = sorted({made_by[dep] for dep in reads})
        stages.append(Stage(name, stage.get("desc", ""), reads, _outputs(stage), after, status, started, seconds))
    return stages


def _outputs(stage: dict[str, Any]) -> list[str]:
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def _is_here(line: HistoryLine) -> bool:
    witness = Path(line["witness"])
    return witness.is_file() and sha256_of(witness) == line["sha256"]


def _same_run(one: HistoryLine, other: HistoryLine) -> bool:
    """Whether one dvc started both. Its start is reckoned from the machine's, whose clock may have been corrected."""
    starts = [datetime.fromisoformat(line["run"]["started"]) for line in (one, other)]
    apart = abs((starts[0] - starts[1]).total_seconds())
    return one["run"]["pid"] == other["run"]["pid"] and apart < SAME_RUN_SECONDS


def draw(stages: list[Stage]) -> Drawing:
    """Each stage in a row below all that it comes after, as low as the stages that wait for it allow; and arrows.

    An arrow that others imply already is left out: the table of stages has what each reads.
    """
    after = {stage.name: set(stage.after) for stage in stages}

    def earlier(name: str) -> set[str]:
        return after[name].union(*(earlier(before) for before in after[name]))

    def highest_row(name: str) -> int:
        return 1 + max((highest_row(before) for before in after[name]), default=-1)

    def row(name: str) -> int:
        return min((row(later) - 1 for later in after if name in after[later]), default=highest_row(name))

    rows: dict[int, list[Stage]] = {}
    for stage in stages:
        rows.setdefault(row(stage.name), []).append(stage)
    width = max(map(len, rows.values())) * (BOX_WIDTH + GAP) - GAP + 2 * MARGIN
    boxes = {}
    for number, of_row in rows.items():
        left = (width - len(of_row) * (BOX_WIDTH + GAP) + GAP) / 2
        for place, stage in enumerate(of_row):
            boxes[stage.name] = Box(stage, left + place * (BOX_WIDTH + GAP), MARGIN + number * (BOX_HEIGHT + RISE))
    arrows = [
        (boxes[before], boxes[name])
        for name in after
        for before in sorted(after[name].difference(*(earlier(other) for other in after[name])))
    ]
    return Drawing(width, len(rows) * (BOX_HEIGHT + RISE) - RISE + 2 * MARGIN, list(boxes.values()), arrows)
