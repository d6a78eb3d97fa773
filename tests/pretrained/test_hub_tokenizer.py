"""model/'s tokenizer as transformers reads it, against tiktoken with the same ranks."""

import json
import os

import pytest
import tiktoken

from encore.files import write_json
from encore.pretrained.hub_tokenizer import describe, find_merges, save_hub_tokenizer
from encore.tokens.tokenizer import END_OF_TEXT, make_tokenizer, train_bpe
from tests.tokens.test_tokenizer import NASTY_TEXTS

PROSE = [
    f"It was the {n}th day; they hadn't seen {n * 37} ships, naïve or otherwise.\n\n  So they'd wait."
    for n in range(60)
]


def read_with_transformers(folder, ranks):
    transformers = pytest.importorskip("transformers")
    save_hub_tokenizer(folder, ranks, 64)
    write_json(folder / "config.json", {"model_type": "gpt2"})
    return transformers.AutoTokenizer.from_pretrained(folder)


def without_end_of_text(texts):
    """transformers reads the name of that token as the token, wherever it stands; the pipeline, as letters."""
    return [text for text in texts if END_OF_TEXT not in text]


def assert_equal(theirs, ours, texts):
    for text in texts:
        ids = ours.encode_ordinary(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text


def test_ids_are_those_of_the_trained_tokenizer(tmp_path):
    ranks = train_bpe(PROSE, 400)
    theirs = read_with_transformers(tmp_path, ranks)
    assert_equal(theirs, make_tokenizer(ranks), PROSE + without_end_of_text(NASTY_TEXTS))
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs), theirs.model_max_length) == (399, 399, 400, 64)
    assert theirs(END_OF_TEXT)["input_ids"] == [399]


@pytest.mark.skipif(not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="TIKTOKEN_CACHE_DIR is unset: no published ranks")
def test_ids_are_those_of_the_published_tokenizer(tmp_path):
    ours = tiktoken.get_encoding("r50k_base")
    theirs = read_with_transformers(tmp_path, ours._mergeable_ranks)
    assert_equal(theirs, ours, PROSE + without_end_of_text(NASTY_TEXTS))
    assert (theirs.eos_token_id, len(theirs)) == (50256, 50257)


def test_merges_are_the_pairs_that_the_ranks_were_learned_by():
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"ab": 256, b"cd": 257, b"abc": 258, b"abcd": 259, b"zz": 260, b"unreachable": 261}
    # abcd: after ab and cd, of which the first comes first, there are two parts; abc can no longer come of it.
    assert find_merges(ranks) == [(b"a", b"b"), (b"c", b"d"), (b"ab", b"c"), (b"ab", b"cd"), (b"z", b"z")]


def test_the_same_ranks_give_the_same_bytes(tmp_path):
    ranks = train_bpe(PROSE, 300)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_hub_tokenizer(tmp_path / name, dict(ranks), 64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "tokenizer.json").read_text()) == describe(ranks)
