"""encore/tokens/encode.py: the ids of each document alone, however the documents are cut, joined and shared out."""

import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, pairwise

import numpy as np
import pytest
import tiktoken

from encore.errors import EncoreError
from encore.tokens import encode
from encore.tokens.documents import is_val
from encore.tokens.encode import (
    BREAK,
    CUT_SHORT,
    WITH_END_OF_TEXT,
    Batch,
    Encoded,
    Piece,
    Tokens,
    count_workers,
    cut,
    encode_all,
    encode_pieces,
    gather_batches,
    learning_texts,
)
from encore.tokens.token_files import SPLITS
from encore.tokens.tokenizer import END_OF_TEXT, make_tokenizer, train_bpe
from tests.raw_text import SEED, VAL_FRACTION

WHITE_SPACE = [chr(code) for code in range(0x110000) if chr(code).isspace()]
# What splits in surprising ways: a few signs of each kind that the pattern knows, and all white space.
SIGNS = [
    *"abZéß中语123٣½'’.!?-_<|>\u200b\ufeff\u0301\u2060\x00\x7f\x85\U0001f389\U0001d7d9",
    *["'s", "'ll", "'re", "'S", "\r\n", "\n\n", "  ", "    ", "👩\u200d👩\u200d👧", "<|endof", "text|>", END_OF_TEXT],
    *WHITE_SPACE,
]
WEIGHTS = [6 if sign in ("a", "b", "中", "1", ".", "'", " ", "\n") else 1 for sign in SIGNS]
SetSizes = Callable[..., None]
# Too small to be of use, so that there are cuts everywhere: bytes of a batch, and of a run without a blank.
SIZES = [(1, 4), (1, 10**6), (5, 9), (30, 12), (30, 10**6), (10**6, 10**6)]


def random_documents(seed: int, count: int) -> list[str]:
    """Some are empty, some run over many batches."""
    dice = random.Random(seed)
    lengths = (int(dice.expovariate(1 / 15)) for _ in range(count))
    return ["".join(dice.choices(SIGNS, WEIGHTS, k=length)) for length in lengths]


def numbered(texts: Iterable[str]) -> Iterator[tuple[int, bytes]]:
    return enumerate(text.encode() for text in texts)


@pytest.fixture(scope="module")
def learned() -> dict[bytes, int]:
    """Ranks learned from text such as is encoded here, so that pairs of blanks and signs are among them."""
    return train_bpe(random_documents(0, 3000), 900)


@pytest.fixture(scope="module")
def published() -> dict[bytes, int]:
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("TIKTOKEN_CACHE_DIR is unset: no published ranks")
    return tiktoken.get_encoding("r50k_base")._mergeable_ranks


@pytest.fixture
def set_sizes(monkeypatch: pytest.MonkeyPatch) -> SetSizes:
    def set_them(batch_bytes: int, unbroken_bytes: int = 10**6) -> None:
        monkeypatch.setattr(encode, "BATCH_BYTES", batch_bytes)
        monkeypatch.setattr(encode, "UNBROKEN_BYTES", unbroken_bytes)

    return set_them


def plain_cut(text: str, batch_bytes: int, unbroken_bytes: int) -> list[tuple[int, bool]]:
    """Where a document is cut, and whether at a good place, looked for character by character."""
    starts = list(accumulate((len(character.encode()) for character in text), initial=0))
    good = [
        start
        for start, (before, character) in zip(starts[1:], pairwise(text), strict=False)
        if character in " \n" and not before.isspace()
    ]
    size, start, cuts = starts[-1], 0, []
    while size - start > batch_bytes:
        least, most = start + batch_bytes, start + batch_bytes + unbroken_bytes
        blank = next((place for place in good if least <= place < most), None)
        if blank is None and size <= most:
            break
        start = max(place for place in starts if place <= most) if blank is None else blank
        cuts.append((start, blank is not None))
    return [*cuts, (size, True)]


def put_together(results: Iterable[Encoded]) -> dict[str, list[tuple[int, list[int], int]]]:
    """Number, ids and text bytes of each document of each split; one that a batch leaves open ends in a later one."""
    documents: dict[str, list[tuple[int, list[int], int]]] = {split: [] for split in SPLITS}
    open_ids: dict[str, list[int]] = {split: [] for split in SPLITS}
    for result in results:
        for split in SPLITS:
            tokens: Tokens = getattr(result, split)
            start = 0
            for number, end, count in zip(tokens.numbers, tokens.ends, tokens.text_bytes, strict=True):
                documents[split].append((int(number), open_ids[split] + tokens.ids[start:end].tolist(), int(count)))
                start, open_ids[split] = end, []
            open_ids[split] += tokens.ids[start:].tolist()
    assert open_ids == {split: [] for split in SPLITS}
    return documents


