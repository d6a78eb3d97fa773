"""encore/tokens/tokenizer.py: training against a slow reference, encoding against tiktoken, and damaged files."""

import base64
import importlib
import itertools
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import regex
import sympy
import tiktoken

from encore.errors import EncoreError
from encore.tokens.ranks import read_ranks, write_ranks
from encore.tokens.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    LEARNED_CHARACTERS,
    load_tokenizer,
    make_tokenizer,
    train_bpe,
)
from tests.conftest import ROOT

NASTY_TEXTS = [
    "",
    " ",
    "plain words, and some more: 1234567890!",
    "tabs\t\tand\r\n\r\nlines   \n",
    "  leading and trailing  ",
    "I'll you've we'RE don't '",
    "Ünïcödé, 中文字符, العربية, हिन्दी, 한국어",
    "👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b\ufeff\u2028\u00a0",
    "\x00\x01\x1b[31m\x7f\x85",
    "\ufffd\U0010ffff\ue000",
    f"text {END_OF_TEXT} more <|endoftext|><|endoftext|>",
]
LONG_TEXTS = ["a" * 1_000_000, " " * 1_000_000, "ab1!" * 250_000, "\n" * 1_000_000, "語" * 300_000]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """Two modules of sympy, whose version is pinned (code with indentation, prose), and a little beyond ASCII."""
    folder = Path(sympy.__file__).parent
    return [(folder / name).read_text() for name in ("ntheory/digits.py", "core/cache.py")] + ["äöü ä ä 中"]


@pytest.fixture
def tokenizer(corpus: list[str], tmp_path: Path) -> tiktoken.Encoding:
    path = tmp_path / "ranks"
    path.write_bytes(write_ranks(train_bpe(corpus, 600)))
    return load_tokenizer(path)


