"""The card of uploaded tokens: its numbers, what the Hub reads of it, and the code that it shows."""

import re
from html import escape

import numpy as np
import pytest
import tiktoken
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

from encore.pretrained.data_card import describe, describe_folder
from encore.tokens.ranks import write_ranks
from encore.tokens.tokenizer import GPT2_PATTERN, train_bpe
from tests.token_folders import make_documents, write_token_folder


def source(dataset, revision, licence):
    splits = {"train": {"tokens": 54_321}}
    return {"dataset": dataset, "dataset_revision": revision, "licence": licence, "token_cap": 1, "splits": splits}


CORPUS = source("hf:owner/corpus/en", "0123abc", "ODC-BY")
SHARDS = {
    "train": [
        {"name": "train_00000.bin", "tokens": 100_000_000, "documents": 90_000, "text_bytes": 440_000_000},
        {"name": "train_00001.bin", "tokens": 5, "documents": 1, "text_bytes": 20},
    ],
    "val": [{"name": "val_00000.bin", "tokens": 1_000, "documents": 9_999, "text_bytes": 4_000}],
}


def describe_with(*sources, shards=SHARDS):
    about = {"dtype": "uint16", "tokenizer": "bpe", "vocab_size": 2048}
    return describe({"sources": sources, "shards": shards, **about})


def test_what_it_says():
    lines = describe_with(CORPUS, source("package:sympy", "1.14.0", None)).splitlines()
    for line in (
        "100,001,005 tokens of 100,000 documents. They can be turned back into the text, whose licence holds.",
        "| `hf:owner/corpus/en` | `0123abc` | ODC-BY | 54,321 |",
        "| `package:sympy` | `1.14.0` | not named by the source: look there before you use it | 54,321 |",
        "| train | 2 | 100,000,005 | 90,001 | 440,000,020 | 200,000,010 |",
        "| val | 1 | 1,000 | 9,999 | 4,000 | 2,000 |",
        "- Tokenizer: `bpe`, 2,048 ids. `tokenizer.tiktoken` holds its ranks.",
        "- Documents: each is followed by the end-of-text token, 2047. One may go on in the next file.",
    ):
        assert line in lines


def test_the_hub_reads_what_it_lists_data_sets_by():
    """By the Hub's own library, which reads a card as the Hub does."""
    assert DatasetCard(describe_with(CORPUS)).data.to_dict() == {
        "license": "odc-by",
        "task_categories": ["text-generation"],
        "tags": ["encore", "tokens"],
        "size_categories": ["100K<n<1M"],
        "source_datasets": ["owner/corpus"],
        "viewer": False,
    }


@pytest.mark.parametrize(
    ("licences", "shown"),
    [(["MIT", "mit"], "mit"), (["MIT", "cc0-1.0"], ["mit", "cc0-1.0"]), (["MIT", None], None), (["mine"], None)],
)
def test_a_licence_is_named_to_the_hub_where_it_knows_that_of_each_source(licences, shown):
    sources = [source(f"files:{number}/*", "0" * 64, licence) for number, licence in enumerate(licences)]
    known = DatasetCard(describe_with(*sources)).data.to_dict()
    assert known.get("license") == shown
    assert "source_datasets" not in known


@pytest.mark.parametrize(
    ("documents", "shown"),
    [(2, "n<1K"), (999, "n<1K"), (1_000, "1K<n<10K"), (8_013_769, "1M<n<10M"), (2_000_000_000, "1B<n<10B")],
)
def test_the_size_is_one_of_the_hub_s_names(documents, shown):
    shards = {
        "train": [{**SHARDS["train"][0], "documents": documents - 1}],
        "val": [{**SHARDS["val"][0], "documents": 1}],
    }
    card = describe_with(CORPUS, shards=shards)
    assert DatasetCard(card).data.size_categories == [shown]


def test_what_others_have_written_is_text():
    licence = "mit |\n\n# <script>alert(1)</script> ![x](http://elsewhere/x.png)"
    card = describe_with(source("files:`|<img src=//elsewhere>/*.txt", "0", licence))
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---\n", 2)[2])
    assert f"<td>{escape(' '.join(licence.split()))}</td>" in html
    assert not re.search("<(script|img|a )", html)


def test_its_code_reads_the_folder(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tokens"
    write_token_folder(folder, make_documents([30], 300, 1), make_documents([20], 300, 2), 300, shard_tokens=100)
    ranks = train_bpe(["Once upon a time there was a model. " * 3, "It wrote what it had read."], 290)
    (folder / "tokenizer.tiktoken").write_bytes(write_ranks(ranks))
    encoding = tiktoken.Encoding("", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    ids = encoding.encode("It wrote upon a model.")
    (folder / "train_00000.bin").write_bytes(np.array(ids, "<u2").tobytes())
    code = describe_folder(folder).decode().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    exec(code, {})
    assert capsys.readouterr().out == "It wrote upon a model.\n"
