"""encore/muon_rates.py: what `auto` stands for, and where it is refused."""

from typing import Any

import pytest

from encore.errors import EncoreError
from encore.muon_rates import KEYS, TESTED, RunSize, fill_in, find_rates, find_untested, measure
from encore.params import find_problems
from tests.conftest import MODERN, ROOT, read_page

AUTO = dict.fromkeys(KEYS, "auto")
# What the rule was tried with, at its smallest.
SMALL = {
    **read_page(ROOT / "presets/quickstart.yaml"),
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 1,
    "block_size": 256,
    "batch_size": 16,
    "gradient_accumulation_steps": 1,
    "max_iters": 100,
}


def test_the_size_of_a_run_is_that_of_its_decay() -> None:
    page = {**SMALL, "gradient_accumulation_steps": 3}
    size = RunSize(n_layer=2, n_embd=64, vocab_size=999, tokens_per_iter=16 * 3 * 256, iters=100)
    assert measure(page, 999) == size
    assert measure({**page, "max_iters": 500, "lr_decay_iters": 100}, 999) == size


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (RunSize(2, 128, 2048, 4096, 100), (0.036, 0.53, 0.026, 1.94)),
        (RunSize(2, 64, 2048, 4096, 100), (0.036, 0.53, 0.052, 1.94)),
        (RunSize(2, 128, 2048, 4096 * 32, 100), (0.072, 1.06, 0.052, 0.972)),  # 32 to the power 0.2 is 2
        (
            RunSize(2, 128, 2048, 4096, 3200),
            (0.009, 0.315, 0.00919, 0.243),
        ),  # 32: to 0.4 is 4, to 0.15 and 0.3 1.68, 2.83
        (RunSize(64, 128, 2048, 4096, 100), (0.0255, 0.53, 0.052, 2.75)),
        (RunSize(2, 128, 65_536, 4096, 100), (0.036, 0.53, 0.0184, 1.94)),
    ],
)
def test_each_quantity_changes_the_rates_by_its_power(size: RunSize, expected: tuple[float, ...]) -> None:
    assert tuple(find_rates(size).values()) == expected


def test_only_what_says_auto_becomes_a_number() -> None:
    rates = find_rates(RunSize(2, 64, 2048, 4096, 100))
    assert fill_in({**SMALL, **AUTO}, 2048) == rates
    numbers = {"learning_rate": 0.01, "embedding_lr": 0.2, "head_lr": 0.03, "weight_decay": 0.0}
    assert fill_in({**SMALL, **numbers}, 2048) == {}
    assert fill_in({**SMALL, **numbers, "head_lr": "auto"}, 2048) == {"head_lr": rates["head_lr"]}


def test_the_decay_suits_a_learning_rate_that_the_page_gives() -> None:
    page = {**SMALL, **AUTO, "learning_rate": 0.01}
    assert fill_in(page, 2048)["weight_decay"] == 7 / (0.01 * 100)


@pytest.mark.parametrize(
    ("preset", "keys"), [("quickstart", KEYS), ("modern-owt-1b", sorted({*KEYS} - {"embedding_lr"}))]
)
def test_presets_have_the_numbers_of_the_rule(preset: str, keys: list[str]) -> None:
    page = read_page(ROOT / f"presets/{preset}.yaml")
    rates = find_rates(measure(page, page["vocab_size"]))
    assert {key: page[key] for key in keys} == {key: rates[key] for key in keys}


def test_the_docs_have_the_rule_and_what_was_tried() -> None:
    text = (ROOT / "docs/learning-rates.md").read_text()
    rows = {cells[0].split("`")[1] if "`" in cells[0] else cells[0]: cells[1:] for cells in _find_rows(text)}
    size = RunSize(2, 128, 2_048, 4_096, 100)
    base = find_rates(size)
    assert {key: float(rows[key][0]) for key in KEYS[:3]} == {key: base[key] for key in KEYS[:3]}
    names = ("iters", "tokens_per_iter", "n_layer", "n_embd", "vocab_size")
    for column, name in enumerate(names, start=1):
        rates = find_rates(size._replace(**{name: 4 * getattr(size, name)}))
        for key in KEYS[:3]:
            power = float(rows[key][column] or 0)
            assert rates[key] == pytest.approx(base[key] * 4**power, rel=6e-3)  # three digits
    tried = [[int(cell.replace(",", "")) for cell in rows[edge] if cell] for edge in ("tried from", "to")]
    assert list(zip(*tried, strict=True)) == [TESTED[name] for name in names]


def _find_rows(text: str) -> list[list[str]]:
    """The cells of the first table."""
    table = text[text.index("| | base |") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def problems_with(**changes: Any) -> list[str]:
    page = {**SMALL, **AUTO, **changes}
    return find_problems(page) or find_untested(page, page["vocab_size"])


def test_auto_is_allowed_from_the_smallest_to_the_largest_that_was_tried() -> None:
    assert problems_with() == []
    assert problems_with(architecture="nanochat-plus", head_lr=0.01) == []
    most = {"n_layer": 12, "n_embd": 256, "gradient_accumulation_steps": 16, "max_iters": 1600}
    assert problems_with(**most, vocab_size=50257, tokenizer="gpt2") == []


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({"learning_rate": "aut"}, ["learning_rate: 'aut' will not do; a number is wanted"]),
        ({"init_from": "gpt2"}, ["auto will not do with init_from gpt2; the rule is for training from scratch"]),
        ({"min_lr": 0.001}, ["auto will not do with min_lr 0.001; the rule is for a decay to 0.0"]),
        (
            {"lr_schedule": "cosine", "warmdown_ratio": None},
            ["auto will not do with lr_schedule cosine; the rule is for a trapezoid"],
        ),
        (
            {"optimizer": "adamw", "embedding_lr": None, "head_lr": None, "n_embd": 768},
            ["auto will not do with optimizer adamw; the rule is for Muon"],
        ),
        (
            {"architecture": "gpt2", "head_lr": None},
            ["auto will not do with architecture gpt2; the rule is for nanochat and nanochat-plus"],
        ),
        (
            {"n_embd": 768, "n_layer": 13, "lr_decay_iters": 1601},
            [
                "auto was tried with n_layer from 2 to 12, not 13, n_embd from 64 to 256, not 768, max_iters from 50 "
                "to 1,600, not 1,601; give numbers, docs/learning-rates.md says which"
            ],
        ),
        (
            {"batch_size": 7},
            [
                "auto was tried with batch_size x gradient_accumulation_steps x block_size from 2,048 to 65,536, "
                "not 1,792"
            ],
        ),
        ({"vocab_size": 300}, ["auto was tried with vocab_size from 2,048 to 50,257, not 300"]),
    ],
)
def test_what_was_never_tried_is_refused_in_a_sentence_that_says_so(changes: dict, sentences: list[str]) -> None:
    problems = problems_with(**changes)
    assert len(problems) == len(sentences)
    for problem, sentence in zip(problems, sentences, strict=True):
        keys = ", ".join(key for key in KEYS if {**AUTO, **changes}[key] == "auto")
        assert problem.startswith(sentence if sentence.startswith("learning_rate:") else f"{keys}: {sentence}")


def test_the_train_stage_refuses_it_too() -> None:
    with pytest.raises(EncoreError, match="auto was tried with vocab_size from 2,048 to 50,257, not 300"):
        fill_in({**SMALL, **AUTO}, 300)


def test_a_page_with_numbers_may_be_of_any_size() -> None:
    assert problems_with(**{key: MODERN[key] for key in KEYS}, n_embd=768) == []
