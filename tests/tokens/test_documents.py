"""encore/tokens/documents.py: every document once, with its number, whatever the files look like inside."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from encore.errors import EncoreError
from encore.tokens import documents
from encore.tokens.documents import RowGroup, check_raw, is_val, list_row_groups, read_documents
from tests.raw_text import write_parquet, write_raw
from tests.sealed import with_seal

SEED = 2357
ODD_TEXTS = [None, "", "ünïcödé 中文 👩‍👩‍👧", "\x00\x01"]
TEXTS = [ODD_TEXTS[number % 7] if number % 7 < 4 else f"text {number}" for number in range(200)]
UTF8 = [(number, text.encode()) for number, text in enumerate(TEXTS) if text]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """200 documents in two files, in row groups of 13."""
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    write_parquet(paths[0], TEXTS[:90], 13)
    write_parquet(paths[1], TEXTS[90:], 13)
    return paths


def as_strings(texts: list[bytes]) -> pa.Array:
    """A column of strings that nobody has looked at, as another program may have written it."""
    as_bytes = pa.array(texts, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(texts), as_bytes.buffers())


def test_the_share_of_val_is_the_fraction() -> None:
    """Of n draws, n p on average with a deviation of sqrt(n p (1 - p)); four of them are allowed."""
    n = 100_000
    for fraction in (0.5, 0.02, 0.0005):
        held_out = sum(is_val(number, SEED, fraction) for number in range(n))
        assert abs(held_out - n * fraction) < 4 * (n * fraction * (1 - fraction)) ** 0.5


def test_the_draw_depends_on_the_seed_and_a_larger_fraction_only_adds() -> None:
    n = 20_000
    one, other = ([is_val(number, seed, 0.5) for number in range(n)] for seed in (1, 2))
    agreeing = sum(a == b for a, b in zip(one, other, strict=True))
    neighbours = sum(a == b for a, b in itertools.pairwise(one))
    assert abs(agreeing - n / 2) < 4 * (n / 4) ** 0.5, "two seeds are independent"
    assert abs(neighbours - n / 2) < 4 * (n / 4) ** 0.5, "neighbours are independent"
    assert all(is_val(number, 1, 0.6) for number in range(n) if one[number])


def test_the_draw_never_changes() -> None:
    """Pinned: with another hash, what was training text would become val text of the same experiment."""
    assert [number for number in range(60) if is_val(number, 2357, 0.2)] == [7, 8, 11, 16, 23, 36, 39, 44, 56]


def test_row_groups_carry_the_numbers_of_their_documents(files: list[Path]) -> None:
    groups = list_row_groups(files, "text")
    assert [(group.path, group.index, group.first_row, group.first_document, group.documents) for group in groups] == [
        *((files[0], index, 13 * index, 13 * index, min(13, 90 - 13 * index)) for index in range(7)),
        *((files[1], index, 13 * index, 90 + 13 * index, min(13, 110 - 13 * index)) for index in range(9)),
    ]


def test_the_size_of_a_row_group_is_that_of_its_text(tmp_path: Path) -> None:
    """Parquet puts four bytes before each string and a header before each page."""
    texts = [chr(97 + number % 26) * (1000 + number) for number in range(60)]
    table = pa.table({"other": ["x" * 10_000] * 60, "text": texts})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=20, use_dictionary=False, write_statistics=False)
    groups = list_row_groups([tmp_path / "a.parquet"], "text")
    assert len(groups) == 3
    for start, group in zip((0, 20, 40), groups, strict=True):
        assert 0 <= group.text_bytes - sum(len(text) + 4 for text in texts[start : start + 20]) < 200


@pytest.mark.parametrize(("batch_bytes", "rows"), [(10**6, {12, 13, 6}), (0, {1})])
def test_all_documents_are_read_in_order_by_row_group_or_by_row(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, batch_bytes: int, rows: set[int]
) -> None:
    read: list[int] = []
    texts_of = documents._texts_of

    def watched(column: pa.Array, *where: object) -> Iterator[tuple[int, bytes]]:
        read.append(len(column))
        return texts_of(column, *where)

    monkeypatch.setattr(documents, "_texts_of", watched)
    monkeypatch.setattr(documents, "BATCH_BYTES", batch_bytes)
    groups = list_row_groups(files, "text")
    assert list(read_documents(groups)) == UTF8
    assert set(read) == rows
    for first, stop in ((3, 5), (6, 9), (10, 16), (15, 16)):
        start, end = groups[first].first_document, groups[stop - 1].first_document + groups[stop - 1].documents
        assert list(read_documents(groups[first:stop])) == [each for each in UTF8 if start <= each[0] < end]


def test_rows_are_decoded_together_up_to_a_size_by_the_average_of_their_group(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (group,) = list_row_groups(files, "text")[:1]
    read: list[int] = []
    monkeypatch.setattr(documents, "_texts_of", lambda column, *_: read.append(len(column)) or iter(()))
    for limit, expected in (
        (group.text_bytes, [13]),
        (group.text_bytes - 1, [12, 1]),
        (group.text_bytes // 2, [6, 6, 1]),
    ):
        monkeypatch.setattr(documents, "BATCH_BYTES", limit)
        list(read_documents([group]))
        assert read == expected
        read.clear()


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    "as_column",
    [
        lambda texts: pa.array(texts, pa.large_string()),
        lambda texts: pa.array(texts, pa.string()).dictionary_encode(),
        lambda texts: pa.array(texts, pa.large_string()).dictionary_encode(),
        lambda texts: pa.array(texts, pa.string_view()),
    ],
    ids=["large_string", "dictionary", "large dictionary", "string_view"],
)
def test_any_kind_of_string_column_gives_the_same_documents(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    as_column: Callable[[list[str | None]], pa.Array],
    by_row: bool,
) -> None:
    if by_row:
        monkeypatch.setattr(documents, "BATCH_BYTES", 0)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": as_column(TEXTS)}), path, row_group_size=60)
    assert list(read_documents(list_row_groups([path], "text"))) == UTF8


def test_a_file_without_rows_is_no_obstacle(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.parquet" for name in "abc"]
    for path, texts in zip(paths, (["one"], [], ["two", "three"]), strict=True):
        write_parquet(path, texts, 10)
    assert list(read_documents(list_row_groups(paths, "text"))) == [(0, b"one"), (1, b"two"), (2, b"three")]


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    "as_column",
    [
        as_strings,
        lambda texts: as_strings(texts).cast("large_string"),
        lambda texts: as_strings(texts).dictionary_encode(),
    ],
    ids=["string", "large_string", "dictionary"],
)
@pytest.mark.parametrize(
    ("wrong", "byte"), [(b"\xff", 0), ("ä".encode()[:1], 0), (b"abc \xed\xa0\x80", 4), (b"ok\xc0\xaf", 2)]
)
def test_text_that_is_not_utf8_is_named_by_file_and_row(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    as_column: Callable[[list[bytes]], pa.Array],
    wrong: bytes,
    byte: int,
    by_row: bool,
) -> None:
    if by_row:
        monkeypatch.setattr(documents, "BATCH_BYTES", 0)
    texts = [(text or "").encode() for text in TEXTS[:50]]
    texts[37] = texts[41] = wrong
    good, bad = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write_parquet(good, TEXTS[:30], 10)
    pq.write_table(pa.table({"text": as_column(texts)}), bad, row_group_size=10)
    read = read_documents(list_row_groups([good, bad], "text"))
    with pytest.raises(EncoreError) as error:
        list(read)
    assert str(error.value) == f"{bad}, row 37 is not UTF-8 (byte {byte}); mend the file where it comes from"


def test_a_file_without_the_column_or_no_parquet_at_all_is_named(files: list[Path]) -> None:
    with pytest.raises(EncoreError) as error:
        list_row_groups(files, "txt")
    assert str(error.value) == f"{files[0]} has no column 'txt'; set text_column to one of id, text"
    for damaged in (b"", b"PAR1 and no more", files[1].read_bytes()[:-20]):
        files[1].write_bytes(damaged)
        with pytest.raises(EncoreError) as error:
            list_row_groups(files, "text")
        assert str(error.value).startswith(f"{files[1]} is not a readable parquet file (")
        assert str(error.value).endswith("); `dvc repro -f download`")
    files[1].unlink()
    with pytest.raises(EncoreError, match=r"b\.parquet is not a readable parquet file"):
        list_row_groups(files, "text")


def test_a_nested_column_is_none_to_choose(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["flat"], "text": [["in", "a list"]], "deep": [{"text": "in a struct"}]}), path)
    for column in ("text", "deep", "deep.text", "text.list.element"):
        with pytest.raises(EncoreError) as error:
            list_row_groups([path], column)
        assert str(error.value) == f"{path} has no column {column!r}; set text_column to one of body"
    assert list(read_documents(list_row_groups([path], "body"))) == [(0, b"flat")]


@pytest.mark.parametrize("workers", [1, 3])
def test_raw_text_is_compared_with_its_manifest_and_every_bad_file_is_named(tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "raw"
    manifest = write_raw(folder, [f"document {number}" for number in range(50)], file_size=10)
    assert check_raw(folder, workers) == manifest == json.loads((folder / "manifest.json").read_text())
    paths = [folder / file["name"] for file in manifest["sources"][0]["files"]]
    paths[1].unlink()
    flipped = bytearray(paths[2].read_bytes())
    flipped[40] ^= 1
    paths[2].write_bytes(flipped)
    paths[4].write_bytes(paths[4].read_bytes()[:-1])
    with pytest.raises(EncoreError) as error:
        check_raw(folder, workers)
    assert str(error.value) == (
        f"{paths[1]} is missing; {paths[2]} has other bytes than {folder}/manifest.json says; "
        f"{paths[4]} has other bytes than {folder}/manifest.json says; "
        "`dvc repro -s -f download` makes data/raw anew, and `encore verify` tells whether "
        "`dvc checkout --force data/raw` is enough"
    )


def test_a_published_tokenizer_with_other_bytes_is_refused(tmp_path: Path) -> None:
    manifest = write_raw(tmp_path / "raw", ["a document"])
    manifest["tokenizer"] = {"name": "ranks.tiktoken", "sha256": sha256(b"as published").hexdigest()}
    manifest = with_seal(manifest)
    (tmp_path / "raw/manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "raw/ranks.tiktoken").write_bytes(b"as published")
    assert check_raw(tmp_path / "raw", 1) == manifest
    (tmp_path / "raw/ranks.tiktoken").write_bytes(b"As published")
    with pytest.raises(EncoreError, match=r"raw/ranks\.tiktoken has other bytes"):
        check_raw(tmp_path / "raw", 1)


def test_texts_that_stand_in_many_rows_are_in_memory_once(tmp_path: Path) -> None:
    """A few hundred bytes of a file can mean gigabytes."""
    path = tmp_path / "a.parquet"
    text = "x" * 1_000_000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array([text]))
    pq.write_table(pa.table({"text": column}), path)
    assert path.stat().st_size < 60_000
    before = pa.total_allocated_bytes()
    largest = 0
    for number, (row, read) in enumerate(read_documents(list_row_groups([path], "text"))):
        assert row == number
        assert len(read) == 1_000_000
        largest = max(largest, pa.total_allocated_bytes() - before)
    assert number == 2999
    assert largest < 20_000_000


@pytest.mark.parametrize("text", [None, ""])
def test_rows_without_text_cost_next_to_nothing(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "a.parquet"
    nothing = pa.array([text], pa.string()).take(pa.array(np.zeros(5_000_000, np.int32)))
    table = pa.table({"text": pa.chunked_array([nothing, pa.array(["end"])])})
    pq.write_table(table, path, row_group_size=5_000_001, use_dictionary=False)  # 20 MB, of lengths alone
    before = pa.total_allocated_bytes()
    documents = read_documents(list_row_groups([path], "text"))
    assert next(documents) == (5_000_000, b"end")
    assert pa.total_allocated_bytes() - before < 20_000_000
    assert list(documents) == []


@pytest.mark.parametrize("encoding", ["DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"])
@pytest.mark.parametrize("by_row", [False, True])
def test_other_encodings_give_the_same_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, by_row: bool
) -> None:
    if by_row:
        monkeypatch.setattr(documents, "BATCH_BYTES", 0)
    path = tmp_path / "a.parquet"
    table = pa.table({"text": TEXTS})
    pq.write_table(table, path, row_group_size=60, use_dictionary=False, column_encoding={"text": encoding})
    assert list(read_documents(list_row_groups([path], "text"))) == UTF8


def test_a_dictionary_that_gives_way_to_differences_is_read_without_one() -> None:
    """As other writers of parquet do it; pyarrow's do not."""
    group = RowGroup(Path("a.parquet"), "text", 0, 0, 0, 10, 1000, ("PLAIN_DICTIONARY", "RLE", "DELTA_BYTE_ARRAY"))
    assert (group.has_dictionary, group.rows_at_once) == (False, 64)
    plain = replace(group, encodings=("PLAIN", "RLE", "RLE_DICTIONARY"))
    assert (plain.has_dictionary, plain.rows_at_once) == (True, 4096)
    assert replace(plain, documents=1000, text_bytes=160_000_000).rows_at_once == 100
    assert replace(plain, documents=1, text_bytes=2**31).rows_at_once == 1


