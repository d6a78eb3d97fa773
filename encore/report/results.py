"""What a run left to read: its parameters, metrics, curves and samples, from the working tree or from a commit."""

import hashlib
import re
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from ruamel.yaml import YAML

from encore.errors import EncoreError
from encore.json_files import parse_json, parse_yaml
from encore.report.revisions import Revision
from encore.schemas import EvalMetrics, LockedStage, Lockfile, Metrics, Pipeline, RunMetrics

METRICS = ("metrics/metrics.json", "metrics/eval.json", "metrics/tokens.json")
CURVES = ("train", "eval", "speed")
POSITION = "metrics/position.tsv"
SAMPLES = "metrics/samples.md"
Row = dict[str, Any]
WAY_OUT = "`dvc repro` makes it"
T = TypeVar("T")


@dataclass(frozen=True)
class Param:
    """A line of params.yaml; `group` is the comment that stands above its block."""

    key: str
    value: Any
    meaning: str
    group: str


@dataclass(frozen=True)
class Results:
    """A finished run.

    params: those that the results were made with. metrics: the content of each file of METRICS. curves: the rows of
    train, eval and speed, each with `tokens` and `hours` beside `iter`. positions: the loss by position in the context,
    where there is one. samples: title and text of each, None where neither DVC's cache nor a remote has them. edited:
    the keys whose values in params.yaml are no longer those of the results. lock: the stages of dvc.lock.
    """

    name: str
    params: list[Param]
    metrics: dict[str, Any]
    curves: dict[str, list[Row]]
    positions: list[Row]
    samples: list[tuple[str, str]] | None
    edited: list[str]
    lock: dict[str, LockedStage]

    @property
    def run(self) -> dict[str, Any]:
        """metrics.json."""
        return dict(self.metrics[METRICS[0]])

    @property
    def evaluation(self) -> dict[str, Any]:
        """What eval.json holds."""
        return dict(self.metrics[METRICS[1]]["eval"])

    @property
    def tokens(self) -> dict[str, Any]:
        """tokens.json."""
        return dict(self.metrics[METRICS[2]])


