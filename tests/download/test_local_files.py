"""files:GLOB: what arrives is compared with the text that went in, and the hash with sha256sum's."""

import glob
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from encore.download import raw_folder, readers
from encore.download.local_files import list_files
from encore.download.readers import read_documents
from encore.download.sources import current_revision, fetch
from encore.errors import EncoreError
from tests.conftest import ROOT
from tests.text_sources import check_listed, fetch_all, parquet_bytes, sha256, texts_of, want


def test_files_of_every_kind_in_order(fetch_folder: Path) -> None:
    corpus = Path("corpus/deep")
    corpus.mkdir(parents=True)
    rows = [json.dumps({"id": number, "text": f"row {number}\nü"}) for number in range(5)]
    (corpus / "a.txt").write_bytes("a\r\ndocument é\n".encode())
    (corpus / "b.jsonl").write_text("\n".join(rows[:2]) + "\n\n  \n" + rows[2], encoding="utf-8")
    (corpus / "c.parquet").write_bytes(parquet_bytes(["p0", "p1"]))
    (corpus / "d.jsonl.gz").write_bytes(gzip.compress(rows[3].encode()) + gzip.compress(b"\n" + rows[4].encode()))
    (corpus / "e.txt.zst").write_bytes(zstandard.compress(b"zstd, ") + zstandard.compress(b"two frames"))
    (corpus / "f.txt.gz").write_bytes(gzip.compress(b"gz"))
    (corpus / "g.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "last \\ud83d\\ude00"}\n'))
    files = fetch_all("files:corpus/**/*.*", fetch_folder)
    assert [file.name for file in files] == ["00000-a.parquet", "00001-c.parquet", "00002-d.parquet"]
    assert texts_of(fetch_folder, files) == [
        "a\r\ndocument é\n",
        *("row 0\nü", "row 1\nü", "row 2\nü"),
        *("p0", "p1"),
        *("row 3\nü", "row 4\nü"),
        *("zstd, two frames", "gz", "last 😀"),
    ]
    check_listed(fetch_folder, files)


def test_pieces_and_lines_meet_anywhere(fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [f"{number} " + "é\t" * (number % 7) for number in range(40)]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in expected).encode()
    Path("a.jsonl").write_bytes(lines)
    Path("b.jsonl.gz").write_bytes(gzip.compress(lines))
    Path("c.jsonl.zst").write_bytes(b"".join(zstandard.compress(line) for line in lines.splitlines(keepends=True)))
    for read_bytes in (1, 2, 7, 4096):
        monkeypatch.setattr(readers, "READ_BYTES", read_bytes)
        for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
            assert [document.text.decode() for document in read_documents(Path(name), name, "text", name)] == expected


def test_zstd_with_a_long_window(fetch_folder: Path) -> None:
    """As `zstd --long=28` writes it; the library refuses windows above 128 MiB unless told."""
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    Path("long.txt.zst").write_bytes(compressor.compress(b"far") + compressor.flush())
    assert texts_of(fetch_folder, fetch_all("files:long.txt.zst", fetch_folder)) == ["far"]


def test_users_parquet_is_copied_and_not_linked(fetch_folder: Path) -> None:
    source = Path("mine.parquet")
    source.write_bytes(parquet_bytes(["a"]))
    files = fetch_all("files:mine.parquet", fetch_folder)
    assert (fetch_folder / files[0].name).read_bytes() == source.read_bytes()
    assert source.stat().st_nlink == 1


def test_files_hash_is_sha256sum_of_sha256sum(fetch_folder: Path, tmp_path: Path) -> None:
    for base in (Path("one"), tmp_path / "two"):
        for name, content in {"b.txt": b"b", "sub/a.txt": b"a", "sub/.hidden.txt": b"h"}.items():
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            (base / name).write_bytes(content)
    lines = f"{sha256(b'b')}  b.txt\n{sha256(b'a')}  sub/a.txt\n"
    assert current_revision("files:one/**/*.txt") == sha256(lines.encode())
    assert current_revision(f"files:{tmp_path}/two/**/*.txt") == sha256(lines.encode())
    assert current_revision("files:./one/b.txt") == sha256(f"{sha256(b'b')}  b.txt\n".encode())
    Path("one/b.txt").rename("one/c.txt")
    renamed = current_revision("files:one/**/*.txt")
    assert renamed != sha256(lines.encode())
    with pytest.raises(EncoreError, match=f"is not what was pinned.*set dataset_revision to {renamed}"):
        fetch("files:one/**/*.txt", sha256(lines.encode()), want(), fetch_folder, Path("scratch"))
    assert list(fetch_folder.iterdir()) == []


def test_half_a_surrogate_pair_is_replaced_and_counted(fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tiktoken does; a whole pair, however it is written, is a character."""
    monkeypatch.setattr(raw_folder, "ROW_GROUP_BYTES", 20)
    half = [r"a\ud800", r"\udc00", r"\ud83d\ud83d\ude00b", r"\ude00\ud83d", r"\ud800\n"]
    whole = [r"\ud83d\ude00", "😀", r"\ufffd", r"\\ud800"]
    Path("a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in half + whole))
    raw = fetch("files:a.jsonl", current_revision("files:a.jsonl"), want(), fetch_folder, Path("scratch"))
    expected = ["a\ufffd", "\ufffd", "\ufffd😀b", "\ufffd\ufffd", "\ufffd\n", "😀", "😀", "\ufffd", "\\ud800"]
    assert texts_of(fetch_folder, raw.files) == expected
    assert raw.repaired_documents == len(half)


def test_links_bring_no_file_twice(fetch_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever leads to it: two links upward would give 2 to the power of 40 names."""
    Path("texts/deep").mkdir(parents=True)
    Path("texts/a.txt").write_bytes(b"a")
    Path("texts/deep/b.txt").write_bytes(b"b")
    pattern = "files:texts/**/*.txt"
    revision = current_revision(pattern)
    assert capsys.readouterr().err == ""
    Path("texts/0.txt").symlink_to("a.txt")
    Path("texts/all").symlink_to(".")
    Path("texts/deep/up").symlink_to("..")
    Path("texts/again").symlink_to("deep")
    assert current_revision(pattern) == revision
    assert capsys.readouterr().err == (
        f"encore: note: {pattern}: 4 links lead to what is found already and is taken once, as texts/0.txt\n"
    )
    assert texts_of(fetch_folder, fetch_all(pattern, fetch_folder)) == ["a", "b"]
    assert list(list_files("texts/**/up/*.txt")) == ["deep/up/0.txt"]


def test_links_to_other_places_are_followed(fetch_folder: Path) -> None:
    """By the name of the link, the first of them where there are two; in folders of which none is the real one too."""
    Path("store/.kept").mkdir(parents=True)
    Path("store/.kept/a.txt").write_bytes(b"a")
    Path("store/b.txt").write_bytes(b"b")
    Path("texts").mkdir()
    Path("texts/one").symlink_to("../store/.kept")
    Path("texts/two").symlink_to("../store/.kept")
    Path("texts/b.txt").symlink_to("../store/b.txt")
    Path("linked").symlink_to("texts")
    for base in ("texts", "linked"):
        assert list(list_files(f"{base}/**/*.txt")) == ["b.txt", "one/a.txt"]
        assert list(list_files(f"{base}/**")) == ["b.txt", "one/a.txt"]


@pytest.mark.parametrize(
    "pattern", ["t/*.txt", "t/**/*.txt", "t/**/s*/*", "t/**", "**/*.txt", "t/?/[!x].txt", "t/../t/*.txt", "{}/**/*.txt"]
)
def test_patterns_without_links_are_those_of_glob(fetch_folder: Path, tmp_path: Path, pattern: str) -> None:
    for name in ("t/a.txt", "t/s/b.txt", "t/s/s2/c.txt", "t/.h/d.txt", "t/.e.txt", "t/s/x.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    pattern = pattern.format(Path.cwd())
    expected = {Path(path) for path in glob.glob(pattern, recursive=True) if Path(path).is_file()}
    assert set(list_files(pattern).values()) == expected


MARK = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_dropped_and_counted(fetch_folder: Path) -> None:
    """Before a text, and before any line, since files may have been joined; within a text it is a sign like others."""
    Path("texts").mkdir()
    Path("texts/a.txt").write_bytes(MARK + b"a \xef\xbb\xbf b")
    Path("texts/b.txt.gz").write_bytes(gzip.compress(MARK + MARK + b"b"))
    Path("texts/c.txt").write_bytes(b"c")
    Path("texts/d.jsonl").write_bytes(MARK + b'{"text": "d"}\n' + MARK + b"\n" + b'{"text": "e"}\n')
    Path("texts/e.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "f"}\n' + MARK + b'{"text": "\\ud800"}\n'))
    raw = fetch("files:texts/*", current_revision("files:texts/*"), want(), fetch_folder, Path("scratch"))
    assert texts_of(fetch_folder, raw.files) == ["a \ufeff b", "b", "c", "d", "e", "f", "\ufffd"]
    assert raw.repaired_documents == 4


LONG_LINE = """
import json
from pathlib import Path
from encore.download import readers
readers.READ_BYTES = 64
text = "x" * 16_000_000
Path("a.jsonl").write_text('{"text": "first"}\\n' + json.dumps({"text": text}))
documents = readers.read_documents(Path("a.jsonl"), "a.jsonl", "text", "a.jsonl")
assert [document.text.decode() for document in documents] == ["first", text]
"""


def test_a_long_line_is_not_copied_for_each_piece(fetch_folder: Path) -> None:
    """250,000 pieces: to copy what there is of the line for each would take an hour."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", LONG_LINE], env=environment, check=True, timeout=120)


def test_memory_of_compressed_text_is_bounded(fetch_folder: Path) -> None:
    """200 MB out of some kilobytes come in pieces all the same."""
    text = bytes(200_000_000)
    Path("a.txt.zst").write_bytes(zstandard.compress(text))
    Path("a.txt.gz").write_bytes(gzip.compress(text, 1))
    for name in ("a.txt.zst", "a.txt.gz"):
        sizes = [len(piece) for piece in readers._read_pieces(Path(name), name)]
        assert sum(sizes) == len(text)
        assert max(sizes) <= 2**26


def test_too_long_a_document_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "DOCUMENT_BYTES", 10)
    read: list[bytes] = []

    def pieces():
        for _ in range(100):
            read.append(b"abcd")
            yield read[-1]

    with pytest.raises(EncoreError, match="it is longer than a document may be, 10 bytes"):
        readers._join(pieces(), "it")
    with pytest.raises(EncoreError, match="it, line 1 is longer than a document may be"):
        list(readers._split_lines(pieces(), "it"))
    assert len(read) == 3 + 3
    with pytest.raises(EncoreError, match="it, line 3 is longer than a document may be"):
        list(readers._split_lines(iter([b"a\n", b"b\nc", b"defghijklmnop"]), "it"))


ZSTD = zstandard.compress(os.urandom(3_000))
BROKEN = {
    "latin.txt": ("caf\xe9".encode("latin-1"), r"latin\.txt is not UTF-8 \(byte 3\)"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"latin\.jsonl, line 2 is not UTF-8 \(byte 10\)"),
    "utf16.jsonl": ('{"text": "a"}'.encode("utf-16"), r"utf16\.jsonl, line 1 is not UTF-8 \(byte 0\)"),
    "no.jsonl": (b'{"text": "a"}\n\n{"text": \n', r"no\.jsonl, line 3 is not JSON \(Expecting value\)"),
    "deep.jsonl": (b"[" * 100_000, r"deep\.jsonl, line 1 is not JSON \(maximum recursion"),
    "key.jsonl": (b'{"body": "a", "id": 1}\n', r"line 1 has no key 'text'; set text_column to one of body, id"),
    "list.jsonl": (b"[1]\n", r"list\.jsonl, line 1 has no key 'text'; mend the line"),
    "number.jsonl": (b'{"text": 1}\n', r"number\.jsonl, line 1: 'text' is 1 and not text"),
    "empty.jsonl": (b"\n\n", r"files:empty\.jsonl at \w{64} holds no documents"),
    "junk.txt.gz": (b"not gzip", r"junk\.txt\.gz is damaged \(Not a gzipped file"),
    "cut.txt.gz": (gzip.compress(os.urandom(3_000))[:-9], r"cut\.txt\.gz is damaged \(Compressed file ended"),
    "bits.txt.gz": (gzip.compress(b"a" * 9)[:-9] + bytes(9), r"bits\.txt\.gz is damaged \("),
    "junk.jsonl.zst": (b"not zstd", r"junk\.jsonl\.zst is damaged \("),
    "cut.txt.zst": (ZSTD[:-1], r"cut\.txt\.zst is damaged \(the last zstd frame is cut off\)"),
    "cut2.txt.zst": (ZSTD + ZSTD[:9], r"cut2\.txt\.zst is damaged \(the last zstd frame is cut off\)"),
    "junk.parquet": (b"PAR1 not parquet", r"junk\.parquet is not a readable parquet file \("),
    "cut.parquet": (parquet_bytes(["a"])[:-3], r"cut\.parquet is not a readable parquet file \("),
    "column.parquet": (
        parquet_bytes(["a"], "body"),
        r"no column of strings named 'text'; set text_column to one of body$",
    ),
    "a.xml": (b"<a>", r"files:a\.xml finds a\.xml, which is none of \.txt, \.jsonl, .* and \.parquet; narrow"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name: str, fetch_folder: Path) -> None:
    content, sentence = BROKEN[name]
    Path(name).write_bytes(content)
    with pytest.raises(EncoreError, match=sentence) as error:
        fetch_all(f"files:{name}", fetch_folder)
    assert "\n" not in str(error.value)


def test_files_that_are_none(fetch_folder: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(EncoreError, match=r"files:empty/\*\.txt finds no files in empty; correct the pattern"):
        current_revision("files:empty/*.txt")
    Path("empty/link.txt").symlink_to("nowhere")
    with pytest.raises(EncoreError, match=r"finds empty/link\.txt, which is a link to nothing"):
        current_revision("files:empty/*.txt")


def test_a_bracket_in_a_name_is_told_of(fetch_folder: Path) -> None:
    Path("a[1].txt").write_text("text")
    with pytest.raises(EncoreError, match=r"files:a\[1\]\.txt is there, .*; write files:a\[\[\]1\]\.txt$"):
        current_revision("files:a[1].txt")
    current_revision("files:a[[]1].txt")
    with pytest.raises(EncoreError, match=r"finds no files in .*; for a \[ in a name write \[\[\]$"):
        current_revision("files:b[1].txt")


def test_too_long_a_document(fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "DOCUMENT_BYTES", 10)
    Path("a.txt").write_bytes(b"0123456789")
    Path("b.txt").write_bytes(b"0123456789\n")
    assert fetch_all("files:a.txt", fetch_folder)[0].documents == 1
    with pytest.raises(EncoreError, match=r"b\.txt is longer than a document may be, 10 bytes"):
        fetch_all("files:b.txt", fetch_folder)
    Path("c.jsonl").write_bytes(b"\n[0123456789]\n")
    with pytest.raises(EncoreError, match=r"c\.jsonl, line 2 is longer than a document may be, 10 bytes"):
        fetch_all("files:c.jsonl", fetch_folder)
