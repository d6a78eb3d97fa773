"""Formats of local files: the texts in data/raw are those that Hugging Face `datasets` reads from the same files."""

import csv
import gzip
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import zstandard

from encore.download import readers
from encore.errors import EncoreError
from tests.conftest import ROOT
from tests.text_sources import fetch_all, texts_of

KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
TEXTS = [
    "plain",
    "é ü 😀 \ufeff within",
    'a "quoted" word, and a comma; 5" of it',
    "two\nlines\r\nand\ta tab\r\n",
    " spaces around ",
    "",
    "NA",
    "null",
    "12",
    "x" * 70_000,
    "\x00\x0b\x0c\x1c\x85\u2028 separators of another kind",
    '"',
    "\n",
]


@pytest.fixture
def by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Reads the texts of files with `datasets`. A cell that is empty is a text without a character there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def read(*names: str, column: str = "text", kind: str | None = None, **options: object) -> list[str]:
        ending = next(ending for ending in [*KINDS, ".txt"] if ending in names[0])
        kind = kind or KINDS[ending]
        if kind == "csv":
            options = {"sep": "\t" if ending == ".tsv" else ",", "keep_default_na": False, **options}
        files = [str(Path(name).resolve()) for name in names]
        rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **options)
        return [row[column] or "" for row in rows]

    return read


def json_rows(texts: list[str], **options: object) -> list[str]:
    return [json.dumps({"id": number, "text": text}, **options) for number, text in enumerate(texts)]


def csv_bytes(texts: list[str], separator: str = ",", end: str = "\n", column: str = "text") -> bytes:
    """Every cell of text in quotes, as RFC 4180 has it."""
    cells = ['"' + text.replace('"', '""') + '"' for text in texts]
    lines = [f"id{separator}{column}", *(f"{number}{separator}{cell}" for number, cell in enumerate(cells))]
    return "".join(line + end for line in lines).encode()


def arrow_bytes(columns: dict[str, pa.Array], stream: bool = True, rows: int = 5, **options: object) -> bytes:
    table, sink = pa.table(columns), pa.BufferOutputStream()
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return sink.getvalue().to_pybytes()


CONTENTS = {
    ".jsonl": "\n".join(json_rows(TEXTS)).encode(),
    ".ndjson": "".join(row + "\r\n" for row in json_rows(TEXTS, ensure_ascii=False)).encode(),
    ".json": "".join(row + "\n" for row in json_rows(TEXTS)).encode(),
    ".csv": csv_bytes(TEXTS),
    ".tsv": csv_bytes(TEXTS, "\t", "\r\n"),
}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("ending", CONTENTS)
def test_rows_are_those_of_datasets(
    ending: str, packing: str, fetch_folder: Path, by_datasets: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"a{ending}{packing}"
    Path(name).write_bytes(PACK[packing](CONTENTS[ending]))
    monkeypatch.setattr(readers, "READ_BYTES", 7)
    found = texts_of(fetch_folder, fetch_all(f"files:{name}", fetch_folder))
    assert found == TEXTS
    assert found == by_datasets(name)


def test_a_file_of_text_is_a_document(fetch_folder: Path, by_datasets: Callable) -> None:
    """`datasets` turns the ends of lines into \\n there, and Encore leaves a text as it is."""
    Path("a.txt").write_text("two\nlines é\n")
    Path("b.txt.gz").write_bytes(gzip.compress(b"packed"))
    found = texts_of(fetch_folder, fetch_all("files:*.txt*", fetch_folder))
    assert found == ["two\nlines é\n", "packed"]
    assert found == by_datasets("a.txt", "b.txt.gz", kind="text", sample_by="document")


@pytest.mark.parametrize("start", ["", "\ufeff", " \n\t", "\ufeff\n"])
def test_an_array_of_objects(start: str, fetch_folder: Path, by_datasets: Callable) -> None:
    content = start + json.dumps([json.loads(row) for row in json_rows(TEXTS)], indent=2)
    Path("a.json").write_bytes(content.encode())
    Path("b.json.zst").write_bytes(zstandard.compress(content.encode()))
    found = texts_of(fetch_folder, fetch_all("files:*.json*", fetch_folder))
    assert found == TEXTS * 2
    Path("c.json").write_text(content.lstrip("\ufeff \n\t"))  # pandas, which reads it for `datasets`, needs that
    assert found == by_datasets("c.json") * 2


TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int8(), pa.string()),
    "large dictionary": pa.dictionary(pa.int32(), pa.large_string()),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", TYPES)
