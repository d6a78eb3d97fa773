"""What params.yaml may say of its sources of text: one, or several by name, with a value of each key for each."""

import math
import re
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
    return [
        f"{SHARES}.{name}: {share:g} of token_cap {token_cap} is less than a token; raise one of them"
        for name, share in sorted(shares.items())
        if token_cap is not None and share * token_cap < 1
    ]


def _list(names: Any) -> str:
    return ", ".join(sorted(map(str, names)))
