"""The sources that params.yaml names: one, or a mixture of several, where each key has a value for each by its name.

    dataset:          {web: hf:OWNER/NAME, code: "files:code/*.jsonl"}
    dataset_revision: {web: COMMIT, code: SHA256}
    dataset_share:    {web: 0.8, code: 0.2}

The order of a mapping is no matter, since DVC does not see it: sources are always taken by name.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any


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
    names = sorted(shares)
    ends = [round(token_cap * share) for share in accumulate(shares[name] for name in names)]
    ends[-1] = token_cap  # whatever the shares' rounding says
    return {name: end - start for name, start, end in zip(names, [0, *ends], ends, strict=False)}
