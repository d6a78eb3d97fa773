"""The sources that params.yaml names: one, or a mixture of several, where each key has a value for each by its name.

    dataset:          {web: hf:OWNER/NAME, code: "files:code/*.jsonl"}
    dataset_revision: {web: COMMIT, code: SHA256}
    dataset_share:    {web: 0.8, code: 0.2}

The order of a mapping is no matter, since DVC does not see it: sources are always taken by name.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

SOURCE = re.compile(
    r"hf:[\w.-]+/[\w.-]+(/[\w./-]+)?"  # a Hub data set, and a folder in it where it has several
    r"|files:.+"
    r"|package:[A-Za-z0-9][\w.-]*"
)
REVISIONS = {
    "hf": (r"[0-9a-f]{40}", "the 40 hex digits of a commit"),
    "files": (r"[0-9a-f]{64}", "the sha256 of the files"),
    "package": (r"\d[\w.!+-]*", "a version"),
}
NAME = re.compile("[a-z][a-z0-9_]{0,31}")  # a part of metrics' names, of a curve's column and of `-S dataset.NAME=...`
BY_SOURCE = ("dataset", "dataset_revision", "text_column")  # keys with a value for each source, or one for the only one
SHARES = "dataset_share"


@dataclass(frozen=True)
class Source:
    """A source as params.yaml describes it. name: None where it is the only one."""

    name: str | None
    dataset: str
    revision: str
    text_column: str
    token_cap: int


def list_sources(params: Any) -> list[Source]:
    """The sources that `params` names, with the share of token_cap that each may have."""

    def of_source(value: Any, name: str | None) -> str:
        return value[name] if isinstance(value, dict) else value

    return [
        Source(
            name,
            of_source(params.dataset, name),
            of_source(params.dataset_revision, name),
            of_source(params.text_column, name),
            token_cap,
        )
        for name, token_cap in split_cap(params.token_cap, params.dataset_share).items()
    ]


def split_cap(token_cap: int, shares: dict[str, float] | None) -> dict[str | None, int]:
    """The training tokens that each source may have, by its name and sorted by that; together they are token_cap."""
    if shares is None:
        return {None: token_cap}
    *names, last = sorted(shares)
    caps: dict[str | None, int] = {name: round(token_cap * shares[name]) for name in names}
    return caps | {last: token_cap - sum(caps.values())}


def find_mismatches(page: dict[str, Any]) -> list[str]:
    """A sentence for each thing in which a page's keys about sources, each valid by itself, do not fit each other."""
    keys = (*BY_SOURCE, SHARES)
    mappings = {key: page[key] for key in keys if isinstance(page[key], dict)}
    if not mappings:
        return _find_wrong_revision("dataset_revision", page["dataset"], page["dataset_revision"])
    first, names = next((key, set(value)) for key, value in mappings.items())
    problems = [
        f"{first}: {name!r} will not do as a source's name; use lower-case letters, digits and _, a letter first"
        for name in sorted(names, key=str)
        if not (isinstance(name, str) and NAME.fullmatch(name))
    ]
    for key in keys:
        if key in mappings and set(mappings[key]) != names:
            problems.append(
                f"{key}: it names the sources {_list(mappings[key])}, and {first} names {_list(names)}; "
                "give each a value in both"
            )
        elif key not in mappings and key != "text_column":
            problems.append(f"{key}: {first} has a value for each source, {_list(names)}; do the same here")
    if problems:
        return problems
    for name in sorted(names):
        problems += _find_wrong_revision(
            f"dataset_revision.{name}", page["dataset"][name], page["dataset_revision"][name]
        )
    return problems + _find_wrong_shares(page[SHARES], page.get("token_cap"))


def _find_wrong_revision(label: str, dataset: str, revision: str) -> list[str]:
    """A sentence where a revision is not of the kind that its source has. label: the revision's key."""
    kind = dataset.split(":")[0]
    pattern, meaning = REVISIONS[kind]
    if re.fullmatch(pattern, revision):
        return []
    return [f"{label}: {revision!r} will not do; {kind}: wants {meaning}, which `encore sources '{dataset}'` prints"]


def _find_wrong_shares(shares: dict[str, float], token_cap: int | None) -> list[str]:
    total = sum(shares.values())
    if not math.isclose(total, 1, abs_tol=1e-6):
        return [f"{SHARES}: the shares add up to {total:g}; let them add up to 1"]
    if token_cap is None:
        return []
    return [
        f"{SHARES}.{name}: {shares[str(name)]:g} of token_cap {token_cap} is less than a token; raise one of them"
        for name, cap in split_cap(token_cap, shares).items()
        if cap < 1
    ]


def _list(names: Any) -> str:
    return ", ".join(sorted(map(str, names)))