def test_arrow_of_each_type(kind: str, stream: bool, fetch_folder: Path, by_datasets: Callable) -> None:
    texts = [*TEXTS, None, "plain"]
    column = pa.array(texts, TYPES[kind]) if "dict" in kind else pa.array(texts, pa.string()).cast(TYPES[kind])
    others = {"s": pa.array([{"a": 1}] * len(texts)), "text": column, "id": pa.array(range(len(texts)))}
    dictionaries = {"emit_dictionary_deltas": True, "unify_dictionaries": not stream} if "dict" in kind else {}
    Path("a.arrow").write_bytes(arrow_bytes(others, stream, **dictionaries))
    Path("b.arrow").write_bytes(arrow_bytes(others, stream, compression="zstd", **dictionaries))
    found = texts_of(fetch_folder, fetch_all("files:*.arrow", fetch_folder))
    assert found == [text or "" for text in texts] * 2
    if kind in ("string", "large_string"):
        assert found == by_datasets("a.arrow", "b.arrow")


def test_what_datasets_has_saved(fetch_folder: Path) -> None:
    saved = datasets.Dataset.from_dict({"id": range(len(TEXTS)), "text": TEXTS})
    saved.save_to_disk("saved", num_shards=3)
    assert len(list(Path("saved").glob("*.arrow"))) == 3
    found = texts_of(fetch_folder, fetch_all("files:saved/*.arrow", fetch_folder))
    assert found == [row["text"] for row in datasets.load_from_disk("saved")]
    assert found == TEXTS


def test_random_csv_is_read_as_datasets_reads_it(fetch_folder: Path, by_datasets: Callable) -> None:
    """Cells with and without quotes, where these may stand without them; blank lines; no end of the last line."""
    chance = random.Random(1)
    for trial in range(6):
        lines, texts = ["\ufeffid,text,more"], []
        for number in range(100):
            text = "".join(chance.choice('ab é,"\n\r') for _ in range(chance.randrange(1, 9)))
            bare = chance.random() < 0.4
            texts.append("z" + text.translate(dict.fromkeys(map(ord, ",\n\r"))) if bare else text)
            cell = texts[-1] if bare else '"' + text.replace('"', '""') + '"'
            lines.append(f"{number},{cell},m" + "\n" * chance.randrange(2))
        Path("a.csv").write_bytes(("\r\n" if trial % 2 else "\n").join(lines).encode())
        found = texts_of(fetch_folder, fetch_all("files:a.csv", fetch_folder))
        assert found == texts == by_datasets("a.csv")
        for path in fetch_folder.iterdir():
            path.unlink()


def test_cells_are_text_whatever_they_look_like(fetch_folder: Path) -> None:
    """`datasets` would make numbers of these."""
    Path("a.csv").write_text("id,text\n1,007\n2,1.50\n3,true\n4,2026-01-01\n")
    assert texts_of(fetch_folder, fetch_all("files:a.csv", fetch_folder)) == ["007", "1.50", "true", "2026-01-01"]


@pytest.mark.parametrize("ending", CONTENTS)
def test_another_column(ending: str, fetch_folder: Path, by_datasets: Callable) -> None:
    name = f"a{ending}"
    Path(name).write_bytes(CONTENTS[ending].replace(b'"text":', b'"body":').replace(b"text\n", b"body\n"))
    Path(name).write_bytes(Path(name).read_bytes().replace(b"text\r\n", b"body\r\n"))
    found = texts_of(fetch_folder, fetch_all(f"files:{name}", fetch_folder, column="body"), "body")
    assert found == by_datasets(name, column="body") == TEXTS


def test_half_a_surrogate_pair_and_null_in_an_array(fetch_folder: Path) -> None:
    Path("a.json").write_text(r'[{"text": "a\ud800"}, {"text": null}, {"text": "\ud83d\ude00"}]')
    assert texts_of(fetch_folder, fetch_all("files:a.json", fetch_folder)) == ["a\ufffd", "", "😀"]