def byte_order() -> dict[int, int]:
    """The place of each byte among the characters that stand for bytes in a GPT-2 vocabulary (by code point)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {byte: n for n, byte in enumerate([*printable, *(b for b in range(256) if b not in printable)])}


def slow_bpe(documents: list[str], count: int) -> list[bytes]:
    """Byte-pair encoding by the book: each time the most frequent pair, of equals the one whose parts are older."""
    words = Counter(word for text in documents for word in regex.findall(GPT2_PATTERN, text))
    rows = [([bytes([byte]) for byte in word.encode()], n) for word, n in words.items()]
    age = {bytes([byte]): place for byte, place in byte_order().items()}
    learned: list[bytes] = []
    while len(learned) < count:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for row, n in rows:
            for pair in itertools.pairwise(row):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], age[pair[0]], age[pair[1]]))
        merged = best[0] + best[1]
        if merged not in age:
            age[merged] = len(age)
            learned.append(merged)
        for row, _ in rows:
            i = 0
            while i < len(row) - 1:
                if (row[i], row[i + 1]) == best:
                    row[i : i + 2] = [merged]
                i += 1
    return learned


def test_training_takes_the_same_merges_as_a_slow_reference(corpus: list[str]) -> None:
    ranks = train_bpe(corpus, 257 + 250)
    assert [ranks[bytes([byte])] for byte in range(256)] == list(range(256))
    assert list(ranks)[256:] == slow_bpe(corpus, 250)
    assert list(ranks.values()) == list(range(256 + 250))


def test_a_run_of_white_space_over_several_lines_is_one_piece() -> None:
    """As it is when text is encoded. (The trainer's regex engine takes `$` for the end of every line.)"""
    assert list(train_bpe(["a\n\n\n b\n\n\n"], 257 + 2))[256:] == [b"\n\n", b"\n\n\n"]


def cpu_seconds(text: str) -> float:
    start = time.process_time()
    train_bpe([text], 300)
    return time.process_time() - start


@pytest.mark.slow
@pytest.mark.parametrize("signs", ["ACGT", " \t\n\r", "!?.,-#", "0123", "中文字符"])
def test_learning_from_text_without_blanks_takes_linear_time(signs: str) -> None:
    """Eight times the text; it took more than thirty times as long. Half a second is spared the small one's noise."""
    text = "".join(random.Random(1).choices(signs, k=160_000))
    assert cpu_seconds(text) < 16 * cpu_seconds(text[:20_000]) + 0.5


def test_long_words_are_learned_from_in_pieces() -> None:
    """As if these were documents; a word of the longest that is left alone is learned from as a whole."""
    text = "".join(random.Random(2).choices("ACGT中", k=2 * LEARNED_CHARACTERS + 100))
    pieces = [text[start : start + LEARNED_CHARACTERS] for start in range(0, len(text), LEARNED_CHARACTERS)]
    assert train_bpe([text], 600) == train_bpe(pieces, 600)
    assert list(train_bpe(pieces[:1], 300))[256:] == slow_bpe(pieces[:1], 43)


def test_equal_counts_are_decided_by_age() -> None:
    """Each pair occurs once: nothing but the rule for ties decides."""
    assert list(train_bpe(["zy xw ba"], 257 + 4))[256:] == slow_bpe(["zy xw ba"], 4) == [b"ba", b"xw", b"zy", b" ba"]


def test_the_smallest_vocabulary_is_bytes_and_end_of_text(tmp_path: Path) -> None:
    path = tmp_path / "ranks"
    path.write_bytes(write_ranks(train_bpe(["some text"], 257)))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode_ordinary("aé") == list("aé".encode())
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (257, 256)


def test_ranks_are_the_same_on_one_thread_and_under_another_hash_seed(corpus: list[str]) -> None:
    code = (
        "import sys; from encore.tokens.ranks import write_ranks; from encore.tokens.tokenizer import train_bpe; "
        "sys.stdout.buffer.write(write_ranks(train_bpe(sys.stdin.buffer.read().decode().split('\\0'), 600)))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        input="\0".join(corpus).encode(),
        env={**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"},
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    assert write_ranks(train_bpe(corpus, 600)) == write_ranks(train_bpe(iter(corpus), 600)) == other.stdout


@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_decoding_gives_the_text_back(tokenizer: tiktoken.Encoding, text: str) -> None:
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(0 <= i < tokenizer.eot_token for i in ids), "text never makes the end-of-text token"
    assert len(ids) <= len(text.encode())


@pytest.mark.parametrize("text", LONG_TEXTS, ids=["letters", "blanks", "mixed", "lines", "chinese"])
def test_megabytes_in_one_piece_are_encoded_too(tokenizer: tiktoken.Encoding, text: str) -> None:
    """A backtracking pattern or a quadratic merge would fail here, or take minutes."""
    assert tokenizer.decode_bytes(tokenizer.encode_ordinary(text)) == text.encode()


def test_a_ranks_file_can_be_read_back_and_is_tiktokens_own_format(corpus: list[str], tmp_path: Path) -> None:
    ranks = train_bpe(corpus, 400)
    path = tmp_path / "ranks"
    path.write_bytes(write_ranks(dict(reversed(ranks.items()))))
    lines = path.read_text().splitlines()
    assert lines == [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    tokenizer = load_tokenizer(path)
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (400, 399)
    assert tokenizer.encode_single_token(END_OF_TEXT) == 399
    assert {tokenizer.decode_single_token_bytes(rank): rank for rank in range(399)} == ranks


def test_tokenizers_of_the_same_ranks_encode_the_same_and_share_nothing(corpus: list[str], tmp_path: Path) -> None:
    path = tmp_path / "ranks"
    path.write_bytes(write_ranks(train_bpe(corpus, 400)))
    ranks = read_ranks(path)
    assert ranks == train_bpe(corpus, 400)
    one, other, loaded = make_tokenizer(ranks), make_tokenizer(ranks), load_tokenizer(path)
    assert one._core_bpe is not other._core_bpe
    for text in [*corpus, *NASTY_TEXTS]:
        assert one.encode_ordinary(text) == other.encode_ordinary(text) == loaded.encode_ordinary(text)
    assert (one.n_vocab, one.eot_token, one._pat_str) == (400, 399, GPT2_PATTERN)
    assert one.encode(END_OF_TEXT, allowed_special="all") == [399]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda lines: ["not ranks", *lines], "is not a file of byte-pair ranks"),
        (lambda lines: [*lines, "YWI= many"], "is not a file of byte-pair ranks"),
        (lambda lines: [*lines, "YWI=x 300"], "is not a file of byte-pair ranks"),
        (lambda lines: [*lines, ""], "is not a file of byte-pair ranks"),
        (lambda lines: [*lines, "YWI= 257"], "lacks some ranks"),  # a gap: 256 is nobody's
        (lambda lines: [*lines, "YWI= 255"], "lacks some ranks"),  # twice the same
        (lambda lines: lines[:100], "lacks some ranks"),  # not every byte
        (lambda lines: [], "lacks some ranks"),
    ],
)
def test_a_damaged_ranks_file_is_refused(tmp_path: Path, change, problem: str) -> None:
    path = tmp_path / "ranks"
    whole = write_ranks({bytes([byte]): byte for byte in range(256)}).decode().splitlines()
    path.write_text("\n".join(whole) + "\n")
    load_tokenizer(path)
    path.write_text("".join(line + "\n" for line in change(whole)))
    with pytest.raises(EncoreError) as error:
        load_tokenizer(path)
    assert str(error.value) == f"{path} {problem}; delete it and run `dvc repro`"


def test_a_missing_ranks_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(EncoreError) as error:
        load_tokenizer(tmp_path / "ranks")
    assert str(error.value) == f"{tmp_path / 'ranks'} is missing; `dvc repro` makes it"


def test_a_vocabulary_that_the_corpus_cannot_fill_is_refused() -> None:
    """One word of three letters: two merges, and with 256 bytes and end-of-text 259 tokens."""
    assert len(train_bpe(["abc"], 259)) == 258
    with pytest.raises(EncoreError) as error:
        train_bpe(["abc"], 300)
    assert str(error.value) == (
        "vocab_size: 300 is more than this corpus can fill; set vocab_size: 259, for which "
        "it has pairs, or a smaller one, or use more text"
    )


def test_the_pattern_is_tiktokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read where tiktoken defines it, without the download that its get_encoding would start."""
    public = importlib.import_module("tiktoken_ext.openai_public")
    monkeypatch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda **_: {})
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})
    assert public.r50k_base()["pat_str"] == public.gpt2()["pat_str"] == GPT2_PATTERN


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR is unset: no published ranks")
def test_the_published_ranks_encode_as_tiktokens_own(tmp_path: Path, corpus: list[str]) -> None:
    published = tiktoken.get_encoding("r50k_base")
    path = tmp_path / "ranks"
    path.write_bytes(write_ranks(published._mergeable_ranks))
    ours = load_tokenizer(path)
    assert (ours.n_vocab, ours.eot_token) == (50257, 50256) == (published.n_vocab, published.eot_token)
    for text in [*corpus, *NASTY_TEXTS, *LONG_TEXTS]:
        assert ours.encode_ordinary(text) == published.encode_ordinary(text)
    assert ours.encode_ordinary("Hello world") == [15496, 995]
