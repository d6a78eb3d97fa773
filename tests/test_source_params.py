"""encore/source_params.py and encore/mixture.py: what a page may say of its sources, and what each source may have."""

from typing import Any

import pytest

from encore.mixture import Source, list_sources, split_cap
from encore.params import Params, find_problems
from tests.conftest import read_page

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MIXTURE = {
    "dataset": {"code": "files:code/*.txt", "web": "hf:owner/corpus"},
    "dataset_revision": {"code": "a" * 64, "web": COMMIT},
    "dataset_share": {"code": 0.2, "web": "0.8"},  # `-S dataset_share.web=0.8` can arrive as a string
}


def test_a_mixture_is_a_mapping_by_source() -> None:
    page = {**read_page(), **MIXTURE, "token_cap": 1001, "text_column": {"web": "text", "code": "body"}}
    assert find_problems(page) == []
    params = Params.model_validate(page)
    assert list_sources(params) == [
        Source("code", "files:code/*.txt", "a" * 64, "body", 200),
        Source("web", "hf:owner/corpus", COMMIT, "text", 801),
    ]
    one = Params.model_validate({**page, "text_column": "content"})
    assert [source.text_column for source in list_sources(one)] == ["content", "content"]
    alone = Params.model_validate(read_page())
    assert list_sources(alone) == [
        Source(None, alone.dataset, alone.dataset_revision, alone.text_column, alone.token_cap)
    ]


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        (
            {"dataset_share": {"code": 0.3, "web": 0.8}},
            ["dataset_share: the shares add up to 1.1; let them add up to 1"],
        ),
        (
            {"dataset_share": {"code": 0.2, "wbe": 0.8}},
            ["dataset_share: it names the sources code, wbe, and dataset names code, web; give each a value in both"],
        ),
        (
            {"dataset_share": None, "dataset_revision": COMMIT},
            [
                "dataset_revision: dataset has a value for each source, code, web; do the same here",
                "dataset_share: dataset has a value for each source, code, web; do the same here",
            ],
        ),
        (
            {"text_column": {"code": "a"}},
            ["text_column: it names the sources code, and dataset names code, web; give each a value in both"],
        ),
        (
            {"dataset": {"code": "fiels:x", "web": 3}},
            [
                "dataset.code: 'fiels:x' will not do; a source is hf:OWNER/NAME, files:GLOB or package:NAME",
                "dataset.web: 3 will not do; it should be a valid string",
            ],
        ),
        (
            {"dataset_revision": {"code": "1.0", "web": COMMIT}},
            [
                "dataset_revision.code: '1.0' will not do; files: wants the sha256 of the files, which "
                "`encore sources 'files:code/*.txt'` prints"
            ],
        ),
        (
            {"dataset_share": {"code": 0, "web": 1}},
            ["dataset_share.code: 0 will not do; it should be greater than 0"],
        ),
        (
            {"dataset_share": {"code": 1e-5, "web": 0.99999}, "token_cap": 1000},
            ["dataset_share.code: 1e-05 of token_cap 1000 is less than a token; raise one of them"],
        ),
        (
            {key: {"My-Code": value["code"], "web": value["web"]} for key, value in MIXTURE.items()},
            ["dataset: 'My-Code' will not do as a source's name; use lower-case letters, digits and _, a letter first"],
        ),
        ({"vocab_size": {"code": 300}}, ["vocab_size: {'code': 300} will not do; it should be a valid integer"]),
    ],
)
def test_what_is_wrong_in_a_mixture(changes: dict[str, Any], sentences: list[str]) -> None:
    assert find_problems({**read_page(), **MIXTURE, **changes}) == sentences


def test_shares_without_a_mixture() -> None:
    assert find_problems({**read_page(), "dataset_share": 0.5}) == [
        "dataset_share: 0.5 will not do; it should be null, or with several sources the share of each, as "
        "{web: 0.8, code: 0.2}"
    ]


@pytest.mark.parametrize(
    ("cap", "shares"), [(10, (1 / 3, 1 / 3, 1 / 3)), (4 * 10**9, (0.1, 0.2, 0.7)), (7, (0.5, 0.25, 0.25))]
)
def test_a_cap_is_shared_out_whole(cap: int, shares: tuple[float, ...]) -> None:
    caps = split_cap(cap, dict(zip("cab", shares, strict=True)))
    assert list(caps) == ["a", "b", "c"]
    assert sum(caps.values()) == cap
    for name, share in zip("cab", shares, strict=True):
        assert abs(caps[name] - cap * share) <= 1