def test_null_is_a_document_without_text(fetch_folder: Path, by_datasets: Callable) -> None:
    Path("a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    found = texts_of(fetch_folder, fetch_all("files:a.jsonl", fetch_folder))
    assert found == by_datasets("a.jsonl") == ["a", "", "b"]


# By the words of docs/own-text.md: a file, the texts that Encore finds or its message, and those of `datasets`, if any.
DIFFERENCES = {
    "a .txt": (".txt", b"two\r\nlines", ["two\r\nlines"], ["two", "lines"]),
    "a column of numbers such as `007` in a .csv": (".csv", b"id,text\n1,007\n2,1.50\n", ["007", "1.50"], [7, 1.5]),
    "a cell `NA` or `null` of a .csv": (
        ".csv",
        b"id,text\n1,a\n2,NA\n3,null\n",
        ["a", "NA", "null"],
        ["a", None, None],
    ),
    "a row of a .csv with too few cells": (".csv", b"id,text\n1,a\n2\n", "line 3 ends a row of 1 cells", ["a", None]),
    "a line of a .jsonl without the key": (
        ".jsonl",
        b'{"text": "a", "id": 1}\n{"id": 2}\n',
        "line 2 has no key 'text'",
        ["a", None],
    ),
    "half a surrogate pair in JSON": (".jsonl", b'{"text": "\\ud800"}\n', ["\ufffd"], None),
    "a byte-order mark before a later line of a .jsonl": (
        ".jsonl",
        b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n',
        ["a", "b"],
        None,
    ),
}


@pytest.mark.parametrize("file", DIFFERENCES)
@pytest.mark.usefixtures("by_datasets")
def test_where_datasets_reads_something_else(file: str, fetch_folder: Path) -> None:
    ending, content, ours, theirs = DIFFERENCES[file]
    name = f"a{ending}"
    Path(name).write_bytes(content)
    kind = KINDS.get(ending, "text")
    if isinstance(ours, str):
        with pytest.raises(EncoreError, match=ours):
            fetch_all(f"files:{name}", fetch_folder)
    else:
        assert texts_of(fetch_folder, fetch_all(f"files:{name}", fetch_folder)) == ours

    def read() -> list:
        rows = datasets.load_dataset(kind, data_files=[name], split="train", streaming=True)
        return [row["text"] for row in rows]

    if theirs is None:
        with pytest.raises(pa.ArrowInvalid):
            read()
    else:
        assert read() == theirs


def test_the_table_of_differences_is_the_one_tested() -> None:
    page = (ROOT / "docs/own-text.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.split("\n") if line.count(" | ") == 2]
    first = rows.index("file")
    assert rows[first + 1 : first + 1 + len(DIFFERENCES)] == list(DIFFERENCES)


ARROW = arrow_bytes({"text": pa.array(["a text", "and another"] * 50)}, rows=10)
ARROW_FILE = arrow_bytes({"text": pa.array(["a text", "and another"] * 50)}, stream=False)
COMPRESSED = gzip.compress(csv_bytes([os.urandom(9).hex() for _ in range(2_000)]))
BROKEN = {
    "column.csv": (b"id,body\n1,a\n", r"column\.csv has no column 'text'; set text_column to one of id, body$"),
    "nameless.csv": (b'1,"a text\nof ' + b"many words " * 99 + b'"\n', r"set text_column to one of 1, a text of many"),
    "short.csv": (b"id,text\n1,a\n2\n", r"short\.csv, line 3 ends a row of 1 cells, and the first line names 2; mend"),
    "long.csv": (b'id,text\n1,"a\n"\n2,b,c\n', r"long\.csv, line 4 ends a row of 3 cells, and the first line names 2"),
    "quote.csv": (b'id,text\n1,"a\n2,b\n3,c\n', r"quote\.csv, line \d ends within a quote; mend the file"),
    "quote.tsv": (b'id\ttext\n1\t"a', r"quote\.tsv, line 2 ends within a quote; mend the file"),
    "mac.csv": (b"id,text\r1,a\r", r"mac\.csv, line \d is not CSV \(new-line character seen in unquoted field\); mend"),
    "latin.csv": (b"id,text\n1,a\n2,\xe9\n", r"latin\.csv, line 3 is not UTF-8 \(byte 2\)"),
    "utf16.csv": ("id,text\n1,a".encode("utf-16"), r"utf16\.csv, line 1 is not UTF-8 \(byte 0\)"),
    "empty.csv": (b"", r"files:empty\.csv at \w{64} holds no documents"),
    "names.tsv": (b"id\ttext\n", r"files:names\.tsv at \w{64} holds no documents"),
    "cut.csv.gz": (COMPRESSED[:-9], r"cut\.csv\.gz is damaged \(Compressed file ended"),
    "cut.csv.zst": (zstandard.compress(CONTENTS[".csv"])[:-1], r"cut\.csv\.zst is damaged \(the last zstd frame"),
    "cut.json": (b'[{"text": "a"},\n', r"cut\.json is not JSON \(Expecting value\); mend it, or write a \.jsonl"),
    "key.json": (
        b'[{"text": "a"}, {"body": "b"}]',
        r"key\.json, row 2 has no key 'text'; set .* to one of body",
    ),
    "plain.json": (b'["a"]', r"plain\.json, row 1 has no key 'text'; mend the row"),
    "number.json": (b'[{"text": 7}]', r"number\.json, row 1: 'text' is 7 and not text; mend the row or text_column"),
    "object.json": (b'{\n  "text": "a"\n}\n', r"object\.json, line 1 is not JSON \(Expecting property name"),
    "latin.json": (b'[{"text": "\xe9"}]', r"latin\.json is not UTF-8 \(byte 11\)"),
    "blank.json": (b" \n", r"files:blank\.json at \w{64} holds no documents"),
    "empty.arrow": (b"", r"empty\.arrow is not a readable Arrow file \("),
    "junk.arrow": (b"not Arrow at all", r"junk\.arrow is not a readable Arrow file \("),
    "cut.arrow": (ARROW[:-100], r"cut\.arrow is not a readable Arrow file \(.*\); bring it back or leave it out"),
    "cut2.arrow": (ARROW_FILE[:-100], r"cut2\.arrow is not a readable Arrow file \("),
    "utf8.arrow": (
        ARROW.replace(b"another", b"\xffnother"),
        r"utf8\.arrow is not a readable Arrow file \(Invalid",
    ),
    "column.arrow": (
        arrow_bytes({"body": pa.array(["a"]), "text": pa.array([1])}),
        r"column\.arrow has no column of strings named 'text'; set text_column to one of body",
    ),
    "none.arrow": (arrow_bytes({"text": pa.array([1])}), r"it has none, so no text; leave it out"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name: str, fetch_folder: Path) -> None:
    content, sentence = BROKEN[name]
    Path(name).write_bytes(content)
    with pytest.raises(EncoreError, match=sentence) as error:
        fetch_all(f"files:{name}", fetch_folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("content", [ARROW, ARROW_FILE])
def test_arrow_with_any_byte_wrong_gives_text_or_a_sentence(content: bytes, fetch_folder: Path) -> None:
    """Offsets that lead out of the file would be followed there: no crash, and no other exception."""
    sentences: list[str] = []
    for place in range(0, len(content), 3):
        Path("a.arrow").write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            list(readers.read_documents(Path("a.arrow"), "a.arrow", "text", "a.arrow"))
        except EncoreError as error:
            sentences.append(str(error))
    assert len(sentences) > 100
    assert not any("\n" in sentence for sentence in sentences)


@pytest.fixture
def _cells_unbounded() -> Iterator[None]:
    """Afterwards, for the tests that follow: the bound is the process's."""
    limit_bytes = readers.DOCUMENT_BYTES
    yield
    csv.field_size_limit(limit_bytes)


@pytest.mark.usefixtures("_cells_unbounded")
def test_what_is_read_as_a_whole_is_bounded(fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "DOCUMENT_BYTES", 40)
    monkeypatch.setattr(readers, "READ_BYTES", 8)
    row = b'{"text": "0123456789"}'
    for name, content, sentence in (
        ("a.json", b"[" + row + b"," + row + b"]", "is longer than a JSON array may be, 40 bytes; split it"),
        ("b.json", b" " * 41 + b"[]", "is longer than a document may be, 40 bytes"),
        ("c.csv", b"text\n" + b"x" * 41, "line 2 is longer than a document may be, 40 bytes"),
        ("d.csv", b'text\n"' + b"x\n" * 30, r"line \d+ is not CSV \(field larger than field limit \(40\)\)"),
        ("e.arrow", arrow_bytes({"text": pa.array(["x" * 41])}), "is longer than a document may be, 40 bytes"),
    ):
        Path(name).write_bytes(content)
        with pytest.raises(EncoreError, match=rf"{name}\S* {sentence}"):
            fetch_all(f"files:{name}", fetch_folder)
    Path("a.json").write_bytes(row + b"\n" + row + b"\n")  # lines are held one by one
    assert len(texts_of(fetch_folder, fetch_all("files:a.json", fetch_folder))) == 2


def test_a_text_in_many_rows_is_in_memory_once(fetch_folder: Path) -> None:
    """2 GB by a dictionary, in a file of 1 MB: each is made only when it is asked for."""
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000, pa.int16()), pa.array(["x" * 1_000_000]))
    Path("a.arrow").write_bytes(arrow_bytes({"text": long}, rows=2_000))
    before = pa.total_allocated_bytes()
    documents = readers.read_documents(Path("a.arrow"), "a.arrow", "text", "a.arrow")
    assert sum(len(document.text) for document in documents if pa.total_allocated_bytes() - before < 2e7) == 2e9