def test_differences_of_long_texts_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    """Each of these is the one before it and a letter."""
    path = tmp_path / "a.parquet"
    texts = ["x" * (100_000 + number) for number in range(1200)]
    table = pa.table({"text": texts})
    pq.write_table(table, path, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})
    assert path.stat().st_size < 200_000
    before, largest = pa.total_allocated_bytes(), 0
    for number, read in read_documents(list_row_groups([path], "text")):
        assert len(read) == 100_000 + number
        largest = max(largest, pa.total_allocated_bytes() - before)
    assert number == 1199
    assert largest < 40_000_000


def test_a_file_is_opened_once_however_many_row_groups_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each opening reads the whole footer, which grows with the row groups."""
    path = tmp_path / "a.parquet"
    write_parquet(path, TEXTS, 2)
    groups = list_row_groups([path], "text")
    assert len(groups) == 100
    opened, open_parquet = [], pq.ParquetFile
    monkeypatch.setattr(
        pq, "ParquetFile", lambda *args, **options: opened.append(args) or open_parquet(*args, **options)
    )
    assert list(read_documents(groups)) == UTF8
    assert len(opened) == 1


def test_a_row_group_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {number}" for number in range(1000)]}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[60:200] = bytes(140)
    path.write_bytes(data)
    with pytest.raises(EncoreError, match=rf"^{path}: row group 0 cannot be read \(.*\); mend the file where it comes"):
        list(read_documents(list_row_groups([path], "text")))
