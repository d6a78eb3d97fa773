"""The model card: its numbers, its front matter, and the code that it shows."""

import json
import re
from html import escape

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from ruamel.yaml import YAML

from encore.models.architectures import make_model
from encore.models.gpt2 import GPT2Config
from encore.models.nanochat import NanoChatConfig
from encore.pretrained.hub_tokenizer import save_hub_tokenizer
from encore.pretrained.model_card import CARD, TITLES, USE, USE_PLUS, write_card
from encore.pretrained.model_folder import save_model
from encore.tokens.ranks import write_ranks
from encore.tokens.tokenizer import train_bpe

RECORD = {
    "params": {"architecture": "gpt2", "n_layer": 2, "init_from": "scratch", "max_iters": 600},
    "data": {
        "sources": [
            {
                "name": None,
                "dataset": "hf:owner/corpus/en",
                "dataset_revision": "0123abc",
                "licence": "cc0-1.0",
                "train_tokens": 3_030_201,
            }
        ],
        "tokenizer": "bpe",
        "vocab_size": 2048,
        "train_tokens": 3_030_201,
    },
    "versions": {"torch": "2.13.0", "numpy": "2.3.4"},
}
SUMMARY = {
    "tokens_seen": 1_843_200,
    "parameters": 1_308_864,
    "iter": 900,
    "train": {"loss": 2.96409},
    "val": {"loss": 3.14741},
    "device": "cpu, float32",
    "devices": 1,
    "tokens_per_second": 22_694.1,
}


def make_card(folder, **data):
    folder.mkdir()
    [source] = RECORD["data"]["sources"]
    keys = {key: data.pop(key, value) for key, value in source.items()}
    write_card(folder, {**RECORD, "data": {**RECORD["data"], "sources": [keys], **data}}, SUMMARY)
    return (folder / CARD).read_text(encoding="utf-8")


def front_matter(card):
    _, front, _ = card.split("---\n", 2)
    return YAML(typ="safe").load(front)


def test_what_it_says(tmp_path):
    card = make_card(tmp_path / "model")
    for line in (
        "| data | `hf:owner/corpus/en` at `0123abc` |",
        "| licence of the data | cc0-1.0 |",
        "| tokens | 1,843,200 seen, 3,030,201 in the training split |",
        "| tokenizer | `bpe`, 2,048 ids |",
        "| parameters | 1,308,864 |",
        "| started from | `scratch` |",
        "| iterations | 900 |",
        "| loss | train 2.9641, val 3.1474 nats a token |",
        "| hardware | 1 x cpu, float32 |",
        "| versions | torch 2.13.0, numpy 2.3.4 |",
    ):
        assert line in card.splitlines()
    shown = card.split("```json\n")[1].split("```")[0]
    assert json.loads(shown) == RECORD["params"]
    assert "22,694" not in card, "what a clock says would make the same run's bytes differ"


def test_what_the_hub_says_of_the_licence_is_text(tmp_path):
    """The data set's card is its owner's, and so are the names of files."""
    licence = "mit |\n\n# <script>alert(1)</script> ![x](http://elsewhere/x.png)"
    card = make_card(tmp_path / "model", licence=licence, dataset="files:`|<img src=//elsewhere>/*.txt")
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---\n", 2)[2])
    for written in (licence, "files:`|<img src=//elsewhere>/*.txt"):
        assert f"<td>{escape(' '.join(written.split()))}" in html
    assert not re.search("<(script|img|a )", html)
    assert html.count("<h1>") == 1


def test_the_hub_reads_what_it_lists_models_by(tmp_path):
    """By the Hub's own library, which reads a card as the Hub does."""
    make_card(tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / CARD)
    known = card.data.to_dict()
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("loss", 3.1474)
    assert result.metric_name == "val loss in training, nats a token"
    assert (result.task_type, result.dataset_type, result.dataset_name) == (
        "text-generation",
        "owner/corpus",
        "hf:owner/corpus/en",
    )
    assert (result.dataset_split, result.dataset_revision) == ("val", "0123abc")
    assert card.data.model_name == "encore-gpt2"
    assert {key: value for key, value in known.items() if key != "model-index"} == {
        "license": "cc0-1.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["encore", "gpt2"],
        "datasets": ["owner/corpus"],
    }