def load_results(revision: Revision) -> Results:
    """Reads all of a run. Raises EncoreError where a file is missing, since the run has not ended or never began, or is
    not the one that dvc.lock has the hash of."""
    lock = read_yaml(revision, "dvc.lock", Lockfile).get("stages", {})
    schemas = dict(zip(METRICS, (RunMetrics, EvalMetrics, Metrics), strict=True))
    metrics: dict[str, Any] = {path: read_metrics(revision, path, schemas[path], lock) for path in METRICS}
    run = metrics[METRICS[0]]
    curves = {name: read_tsv(_need_checked(revision, f"metrics/{name}.tsv", lock)) for name in CURVES}
    add_clocks(curves, tokens_per_iter=run["tokens_seen"] // run["iter"])
    position = revision.read(POSITION)
    samples = revision.read_output(SAMPLES)
    page = read_params(_need(revision, "params.yaml").decode())
    used = params_used(lock, read_yaml(revision, "dvc.yaml", Pipeline)["stages"])
    return Results(
        name=revision.name,
        params=[Param(param.key, used.get(param.key, param.value), param.meaning, param.group) for param in page],
        metrics=metrics,
        curves=curves,
        positions=read_tsv(check_lock(position, POSITION, lock)) if position else [],
        samples=None if samples is None else split_samples(check_lock(samples, SAMPLES, lock).decode()),
        edited=[param.key for param in page if used.get(param.key, param.value) != param.value],
        lock=lock,
    )


def read_metrics(revision: Revision, path: str, schema: type[T], lock: dict[str, LockedStage]) -> T:
    """The content of a file of METRICS."""
    return parse_json(_need_checked(revision, path, lock), schema, path, WAY_OUT)


def _need_checked(revision: Revision, path: str, lock: dict[str, LockedStage]) -> bytes:
    return check_lock(_need(revision, path), path, lock)


def _need(revision: Revision, path: str) -> bytes:
    data = revision.read(path)
    if data is None:
        where = path if revision.commit is None else f"{path} of {revision.name}"
        raise EncoreError(f"{where} is missing, so this run has not ended; `dvc repro` starts it or goes on with it")
    return data


def read_yaml(revision: Revision, path: str, schema: type[T]) -> T:
    """A YAML file of DVC's. Raises EncoreError where it is missing or is none."""
    return parse_yaml(_need(revision, path), schema, path, f"`git restore {path}` brings it back")


def check_lock(data: bytes, path: str, lock: dict[str, LockedStage]) -> bytes:
    """The content of an output. Raises EncoreError where dvc.lock has the hash of another one."""
    locked = hash_of(lock, path)
    if locked and hashlib.md5(data).hexdigest() != locked:
        raise EncoreError(
            f"{path} is not the one that dvc.lock has the hash of, so the run has not ended, or the file was changed "
            "afterwards; `dvc repro` makes both anew, `git restore` brings back what was committed"
        )
    return data


def read_tsv(data: bytes) -> list[Row]:
    """Rows of numbers; an empty cell is None."""
    header, *lines = (line.split("\t") for line in data.decode().splitlines())
    return [{key: _number(cell) for key, cell in zip(header, line, strict=True)} for line in lines]


def _number(cell: str) -> int | float | None:
    return None if not cell else int(cell) if cell.isdigit() else float(cell)


def add_clocks(curves: dict[str, list[Row]], tokens_per_iter: int) -> None:
    """Gives each row `tokens`, seen until then, and `hours`, which the optimizer steps until then took.

    A row of speed.tsv says how long an iteration took on average since the row before it. The hours hold neither
    evaluations and checkpoints nor what was computed again after a crash; evaluations lie between two of its rows.
    """
    iters = np.array([0, *(row["iter"] for row in curves["speed"])])
    steps_hours = np.diff(iters) * np.array([row["ms_per_iter"] for row in curves["speed"]]) / 3.6e6
    hours = np.concatenate([[0.0], np.cumsum(steps_hours)])
    for row in (row for rows in curves.values() for row in rows):
        row["tokens"] = row["iter"] * tokens_per_iter
        row["hours"] = float(np.interp(row["iter"], iters, hours))


def read_params(text: str) -> list[Param]:
    """The lines of params.yaml with the comments that say what they mean."""
    values = parse_yaml(text.encode(), dict[str, Any], "params.yaml", "`git restore params.yaml` brings it back")
    page = YAML().load(text)
    comments = {key: tokens[2].value for key, tokens in page.ca.items.items() if tokens[2]}
    group, params = _last_comment("".join(token.value for token in (page.ca.comment or [None, []])[1] or [])), []
    for key, value in values.items():
        meaning, _, below = comments.get(key, "").partition("\n")
        params.append(Param(key, value, meaning.lstrip("# "), group))
        if isinstance(value, dict):  # then what is below stands behind its last line
            below = "".join(tokens[2].value for tokens in page[key].ca.items.values() if tokens[2])
        group = _last_comment(below) or group
    return params


def _last_comment(lines: str) -> str:
    comments = re.findall(r"^\s*#\s*(.*)$", lines, re.M)
    return comments[-1] if comments else ""


def params_used(lock: dict[str, LockedStage], stages: dict[str, Any]) -> dict[str, Any]:
    """The values that dvc.lock has for the stages which list their keys; the stage check, which has all, runs first
    and says nothing about the results."""
    named = [lock[stage] for stage in stages if stage in lock and "params.yaml:" not in _entries(stages[stage])]
    return {key: value for stage in named for key, value in stage.get("params", {}).get("params.yaml", {}).items()}


def _entries(stage: dict[str, Any]) -> list[str]:
    """The params entries of a stage; a whole page is the mapping {params.yaml: null}."""
    return [entry if isinstance(entry, str) else f"{next(iter(entry))}:" for entry in stage.get("params", [])]


def split_samples(markdown: str) -> list[tuple[str, str]]:
    """The heading and the text of each code block."""
    blocks = re.findall(r"^## ([^\n]*)\n\n(~{6,})text\n(.*?)\n\2$", markdown, re.M | re.S)
    return [(heading, text) for heading, _, text in blocks]


def hash_of(lock: dict[str, LockedStage], path: str) -> str | None:
    """The md5 under which DVC keeps an output."""
    outs = [out for stage in lock.values() for out in stage.get("outs", []) if out["path"] == path]
    return str(outs[0]["md5"]) if outs and "md5" in outs[0] else None
