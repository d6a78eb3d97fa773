"""Values that are of the right type and yet would end a run with a traceback, or only after hours."""

from typing import Any

import pytest

from encore.params import find_problems
from tests.conftest import read_page


def problems_with(**changes: Any) -> list[str]:
    return find_problems({**read_page(), **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rate": 1e30}, "learning_rate: 1e+30 will not do; it should be less than or equal to 100"),
        (
            {"learning_rate": 1e-300, "min_lr": 0},
            "learning_rate: 1e-300 will not do; it should be at least 1e-12; float32 has no room below",
        ),
        ({"weight_decay": 1e30}, "weight_decay: 1e+30 will not do; it should be less than or equal to 1000"),
        (
            {"grad_clip": 1e-300},
            "grad_clip: 1e-300 will not do; it should be at least 1e-12; float32 has no room below",
        ),
        ({"grad_clip": 1e300}, "grad_clip: 1e+300 will not do; it should be less than or equal to 1000000000"),
        ({"temperature": 1e300}, "temperature: 1e+300 will not do; it should be less than or equal to 1000"),
        ({"n_layer": 10**30}, f"n_layer: 1{'0' * 30} will not do; it should be less than or equal to 16777216"),
        (
            {"max_iters": 10**30},
            f"max_iters: 1{'0' * 30} will not do; it should be less than or equal to 1000000000000",
        ),
        (
            {"start": "a\ud83d"},
            "start: 'a\\ud83d' will not do; it holds half of a surrogate pair, which is no character; write the whole "
            "one",
        ),
        ({"init_from": "a\0/"}, "init_from: 'a\\x00/' will not do; a name cannot hold the character NUL"),
        (
            {"init_from": f"./{'x' * 300}/"},
            f"init_from: './{'x' * 87}... will not do; no file or package has a name of more than 255 bytes",
        ),
        (
            {"evaluate_tasks": ["x" * 300]},
            f"evaluate_tasks: ['{'x' * 88}... will not do; no file or package has a name of more than 255 bytes",
        ),
    ],
)
def test_what_would_only_fail_later_is_found_at_once(changes: dict[str, Any], sentence: str) -> None:
    assert problems_with(**changes) == [sentence]


def test_a_dataset_without_a_possible_name() -> None:
    for dataset in ("package:" + "x" * 300, "files:a\0.txt"):
        assert len([problem for problem in problems_with(dataset=dataset) if problem.startswith("dataset: ")]) == 1


def test_next_to_no_temperature_passes() -> None:
    assert problems_with(temperature=1e-40, grad_clip=1e-12) == []
