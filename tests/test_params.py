"""encore/params.py: the schema, its sentences, and each stage's view of the page."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from encore.errors import EncoreError
from encore.params import Params, StageParams, check_page, find_problems, find_warnings, load_params
from tests.conftest import MODERN, PAGE, ROOT, read_page, write_page

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_presets_are_found() -> None:
    assert {"quickstart.yaml", PAGE.name} < {path.name for path in PRESETS}


@pytest.mark.parametrize("path", [*PRESETS, ROOT / "params.yaml"], ids=lambda path: path.name)
def test_every_page_of_the_repository_passes_and_has_the_same_keys_in_the_same_order(path: Path) -> None:
    check_page(path)
    assert list(read_page(path)) == list(Params.model_fields)
    assert find_warnings(check_page(path)) == []


def problems_with(**changes: Any) -> list[str]:
    return find_problems({**read_page(), "max_iters": 400, "warmup_iters": 40, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rat": 1}, "learning_rat: no such key; did you mean learning_rate?"),
        ({"zzz": 1}, "zzz: no such key; remove it"),
        ({1: 1}, "1: no such key; remove it"),
        ({"max_iters": "many"}, "max_iters: 'many' will not do; a number is wanted"),
        ({"max_iters": True}, "max_iters: True will not do; a number is wanted"),
        ({"learning_rate": False}, "learning_rate: False will not do; a number is wanted"),
        ({"max_iters": None}, "max_iters: null will not do; it should be a valid integer"),
        ({"max_iters": [1]}, "max_iters: [1] will not do; it should be a valid integer"),
        (
            {"max_iters": 1.5},
            "max_iters: 1.5 will not do; it should be a valid integer, got a number with a fractional part",
        ),
        ({"max_iters": 0}, "max_iters: 0 will not do; it should be greater than or equal to 1"),
        ({"max_iters": "inf"}, "max_iters: 'inf' will not do; it should be a finite number"),
        ({"lr_decay_iters": "a"}, "lr_decay_iters: 'a' will not do; a number is wanted"),
        ({"lr_decay_iters": 0}, "lr_decay_iters: 0 will not do; it should be greater than or equal to 1"),
        ({"top_k": True}, "top_k: True will not do; a number is wanted"),
        ({"learning_rate": math.nan}, "learning_rate: nan will not do; it should be a finite number"),
        ({"learning_rate": "nan"}, "learning_rate: 'nan' will not do; it should be a finite number"),
        ({"learning_rate": "6e-5x"}, "learning_rate: '6e-5x' will not do; a number is wanted"),
        ({"weight_decay": math.inf}, "weight_decay: inf will not do; it should be a finite number"),
        ({"learning_rate": 0, "min_lr": 0}, "learning_rate: 0 will not do; it should be greater than 0"),
        ({"val_fraction": 0}, "val_fraction: 0 will not do; it should be greater than 0"),
        ({"val_fraction": 1}, "val_fraction: 1 will not do; it should be less than 1"),
        ({"dropout": 1.0}, "dropout: 1.0 will not do; it should be less than 1"),
        ({"beta2": 1}, "beta2: 1 will not do; it should be less than 1"),
        ({"seed": -1}, "seed: -1 will not do; it should be greater than or equal to 0"),
        ({"seed": 2**32}, "seed: 4294967296 will not do; it should be less than 4294967296"),
        ({"vocab_size": 256}, "vocab_size: 256 will not do; it should be greater than or equal to 257"),
        ({"text_column": ""}, "text_column: '' will not do; string should have at least 1 character"),
        ({"start": None}, "start: null will not do; it should be a valid string"),
        ({"start": 1}, "start: 1 will not do; it should be a valid string"),
        ({"bias": 1}, "bias: 1 will not do; it should be a valid boolean"),
        ({"document_masking": 1}, "document_masking: 1 will not do; it should be a valid boolean"),
        ({"bias": "true"}, "bias: 'true' will not do; it should be a valid boolean"),
        ({"compile": "yes"}, "compile: 'yes' will not do; it should be 'auto', True or False"),
        ({"dtype": "fp16"}, "dtype: 'fp16' will not do; it should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"tokenizer": "bert"}, "tokenizer: 'bert' will not do; it should be 'bpe' or 'gpt2'"),
        (
            {"evaluate_tasks": ["hella swag"]},
            "evaluate_tasks: ['hella swag'] will not do; a task is a name of lm-eval's, "
            "as in [hellaswag, lambada_openai]",
        ),
        ({"evaluate_tasks": "hellaswag"}, "evaluate_tasks: 'hellaswag' will not do; it should be a valid list"),
        (
            {"architecture": "llama"},
            "architecture: 'llama' will not do; it should be 'gpt2', 'nanochat' or 'nanochat-plus'",
        ),
        *(
            (
                {"init_from": start},
                f"init_from: {start!r} will not do; it should be scratch, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or "
                "the path of a folder of weights, with a / in it",
            )
            for start in ("gpt", "gpt2_xl", "GPT2", "Scratch", "weights", "")
        ),
        *(
            (
                {"init_from": start},
                f"init_from: {start!r} will not do; data/ is the pipeline's own, where files come and go; copy the "
                "folder elsewhere",
            )
            for start in ("data/init", "./data/init/", "data/raw")
        ),
        ({"init_from": None}, "init_from: null will not do; it should be a valid string"),
        ({"init_from": 2}, "init_from: 2 will not do; it should be a valid string"),
        ({"dataset": 3}, "dataset: 3 will not do; it should be a valid string"),
        (
            {"dataset_revision": 3.20},
            "dataset_revision: 3.2 will not do; it is read as a number, where 3.20 is 3.2; put it in quotes, with "
            "every digit, as '3.20'",
        ),
        ({"n_embd": 130, "n_head": 4}, "n_embd: 130 does not divide by n_head, 4"),
        ({"min_lr": 0.2, "learning_rate": 0.1}, "min_lr: 0.2 is above learning_rate, 0.1"),
        ({"warmup_iters": 401}, "warmup_iters: 401 is above max_iters, 400; warm up for less"),
        (
            {"warmup_iters": 60, "lr_decay_iters": 50},
            "warmup_iters: 60 is above lr_decay_iters, 50; warm up for less",
        ),
        (
            {**MODERN, "bias": True},
            "bias: True will not do; architecture nanochat has no biases, set false",
        ),
        (
            {**MODERN, "dropout": 0.1},
            "dropout: 0.1 will not do; architecture nanochat drops nothing, set 0.0",
        ),
        (
            {**MODERN, "n_embd": 36, "n_head": 4},
            "n_head: 4 heads of width 9 will not do; architecture nanochat rotates pairs of numbers, so n_embd must "
            "divide by 2 x n_head",
        ),
        *(
            (
                {**MODERN, key: None},
                f"{key}: null will not do; optimizer muon leaves these weights to AdamW, give its rate",
            )
            for key in ("embedding_lr", "head_lr")
        ),
        (
            {"embedding_lr": 0.1},
            "embedding_lr: 0.1 would change nothing with optimizer adamw and architecture gpt2; set null",
        ),
        (
            {**MODERN, "architecture": "gpt2"},
            "head_lr: 0.1 would change nothing with optimizer muon and architecture gpt2; set null",
        ),
        (
            {**MODERN, "warmdown_ratio": None},
            "warmdown_ratio: null will not do for lr_schedule trapezoid; give the share in which it falls, as 0.6",
        ),
        (
            {"warmdown_ratio": 0.5},
            "warmdown_ratio: 0.5 will not do for lr_schedule cosine; set null",
        ),
        (
            {**MODERN, "max_iters": 100, "warmup_iters": 41},
            "warmdown_ratio: 0.6 of 100 iterations leaves 40 for warmup_iters, 41; lower one of them",
        ),
        (
            {"optimizer": "lion"},
            "optimizer: 'lion' will not do; it should be 'adamw' or 'muon'",
        ),
        (
            {"tokenizer": "gpt2", "vocab_size": 50304},
            "vocab_size: 50304 will not do; the gpt2 tokenizer has 50257",
        ),
        *(
            (
                {"dataset": dataset},
                f"dataset: {dataset!r} will not do; a source is hf:OWNER/NAME, files:GLOB or package:NAME",
            )
            for dataset in ("sympy", "hf:gpt2", "http://x/y", "package:", "package:a b", "files:")
        ),
        *(
            (
                {"dataset": dataset, "dataset_revision": revision},
                f"dataset_revision: {revision!r} will not do; {dataset.split(':')[0]}: wants {meaning}, "
                f"which `encore sources '{dataset}'` prints",
            )
            for dataset, revision, meaning in [
                ("hf:a/b", "main", "the 40 hex digits of a commit"),
                ("hf:a/b", COMMIT.upper(), "the 40 hex digits of a commit"),
                ("hf:a/b/c", COMMIT + "0", "the 40 hex digits of a commit"),
                ("files:*.txt", COMMIT, "the sha256 of the files"),
                ("package:sympy", "main", "a version"),
                ("package:sympy", "1.14.0\n", "a version"),
            ]
        ),
    ],
)
def test_a_wrong_value_gives_exactly_its_sentence(changes: dict[str, Any], sentence: str) -> None:
    assert problems_with(**{str(key): value for key, value in changes.items()}) == [sentence]


def test_a_modern_page_has_no_problem() -> None:
    assert problems_with(**MODERN) == []
    assert problems_with(**{**MODERN, "architecture": "gpt2", "head_lr": None}) == []


def test_a_missing_key_gives_its_sentence() -> None:
    page = read_page()
    del page["seed"]
    assert find_problems(page) == ["seed: missing; presets/quickstart.yaml has a line for it"]


@pytest.mark.parametrize(
    ("dataset", "revision"),
    [
        ("hf:Skylion007/openwebtext", COMMIT),
        ("hf:a/b/plain_text", COMMIT),
        ("files:/texts/*.jsonl.gz", "ab" * 32),
        ("package:sympy", "1.14.0"),
        ("package:scikit-learn", "2.0.1rc1+local"),
    ],
)
def test_sources_with_their_revisions_pass(dataset: str, revision: str) -> None:
    assert problems_with(dataset=dataset, dataset_revision=revision) == []


@pytest.mark.parametrize("start", ["scratch", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "weights/", "/w", "./w"])
def test_starts_pass(start: str) -> None:
    assert problems_with(init_from=start) == []


def test_values_at_their_limits_pass() -> None:
    changes = {"warmup_iters": 400, "seed": 2**32 - 1, "vocab_size": 257, "start": "", "top_k": None, "grad_clip": 0}
    assert problems_with(**changes, min_lr=0, num_samples=0, temperature=0, split_seed=0, compile=False) == []


def test_a_conflict_waits_until_the_keys_in_it_are_right() -> None:
    assert problems_with(n_embd="wide", n_head=7) == ["n_embd: 'wide' will not do; a number is wanted"]


def test_all_problems_are_told_in_one_error(tmp_path: Path) -> None:
    page = tmp_path / "params.yaml"
    write_page(page, max_iter=5, n_embd=130, n_head=4, bias="yes")
    with pytest.raises(EncoreError) as error:
        check_page(page)
    assert str(error.value).splitlines() == [
        f"{page} has 3 problems; nothing was run:",
        "  max_iter: no such key; did you mean max_iters?",
        "  bias: 'yes' will not do; it should be a valid boolean",
        "  n_embd: 130 does not divide by n_head, 4",
    ]
    write_page(page, bias="yes")
    with pytest.raises(EncoreError, match=r" has 1 problem; nothing was run:\n  bias: "):
        check_page(page)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("min_lr", "'6e-05'", 6e-5),  # as `dvc exp run -S min_lr=6e-05` writes it
        ("min_lr", "'1e-4'", 1e-4),
        ("min_lr", "6e-4", 6e-4),  # a number in YAML 1.2, a string in 1.1
        ("min_lr", "'0.001'", 1e-3),
        ("min_lr", "0", 0.0),
        ("token_cap", "'4_000_000'", 4_000_000),
        ("token_cap", "4_000_000", 4_000_000),
        ("token_cap", "4e9", 4_000_000_000),
        ("token_cap", "'4e9'", 4_000_000_000),
        ("token_cap", "3.0", 3),
        ("lr_decay_iters", "'1000'", 1000),
        ("lr_decay_iters", "null", None),
        ("top_k", "~", None),
        ("compile", "false", False),
        ("compile", "true", True),
        ("compile", "auto", "auto"),
    ],
)
def test_numbers_arrive_as_numbers_however_they_are_written(
    tmp_path: Path, key: str, text: str, value: float | str | None
) -> None:
    page = tmp_path / "params.yaml"
    lines = [f"{key}: {text}" if line.startswith(f"{key}:") else line for line in PAGE.read_text().splitlines()]
    page.write_text("\n".join(lines))
    read = getattr(check_page(page), key)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("word", ["on", "off", "no", "yes", "y"])
def test_the_booleans_of_yaml_1_1_are_words_as_they_are_to_dvc(tmp_path: Path, word: str) -> None:
    page = tmp_path / "params.yaml"
    page.write_text(PAGE.read_text().replace("bias: false", f"bias: {word}"))
    with pytest.raises(EncoreError, match=f"bias: '{word}' will not do"):
        check_page(page)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"seed: 1\n\tbias: true\n", ", line 2: found character '\\t' that cannot start any token"),
        (
            b"seed: 1\nbias: true\nseed: 2\n",
            ', line 3: found duplicate key "seed" with value "2" (original value: "1")',
        ),
        (b"seed: 1\nbias: a: b\n", ", line 2: mapping values are not allowed here"),
        (b"seed: 1\ntop_k: !foo 3\n", ", line 2: could not determine a constructor for the tag '!foo'"),
        (b"seed: 1\n# caf\xe9\n", " is not UTF-8 text (byte 13); save it as UTF-8"),
        (b"", " holds no `key: value` lines; `cp presets/quickstart.yaml {page}` brings it back"),
        (b"# nothing\n", " holds no `key: value` lines; `cp presets/quickstart.yaml {page}` brings it back"),
        (b"- seed\n", " holds no `key: value` lines; `cp presets/quickstart.yaml {page}` brings it back"),
        (None, " is missing; `cp presets/quickstart.yaml {page}` brings it back"),
    ],
)
def test_a_page_that_cannot_be_read_gives_one_sentence(tmp_path: Path, data: bytes | None, sentence: str) -> None:
    page = tmp_path / "params.yaml"
    if data is not None:
        page.write_bytes(data)
    with pytest.raises(EncoreError) as error:
        check_page(page)
    assert str(error.value) == f"{page}{sentence.format(page=page)}"


def test_a_stage_gets_the_keys_that_dvc_lists_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    write_page(tmp_path / "params.yaml", token_cap="12_345")
    params = load_params("count_tokens")
    assert params.as_dict() == {"token_cap": 12345}
    assert params.token_cap == 12345
    with pytest.raises(EncoreError) as error:
        _ = params.vocab_size
    assert str(error.value) == (
        "stage count_tokens reads params.yaml's vocab_size, which DVC does not track for it: "
        "add `- vocab_size` to stages.count_tokens.params in dvc.yaml"
    )


def test_a_stages_dictionary_is_a_copy() -> None:
    params = StageParams("train", {"seed": 1})
    params.as_dict()["seed"] = 2
    assert params.seed == 1


def test_a_stage_or_key_that_the_pipeline_has_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_page(tmp_path / "params.yaml")
    (tmp_path / "dvc.yaml").write_text("stages: {one: {params: [seed, sed, tokn]}, two: {}}\n")
    assert load_params("two").as_dict() == {}
    with pytest.raises(
        EncoreError, match=r"^dvc\.yaml lists sed, tokn for stage one, which params.yaml does not have$"
    ):
        load_params("one")
    with pytest.raises(EncoreError, match=r"^dvc\.yaml has no stage named three; it has one, two$"):
        load_params("three")


def test_a_wrong_page_stops_a_stage_even_where_its_own_keys_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    write_page(tmp_path / "params.yaml", n_layer=0)
    with pytest.raises(EncoreError, match="n_layer: 0 will not do"):
        load_params("count_tokens")


def test_a_decay_that_ends_elsewhere_than_training_is_noted() -> None:
    params = Params(**{**read_page(), "max_iters": 6000, "lr_decay_iters": 600_000})
    (warning,) = find_warnings(params)
    assert warning.startswith("lr_decay_iters is 600000 and max_iters is 6000, so ")
    assert "lr_decay_iters: null" in warning
    for decay in (None, 6000):
        assert find_warnings(params.model_copy(update={"lr_decay_iters": decay})) == []


def test_a_pipeline_that_is_missing_comes_back_from_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_page(Path("params.yaml"))
    with pytest.raises(EncoreError, match=r"^dvc\.yaml is missing; `git checkout dvc\.yaml` brings it back$"):
        load_params("train")
