"""init_from.py: the shapes of published weights and of folders, and where a page describes another model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from encore.errors import EncoreError
from encore.models.gpt2 import GPT2, GPT2Config
from encore.pretrained.gpt2_hub import to_hub_config
from encore.pretrained.init_from import NAMES, PUBLISHED, RANKS, Shape, find_misfits, read_shape
from encore.pretrained.model_folder import save_model
from encore.tokens.token_files import RANKS_FILE

CONFIG = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 16}
SHAPE = Shape(architecture="gpt2", n_layer=2, n_head=4, n_embd=32, bias=True, block_size=16)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder weights/ of the working directory, with what the published GPT-2 comes with."""
    monkeypatch.chdir(tmp_path)
    folder = Path("weights")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").touch()
    return folder


def sizes_of(shape: Shape) -> dict[str, Any]:
    return {key: value for key, value in shape._asdict().items() if key != "architecture"}


def page(**changes: Any) -> dict[str, Any]:
    return {**SHAPE._asdict(), "init_from": "weights/", "tokenizer": "bpe", **changes}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_published_weights_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    published = PUBLISHED[name]
    with torch.device("meta"):
        model = GPT2(GPT2Config(vocab_size=50257, **sizes_of(published.shape)))
    assert model.count_parameters() == parameters
    assert published.repository == f"openai-community/{name}"
    assert re.fullmatch("[0-9a-f]{40}", published.commit)


def test_the_ranks_have_the_name_that_encore_gives_them() -> None:
    assert RANKS == RANKS_FILE


def test_all_that_is_published_is_told_apart() -> None:
    assert list(PUBLISHED) == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    assert len({published.commit for published in PUBLISHED.values()}) == 4


# a folder's shape


def test_a_folder_without_a_record_has_biases(weights: Path) -> None:
    assert read_shape(weights) == SHAPE


@pytest.mark.parametrize("bias", [True, False])
def test_a_folder_of_encore_says_whether_it_has_biases(tmp_path: Path, bias: bool) -> None:
    shape = SHAPE._replace(bias=bias)
    save_model(tmp_path, GPT2(GPT2Config(vocab_size=300, **sizes_of(shape))), b"ranks", {})
    assert read_shape(tmp_path) == shape


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(weights: Path, name: str) -> None:
    (weights / name).unlink()
    with pytest.raises(EncoreError) as error:
        read_shape(weights)
    assert str(error.value) == (
        f"init_from: weights/{name} is missing; name a folder that holds config.json and model.safetensors"
    )


def test_another_architecture_is_refused(weights: Path) -> None:
    (weights / "config.json").write_text(json.dumps({**CONFIG, "model_type": "llama"}))
    with pytest.raises(
        EncoreError, match=r"^init_from: weights holds a llama; name the folder of a gpt2, nanochat or nanochat-plus$"
    ):
        read_shape(weights)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("activation_function", "relu", "gelu_new"),
        ("layer_norm_epsilon", 1e-6, "1e-05"),
        ("scale_attn_weights", False, "True"),
        ("scale_attn_by_inverse_layer_idx", True, "False"),
        ("tie_word_embeddings", False, "True"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(weights: Path, key: str, value: object, expected: str) -> None:
    """The tensors would fit, and mean something else."""
    (weights / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    with pytest.raises(EncoreError) as error:
        read_shape(weights)
    assert str(error.value) == (
        f"init_from: weights/config.json has {key}: {value}, where Encore computes with {expected} only; "
        "name other weights"
    )


def test_what_encore_and_transformers_write_is_computed_alike(weights: Path) -> None:
    import transformers

    config = GPT2Config(vocab_size=300, **sizes_of(SHAPE))
    for written in (to_hub_config(config), transformers.GPT2Config(**to_hub_config(config)).to_dict()):
        assert {"activation_function", "layer_norm_epsilon", "tie_word_embeddings"} < set(written)
        (weights / "config.json").write_text(json.dumps(written))
        assert read_shape(weights) == SHAPE


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("config.json", '{"model_type": "gpt2", "n_layer": 2}', r"KeyError\('n_head'\)"),
        ("config.json", "{}", r"KeyError\('model_type'\)"),
        ("config.json", "[]", "TypeError.*"),
        ("config.json", '{"model_type": "gpt', "JSONDecodeError.*"),
        ("encore.json", "{}", r"KeyError\('bias'\)"),
    ],
)
def test_a_folder_that_does_not_say_what_it_holds_is_refused(weights: Path, name: str, text: str, told: str) -> None:
    (weights / name).write_text(text)
    sentence = rf"^init_from: weights does not say which {NAMES} it holds \({told}\); name one that Encore"
    with pytest.raises(EncoreError, match=sentence):
        read_shape(weights)


def test_a_damaged_record_is_named(weights: Path) -> None:
    (weights / "encore.json").write_text('{"bias": tr')
    with pytest.raises(EncoreError, match=r"^weights/encore\.json is not valid JSON .*; bring weights back from where"):
        read_shape(weights)


# a page against it


def test_a_page_that_fits(weights: Path) -> None:
    assert find_misfits(page()) == []
    assert find_misfits(page(block_size=1)) == []
    assert find_misfits({"init_from": "scratch"}) == []


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({"n_layer": 3}, ["n_layer: 3 is not what the weights of init_from, weights/, have: 2"]),
        ({"n_head": 8}, ["n_head: 8 is not what the weights of init_from, weights/, have: 4"]),
        ({"n_embd": 64}, ["n_embd: 64 is not what the weights of init_from, weights/, have: 32"]),
        ({"bias": False}, ["bias: False is not what the weights of init_from, weights/, have: True"]),
        (
            {"block_size": 17},
            [
                "block_size: 17 is above 16, what the weights of init_from, weights/, have positions for; it may be "
                "lower"
            ],
        ),
        (
            {"n_layer": 1, "bias": False, "block_size": 8},
            [
                "n_layer: 1 is not what the weights of init_from, weights/, have: 2",
                "bias: False is not what the weights of init_from, weights/, have: True",
            ],
        ),
    ],
)
def test_each_key_that_does_not_fit_gives_its_sentence(
    weights: Path, changes: dict[str, Any], sentences: list[str]
) -> None:
    assert find_misfits(page(**changes)) == sentences


def test_published_weights_want_their_tokenizer_and_shape() -> None:
    shape = {"architecture": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "bias": True, "block_size": 1024}
    start = {**shape, "init_from": "gpt2", "tokenizer": "gpt2"}
    assert find_misfits(start) == []
    assert find_misfits({**start, "tokenizer": "bpe", "bias": False}) == [
        "bias: False is not what the weights of init_from, gpt2, have: True",
        "tokenizer: bpe is not that of init_from, gpt2; set gpt2",
    ]
    assert [line.split(":")[0] for line in find_misfits({**start, "init_from": "gpt2-xl"})] == [
        "n_layer",
        "n_head",
        "n_embd",
    ]


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(EncoreError, match=r"^init_from: nowhere/at/all/config\.json is missing;"):
        find_misfits(page(init_from="nowhere/at/all"))