@pytest.mark.slow
def test_all_of_unicodes_white_space_and_nothing_else_stands_in_the_way_of_a_cut() -> None:
    wrong = []
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            before = f"x{chr(code)}".encode()
            for blank in (b" ", b"\n"):
                if bool(BREAK.match(before + blank + b"y", len(before))) == chr(code).isspace():
                    wrong.append(chr(code))
    assert wrong == []
    assert len(WHITE_SPACE) == 29
    assert BREAK.search("no\tother\rwhite\u00a0space\u2003is\u3000a place to cut".encode()).start() == 30


@pytest.mark.slow
def test_no_split_of_the_pattern_reaches_across_a_cut() -> None:
    """With a rank for every pair of a byte and a blank, ids tell where the pattern splits. All characters of Unicode's
    first plane and a part of the others."""
    pairs = [bytes([byte]) + blank for byte in range(256) for blank in (b" ", b"\n")]
    tokenizer = make_tokenizer({token: rank for rank, token in enumerate([*(bytes([n]) for n in range(256)), *pairs])})
    codes = [code for code in [*range(0x10000), *range(0x10000, 0x110000, 13)] if not 0xD800 <= code < 0xE000]
    for start in range(0, len(codes), 4096):
        text = "".join(f"x{chr(code)}  y{chr(code)}\n  z" for code in codes[start : start + 4096]).encode()
        places = [0, *(match.start() for match in BREAK.finditer(text)), len(text)]
        pieces = [Piece(0, text[first:last], last - first) for first, last in pairwise(places)]
        ids = encode_pieces(tokenizer, pieces).ids
        assert ids[ids != tokenizer.eot_token].tolist() == tokenizer.encode_ordinary(text.decode())
    for character in WHITE_SPACE:
        if character not in "\x1c\x1d\x1e\x1f":  # white space to Python, not to the pattern
            left, right = f"x{character}", "  y"
            apart = tokenizer.encode_ordinary(left) + tokenizer.encode_ordinary(right)
            assert apart != tokenizer.encode_ordinary(left + right), "so the ids do tell"


