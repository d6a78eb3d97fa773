"""The text of local files, `files:GLOB`: .txt (a file is a document), .jsonl (a line is one), .gz and .zst of both.

Parquet files, which a pattern may find as well, are listed and hashed here, and read by pyarrow.
"""

import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

from encore.download.patterns import find, fixed_folder
from encore.download.raw_folder import Document
from encore.errors import EncoreError
from encore.files import sha256_of
from encore.progress import note
from encore.threads import Threads

# A parquet page, which a document must fit into, holds less than 2 GiB.
DOCUMENT_BYTES = 2**30
READ_BYTES = 2**20
ZSTD_READ_BYTES = 2**11  # a few bytes of zstd can stand for 128 KiB each, and all that a piece holds comes at once
HASHES_AT_ONCE = 8
TXT = (".txt", ".txt.gz", ".txt.zst")
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = ".parquet"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # in UTF-8, where editors of Windows write it before a text


def list_files(pattern: str) -> dict[str, Path]:
    """The files that a pattern means, in the order of their names: their paths from its first wildcard's folder on.

    So that names, order and hash are the same wherever the folder lies. A file to which links lead is there once, with
    a note. Raises EncoreError where there are none, and for one that holds no text that we know to read.
    """
    base = fixed_folder(pattern)
    found, skipped = find(pattern)
    if "[" in pattern and os.path.exists(pattern) and Path(pattern) not in found:
        raise EncoreError(
            f"dataset: files:{pattern} is there, and as a pattern means other names, since [ begins a choice of signs; "
            f"write files:{glob.escape(pattern)}"
        )
    if not found:
        brackets = "; for a [ in a name write [[]" if "[" in pattern else ""
        raise EncoreError(
            f"dataset: files:{pattern} finds no files in {base}; correct the pattern (** goes into folders){brackets}"
        )
    if skipped:
        links = "1 link leads" if len(skipped) == 1 else f"{len(skipped)} links lead"
        note(f"files:{pattern}: {links} to what is found already and is taken once, as {skipped[0]}")
    paths = dict(sorted((path.relative_to(base).as_posix(), path) for path in found))
    for path in paths.values():
        if not path.name.endswith((*TXT, *JSONL, PARQUET)):
            raise EncoreError(
                f"dataset: files:{pattern} finds {path}, which is none of .txt, .jsonl (or .gz, .zst of them) and "
                ".parquet; narrow the pattern"
            )
        if not path.is_file():
            raise EncoreError(f"dataset: files:{pattern} finds {path}, which is a link to nothing; mend or remove it")
    return paths


def hash_files(paths: dict[str, Path]) -> dict[str, str]:
    """The sha256 of each file, by its name."""
    with Threads(HASHES_AT_ONCE) as threads:
        return dict(zip(paths, threads.map(sha256_of, paths.values()), strict=True))


def hash_names_and_contents(hashes: dict[str, str]) -> str:
    """sha256 over the lines of `sha256sum NAME...` run in the pattern's folder: names and contents, in order."""
    digest = hashlib.sha256()
    for name, sha256 in hashes.items():
        digest.update(sha256.encode() + b"  " + os.fsencode(name) + b"\n")
    return digest.hexdigest()


def read_documents(path: Path, name: str, key: str) -> Iterator[Document]:
    """The documents of a text file: all of a .txt, the `key` of each line of a .jsonl that is not blank.

    A byte-order mark before a text, or before a line, as where files were joined, is dropped: a repair. name: the
    file's name in the source. Memory: a few times the largest document.
    """
    if path.name.endswith(TXT):
        yield read_text(_join(_read_pieces(path), str(path)), name, str(path))
        return
    for number, marked in enumerate(_split_lines(_read_pieces(path), path), start=1):
        line = _drop_marks(marked)
        if line.strip():
            text, repaired = _read_row(line, f"{path}, line {number}", key)
            yield Document(text, name, repaired or line != marked)


def read_text(content: bytes, name: str, where: str) -> Document:
    """A file of text as a document, without the byte-order mark before it."""
    text = _drop_marks(check_text(content, where))
    return Document(text, name, text != content)


def _drop_marks(text: bytes) -> bytes:
    while text.startswith(BYTE_ORDER_MARK):
        text = text.removeprefix(BYTE_ORDER_MARK)
    return text


def _read_row(line: bytes, where: str, key: str) -> tuple[bytes, bool]:
    """The text under `key` of a line of JSON, and whether it was repaired: half a surrogate pair, which JSON can
    write and UTF-8 cannot, becomes U+FFFD, as in tiktoken."""
    check_text(line, where)
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        reason = str(error).split(": line ")[0]
        raise EncoreError(f"{where} is not JSON ({reason}); mend or remove the line") from None
    if not isinstance(row, dict) or key not in row:
        keys = f"set text_column to one of {', '.join(row)}" if isinstance(row, dict) and row else "mend the line"
        raise EncoreError(f"{where} has no key {key!r}; {keys}")
    if not isinstance(row[key], str):
        raise EncoreError(f"{where}: {key!r} is {json.dumps(row[key])[:40]} and not text; mend the line or text_column")
    try:
        return row[key].encode(), False
    except UnicodeEncodeError:
        return row[key].encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode(), True


def check_text(text: bytes, where: str) -> bytes:
    """The text itself, where it is UTF-8 and not too long."""
    _check_length(len(text), where)
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise EncoreError(f"{where} is not UTF-8 (byte {error.start:,}); convert it to UTF-8 or leave it out") from None
    return text


def _check_length(document_bytes: int, where: str) -> None:
    if document_bytes > DOCUMENT_BYTES:
        raise EncoreError(f"{where} is longer than a document may be, {DOCUMENT_BYTES:,} bytes; split it into several")


def _join(pieces: Iterator[bytes], where: str) -> bytes:
    text = bytearray()
    for piece in pieces:
        text += piece
        _check_length(len(text), where)
    return bytes(text)


def _split_lines(pieces: Iterator[bytes], path: Path) -> Iterator[bytes]:
    number = 1
    line = bytearray()  # grows in place: to copy it for each piece would take the square of a long line's length
    for piece in pieces:
        first, *others = piece.split(b"\n")
        line += first
        for other in others:
            yield bytes(line)
            number += 1
            line = bytearray(other)
        _check_length(len(line), f"{path}, line {number}")
    yield bytes(line)


def _read_pieces(path: Path) -> Iterator[bytes]:
    """A file's bytes, decompressed, a piece at a time."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if path.suffix == ".zst":
                yield from _decompress_zstd(iter(lambda: file.read(ZSTD_READ_BYTES), b""))
            else:
                yield from iter(lambda: file.read(READ_BYTES), b"")
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise EncoreError(f"{path} is damaged ({error}); bring it back or leave it out") from None


def _decompress_zstd(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Raises EOFError where the last frame is cut off, which zstandard's own readers take for the end."""
    frame = None
    for piece in pieces:
        while piece:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            yield frame.decompress(piece)
            piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("the last zstd frame is cut off")