def test_a_mixture_names_each_source_and_its_share(tmp_path):
    web = {**RECORD["data"]["sources"][0], "name": "web", "dataset": "hf:owner/web", "train_tokens": 3_000_000}
    code = {**web, "name": "code", "dataset": "files:code/*.txt", "licence": "MIT", "train_tokens": 1_000_000}
    data = {**RECORD["data"], "sources": [code, web], "train_tokens": 4_000_000}
    write_card(tmp_path, {**RECORD, "data": data}, SUMMARY)
    lines = (tmp_path / CARD).read_text(encoding="utf-8").splitlines()
    assert "| data | `files:code/*.txt` at `0123abc` (25.0%); `hf:owner/web` at `0123abc` (75.0%) |" in lines
    assert "| licence of the data | MIT; cc0-1.0 |" in lines
    card = ModelCard.load(tmp_path / CARD).data
    assert (card.datasets, card.license) == (["owner/web"], None)
    (result,) = card.eval_results
    assert (result.dataset_type, result.dataset_name) == (2 * ("files:code/*.txt + hf:owner/web",))
    assert result.dataset_revision == "0123abc + 0123abc"


@pytest.mark.parametrize(
    ("licence", "shown"),
    [("BSD-3-Clause", "bsd-3-clause"), ("BSD", "bsd"), (None, None), ("mit, cc0-1.0", None), ("See LICENSE", None)],
)
def test_only_a_licence_that_the_hub_knows_is_named_to_it(tmp_path, licence, shown):
    card = make_card(tmp_path / "model", licence=licence)
    assert front_matter(card).get("license") == shown


@pytest.mark.parametrize("dataset", ["package:sympy", "files:a: [b] \"c\" 'd' # é \U0001f600\u2028/*.txt"])
def test_only_data_of_the_hub_is_named_to_the_hub(tmp_path, dataset):
    make_card(tmp_path / "model", dataset=dataset)
    data = ModelCard.load(tmp_path / "model" / CARD).data
    assert data.datasets is None
    assert data.eval_results[0].dataset_name == dataset


SHAPE = {"vocab_size": 290, "block_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("gpt2", GPT2Config(**SHAPE, bias=False)),
        ("nanochat", NanoChatConfig(**SHAPE)),
        ("nanochat-plus", NanoChatConfig(**SHAPE, plus=True)),
    ],
    ids=["gpt2", "nanochat", "nanochat-plus"],
)
def test_its_code_runs_on_a_model_folder(tmp_path, monkeypatch, capsys, architecture, config):
    dynamic_module_utils = pytest.importorskip("transformers.dynamic_module_utils")
    ranks = train_bpe(["Once upon a time there was a model. " * 3, "It wrote what it had read."], 290)
    torch.manual_seed(0)
    model = make_model(config)
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(folder, model, write_ranks(ranks), {})
    save_hub_tokenizer(folder, ranks, 64)
    write_card(folder, {**RECORD, "params": {**RECORD["params"], "architecture": architecture}}, SUMMARY)
    card, is_plus = (folder / CARD).read_text(encoding="utf-8"), architecture == "nanochat-plus"
    code = card.split("```python\n")[1].split("```")[0]
    assert code == (USE_PLUS if is_plus else USE)
    assert f"# {TITLES[architecture]} trained" in card
    assert [is_plus] * 2 == ["trust_remote_code=True" in code, "modeling_nanochat_plus.py`, which comes with" in card]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    exec(code, {})
    assert capsys.readouterr().out.startswith("Once")