@pytest.mark.parametrize("sizes", SIZES)
def test_documents_are_cut_where_a_plain_search_would(set_sizes: SetSizes, sizes: tuple[int, int]) -> None:
    set_sizes(*sizes)
    for text in random_documents(1, 700):
        assert list(cut(text.encode())) == plain_cut(text, *sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("which", ["learned", "published"])
def test_documents_together_are_encoded_as_each_one_alone(
    set_sizes: SetSizes, sizes: tuple[int, int], which: str, request: pytest.FixtureRequest
) -> None:
    """As a whole where there was a blank to cut at, else as the runs between the forced cuts."""
    ranks = request.getfixturevalue(which)
    tokenizer = make_tokenizer(ranks)
    set_sizes(*sizes)
    texts = [text for text in random_documents(2, 1500) if text]
    expected: dict[str, list[tuple[int, list[int], int]]] = {split: [] for split in SPLITS}
    remarks = {(number, WITH_END_OF_TEXT) for number, text in enumerate(texts) if END_OF_TEXT in text}
    for number, text in enumerate(texts):
        utf8 = text.encode()
        forced = [stop for stop, at_blank in plain_cut(text, *sizes) if not at_blank]
        remarks |= {(number, CUT_SHORT) for _ in forced}
        runs = [utf8[start:stop].decode() for start, stop in pairwise([0, *forced, len(utf8)])]
        ids = [*(i for run in runs for i in tokenizer.encode_ordinary(run)), tokenizer.eot_token]
        assert tokenizer.decode(ids[:-1]) == text
        expected["val" if is_val(number, SEED, VAL_FRACTION) else "train"].append((number, ids, len(utf8)))
    results = list(encode_all(gather_batches(numbered(texts), SEED, VAL_FRACTION), ranks, 1))
    assert put_together(results) == expected
    assert {remark for result in results for remark in result.remarks} == remarks
    assert {rule for _, rule in remarks} >= {WITH_END_OF_TEXT}
    assert (CUT_SHORT in {rule for _, rule in remarks}) == (sizes[1] < 100)
    assert (len(results) > 1) == (sizes[0] < 10**6)
    assert {getattr(result, split).ids.dtype for result in results for split in SPLITS} == {np.dtype("<u2")}


def test_a_long_document_runs_over_several_batches_and_its_remarks_are_its_own(set_sizes: SetSizes) -> None:
    """Document 7 is held out. Pieces are of 10 bytes and what it takes to the next blank, runs without one of 16."""
    set_sizes(10, 6)
    texts = {5: "one two three four five", 7: "ab cd\nef gh ij", 9: "x" * 40, 10: "a<|endoftext|>b", 12: "end"}
    batches = list(gather_batches(((number, text.encode()) for number, text in texts.items()), SEED, VAL_FRACTION))
    assert batches == [
        Batch([Piece(5, b"one two three", None)], [], [], 13),
        Batch([Piece(5, b" four five", 23)], [], [], 10),
        Batch([], [Piece(7, b"ab cd\nef gh", None)], [], 11),
        Batch([Piece(9, b"x" * 16, None)], [Piece(7, b" ij", 14)], [(9, CUT_SHORT)], 19),
        Batch([Piece(9, b"x" * 16, None)], [], [(9, CUT_SHORT)], 16),
        Batch([Piece(9, b"x" * 8, 40), Piece(10, b"a<|endoftext|>b", 15)], [], [(10, WITH_END_OF_TEXT)], 23),
        Batch([Piece(12, b"end", 3)], [], [], 3),
    ]
    ranks = {bytes([byte]): byte for byte in range(256)}
    results = list(encode_all(batches, ranks, 2))
    assert [result.remarks for result in results] == [
        [],
        [],
        [],
        [(9, CUT_SHORT)],
        [(9, CUT_SHORT)],
        [(10, WITH_END_OF_TEXT)],
        [],
    ]
    train = [(list(tokens.numbers), list(tokens.ends), list(tokens.text_bytes)) for tokens, _, _ in results]
    assert train == [
        ([], [], []),
        ([5], [11], [23]),
        ([], [], []),
        ([], [], []),
        ([], [], []),
        ([9, 10], [9, 25], [40, 15]),
        ([12], [4], [3]),
    ]
    assert [len(tokens.ids) for tokens, _, _ in results] == [13, 11, 0, 16, 16, 25, 4]
    assert [(list(tokens.numbers), list(tokens.ends), list(tokens.text_bytes)) for _, tokens, _ in results[2:4]] == [
        ([], [], []),
        ([7], [4], [14]),
    ]


def test_a_forced_cut_is_never_in_the_middle_of_a_character(set_sizes: SetSizes) -> None:
    set_sizes(10, 8)
    for text in ("é" * 50, "中" * 50, "🎉" * 50, "a🎉" * 50, "ab中🎉é" * 30):
        utf8 = text.encode()
        stops = [stop for stop, _ in cut(utf8)]
        assert "".join(utf8[start:stop].decode() for start, stop in pairwise([0, *stops])) == text
        assert len(stops) > 4
        assert all(18 - 3 <= stop - start <= 18 for start, stop in pairwise([0, *stops[:-1]]))


def test_batches_are_closed_as_soon_as_they_are_full(set_sizes: SetSizes) -> None:
    set_sizes(100)
    texts = [text for text in random_documents(3, 300) if text]
    batches = list(gather_batches(numbered(texts), SEED, VAL_FRACTION))
    assert len(batches) > 20
    for batch in batches:
        pieces = sorted([*batch.train, *batch.val])
        assert batch.text_bytes == sum(len(piece.text) for piece in pieces)
    assert all(batch.text_bytes >= 100 for batch in batches[:-1])
    sizes = [[len(piece.text) for piece in sorted([*batch.train, *batch.val])] for batch in batches]
    assert all(sum(of_batch[:-1]) < 100 for of_batch in sizes)
    assert all(is_val(piece.number, SEED, VAL_FRACTION) for batch in batches for piece in batch.val)
    assert not any(is_val(piece.number, SEED, VAL_FRACTION) for batch in batches for piece in batch.train)


def test_a_large_vocabulary_takes_four_bytes() -> None:
    """65,536 ids are 0 to 65,535, the end-of-text token the last."""
    for count, dtype in ((65_535, "<u2"), (65_536, "<u4")):
        ranks = {bytes([byte]): byte for byte in range(256)} | {b"%07d" % n: 256 + n for n in range(count - 256)}
        tokens = encode_pieces(make_tokenizer(ranks), [Piece(0, b"ab", 2)])
        assert tokens.ids.dtype == np.dtype(dtype)
        assert tokens.ids.tolist() == [97, 98, count]
        empty = encode_pieces(make_tokenizer(ranks), [])
        assert (empty.ids.dtype, len(empty.ids), len(empty.ends)) == (np.dtype(dtype), 0, 0)


def test_the_first_documents_of_some() -> None:
    """The last three ids belong to a document that goes on."""
    some = Tokens(np.arange(12), np.array([2, 5, 9]), np.array([10, 20, 30]), np.array([4, 6, 7]))
    for count in range(4):
        few = some.first(count)
        assert few.ids.tolist() == list(range([0, 2, 5, 9][count]))
        assert few.ends.tolist() == [2, 5, 9][:count]
        assert few.text_bytes.tolist() == [10, 20, 30][:count]
        assert few.numbers.tolist() == [4, 6, 7][:count]


def test_a_vocabulary_is_learned_from_training_documents_until_they_suffice(set_sizes: SetSizes) -> None:
    set_sizes(30, 12)
    texts = random_documents(4, 200)
    sizes = [0 if is_val(number, SEED, VAL_FRACTION) else len(text.encode()) for number, text in enumerate(texts)]
    for most_bytes in (1, 500, sum(sizes[:50]), sum(sizes[:50]) + 1, 10**9):
        expected, total_bytes = [], 0
        for number, text in enumerate(texts):
            if total_bytes < most_bytes and not is_val(number, SEED, VAL_FRACTION):
                utf8 = text.encode()
                stops = [stop for stop, _ in plain_cut(text, 30, 12)]
                expected += [utf8[start:stop].decode() for start, stop in pairwise([0, *stops])]
                total_bytes += len(utf8)
        assert list(learning_texts(numbered(texts), SEED, VAL_FRACTION, most_bytes)) == expected


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order_and_a_few_ahead_of_the_reader(
    set_sizes: SetSizes, learned: dict[bytes, int], workers: int
) -> None:
    """A corpus need not fit in memory: batches are asked for as results are taken, four ahead for each worker."""
    set_sizes(10)
    asked = []

    def watched() -> Iterator[Batch]:
        for number in range(100):
            asked.append(number)
            yield Batch([Piece(number, b"ten bytes.", 10)], [], [], 10)

    results = encode_all(watched(), learned, workers)
    for number in range(30):
        assert next(results).train.numbers.tolist() == [number]
        assert len(asked) == number + 4 * workers + 1
    results.close()
    assert len(asked) == 30 + 4 * workers
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encode")]
    assert [int(result.train.numbers[0]) for result in encode_all(watched(), learned, workers)] == list(range(100))


def test_each_thread_has_a_tokenizer_of_its_own(monkeypatch: pytest.MonkeyPatch, learned: dict[bytes, int]) -> None:
    """Three threads in step, each with two lists of pieces for each of its sixteen batches."""
    everyone, users = threading.Barrier(3), set()

    def encode_in_step(tokenizer: tiktoken.Encoding, pieces: list[Piece]) -> Tokens:
        everyone.wait(timeout=30)
        users.add((threading.get_ident(), tokenizer))
        return encode_pieces(tokenizer, pieces)

    monkeypatch.setattr(encode, "encode_pieces", encode_in_step)
    batches = [Batch([Piece(number, b"some text", 9)], [], [], 9) for number in range(48)]
    assert len(list(encode_all(batches, learned, 3))) == 48
    threads, tokenizers = ({user[place] for user in users} for place in (0, 1))
    assert len(users) == len(threads) == len(tokenizers) == 3
    assert threading.get_ident() not in threads


def test_what_fails_in_a_thread_fails_here_and_ends_the_others(learned: dict[bytes, int]) -> None:
    batches = [Batch([Piece(0, b"fine", 4)]), Batch([Piece(1, b"\xff", 1)]), Batch([Piece(2, b"fine", 4)])]
    results = encode_all(batches, learned, 2)
    assert next(results).train.numbers.tolist() == [0]
    with pytest.raises(UnicodeDecodeError):
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encode")]


def test_workers_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= count_workers() <= (os.cpu_count() or 1)
    monkeypatch.setenv("ENCORE_WORKERS", "3")
    assert count_workers() == 3
    for wrong in ("0", "-1", "two", "", "1.5"):
        monkeypatch.setenv("ENCORE_WORKERS", wrong)
        with pytest.raises(EncoreError) as error:
            count_workers()
        assert str(error.value) == f"ENCORE_WORKERS is {wrong!r}; give a whole number from 1 on, or unset it"
