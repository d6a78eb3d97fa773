"""The documents of a file of text: .txt (a file is a document), JSON and CSV (a row is one), .gz and .zst of them, and
Arrow (a row is one), as `datasets` saves it.

CSV is read with Python's csv: pyarrow's takes the rest of a file for one text where a quote is never closed, and has no
numbers of lines. Parquet files are read by pyarrow, and not here.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import zstandard

from encore.download.raw_folder import Document, way_to_text
from encore.errors import EncoreError

# A parquet page, which a document must fit into, holds less than 2 GiB.
DOCUMENT_BYTES = 2**30
READ_BYTES = 2**20
ZSTD_READ_BYTES = 2**11  # a few bytes of zstd can stand for 128 KiB each, and all that a piece holds comes at once
JSON_LINES = (".jsonl", ".ndjson")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
COMPRESSIBLE = (".txt", *JSON_LINES, ".json", *SEPARATORS)
COMPRESSIONS = (".gz", ".zst")
ARROW, PARQUET = ".arrow", ".parquet"
ARROW_FILE = b"ARROW1"  # how Arrow's file format begins; its stream format, which `datasets` saves, does not
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # in UTF-8, where editors of Windows write it before a text
NAMES_LENGTH = 200  # of the columns in a message: without a line of names, the first text is taken for them


def ending_of(name: str) -> str | None:
    """The ending that tells the format of a file, without that of its compression; None where it cannot be read."""
    if name.endswith(ARROW):
        return ARROW
    plain = name.removesuffix(".gz") if name.endswith(".gz") else name.removesuffix(".zst")
    return next((ending for ending in COMPRESSIBLE if plain.endswith(ending)), None)


def read_documents(path: Path, name: str, key: str, what: str) -> Iterator[Document]:
    """The documents of a file that `ending_of` knows: all of a .txt, or what a row has under `key`.

    A row without text (null, or an empty cell) is an empty document, as in parquet. Blank lines are skipped. A
    byte-order mark before a text, or before a line, as where files were joined, is dropped: a repair. name: the file's
    name in the source. what: its name in messages. Memory: a few times the largest document, the array that a .json may
    be, or a batch of Arrow's rows. Raises EncoreError where the file is damaged or has no such column.
    """
    ending = ending_of(name)
    pieces = _read_pieces(path, what)
    if ending == ".txt":
        yield read_text(_join(pieces, what), name, what)
    elif ending == ARROW:
        yield from _read_arrow(path, name, key, what)
    elif ending in SEPARATORS:
        yield from _read_csv(pieces, name, key, what, SEPARATORS[ending])
    elif ending == ".json":
        yield from _read_json(pieces, name, key, what)
    else:
        yield from _read_json_lines(pieces, name, key, what)


def read_text(content: bytes, name: str, where: str) -> Document:
    """A file of text as a document, without the byte-order mark before it."""
    text = _drop_marks(check_text(content, where))
    return Document(text, name, text != content)


def _drop_marks(text: bytes) -> bytes:
    while text.startswith(BYTE_ORDER_MARK):
        text = text.removeprefix(BYTE_ORDER_MARK)
    return text


# JSON


def _read_json(pieces: Iterator[bytes], name: str, key: str, what: str) -> Iterator[Document]:
    """A .json is either one array of rows or has a row in each line; its first sign tells."""
    head = bytearray()
    for piece in pieces:
        head += piece
        _check_length(len(head), what)
        if head.strip(BYTE_ORDER_MARK + b" \t\r\n"):
            break
    pieces = chain([bytes(head)], pieces)
    if not head.strip(BYTE_ORDER_MARK + b" \t\r\n").startswith(b"["):
        yield from _read_json_lines(pieces, name, key, what)
        return
    way_out = "mend it, or write a .jsonl, of which each line is a row"
    rows = _parse(_drop_marks(_join(pieces, what, "a JSON array")), what, way_out)
    for number, row in enumerate(rows, start=1):
        text, repaired = _text_of(row, f"{what}, row {number}", key, "row")
        yield Document(text, name, repaired)


def _read_json_lines(pieces: Iterator[bytes], name: str, key: str, what: str) -> Iterator[Document]:
    for number, marked in enumerate(_split_lines(pieces, what), start=1):
        line = _drop_marks(marked)
        if line.strip():
            where = f"{what}, line {number}"
            text, repaired = _text_of(_parse(line, where, "mend or remove the line"), where, key, "line")
            yield Document(text, name, repaired or line != marked)


def _parse(content: bytes, where: str, way_out: str) -> Any:
    check_text(content, where)
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        reason = str(error).split(": line ")[0]
        raise EncoreError(f"{where} is not JSON ({reason}); {way_out}") from None


def _text_of(row: Any, where: str, key: str, unit: str) -> tuple[bytes, bool]:
    """The text under `key` of a row of JSON, and whether it was repaired: half a surrogate pair, which JSON can write
    and UTF-8 cannot, becomes U+FFFD, as in tiktoken. unit: what holds the row."""
    if not isinstance(row, dict) or key not in row:
        keys = f"set text_column to one of {', '.join(row)}" if isinstance(row, dict) and row else f"mend the {unit}"
        raise EncoreError(f"{where} has no key {key!r}; {keys}")
    text = "" if row[key] is None else row[key]
    if not isinstance(text, str):
        raise EncoreError(f"{where}: {key!r} is {json.dumps(text)[:40]} and not text; mend the {unit} or text_column")
    try:
        return text.encode(), False
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode(), True


# CSV


def _read_csv(pieces: Iterator[bytes], name: str, key: str, what: str, separator: str) -> Iterator[Document]:
    """The rows below the line that names the columns. In quotes, a cell may hold separators and ends of lines."""
    csv.field_size_limit(DOCUMENT_BYTES)  # for the whole process; nothing else there has cells of such a length
    lines = _Lines(pieces, what)
    rows = csv.reader(lines, delimiter=separator)
    names: list[str] = []
    try:
        for row in filter(None, rows):  # a blank line is a row without cells
            where = f"{what}, line {rows.line_num}"
            if lines.have_ended:
                raise EncoreError(f"{where} ends within a quote; mend the file, or write a quote in a text as two")
            if not names:
                names, column = row, _find_column(row, key, what)
            elif len(row) != len(names):
                raise EncoreError(
                    f"{where} ends a row of {len(row)} cells, and the first line names {len(names)}; mend the row"
                )
            else:
                yield Document(row[column].encode(), name)
    except csv.Error as error:
        reason = str(error).split(" - ")[0]
        raise EncoreError(f"{what}, line {rows.line_num} is not CSV ({reason}); mend or remove the row") from None


def _find_column(names: list[str], key: str, what: str) -> int:
    if key not in names:
        found = " ".join(", ".join(names).split())[:NAMES_LENGTH]
        raise EncoreError(f"{what} has no column {key!r}; set text_column to one of {found}")
    return names.index(key)


class _Lines:
    """The lines of a file, each with its end. have_ended: whether one was asked for behind the last: a row that came
    only then is cut off."""

    def __init__(self, pieces: Iterable[bytes], what: str) -> None:
        self._lines = enumerate(_split_lines(pieces, what), start=1)
        self._what = what
        self.have_ended = False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        number, line = next(self._lines, (0, b""))
        if not number:
            self.have_ended = True
            raise StopIteration
        text = check_text(line, f"{self._what}, line {number}")
        return (_drop_marks(text) if number == 1 else text).decode() + "\n"


# Arrow


def _read_arrow(path: Path, name: str, key: str, what: str) -> Iterator[Document]:
    """The rows of Arrow's stream format, or of its file format."""
    try:
        with pa.memory_map(str(path)) as source:
            for column in _read_arrow_columns(source, key, what):
                column.validate(full=True)  # offsets that lead elsewhere would be followed
                for value in column:
                    yield Document(_text_of_value(value, what), name)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last of these in the name of a column
        if isinstance(error, OSError) and error.errno:
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise EncoreError(f"{what} is not a readable Arrow file ({reason}); bring it back or leave it out") from None


def _read_arrow_columns(source: pa.NativeFile, key: str, what: str) -> Iterator[pa.Array]:
    """The column of text, a batch of rows at a time; the other columns are not read."""
    is_file = source.read(len(ARROW_FILE)) == ARROW_FILE
    open_arrow = pa.ipc.open_file if is_file else pa.ipc.open_stream
    source.seek(0)
    schema = open_arrow(source).schema
    strings = [field.name for field in schema if _is_text(field.type)]
    if key not in strings:
        raise EncoreError(f"{what} has no column of strings named {key!r}; {way_to_text(strings, [])}")
    source.seek(0)
    options = pa.ipc.IpcReadOptions(included_fields=[schema.names.index(key)])
    reader = open_arrow(source, options=options)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    for batch in batches:
        yield batch.column(0)


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        return _is_text(type_.value_type)
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)


def _text_of_value(value: pa.Scalar, what: str) -> bytes:
    """One by one: a dictionary can name a long text in many rows."""
    if not value.is_valid:
        return b""
    buffer = (value.value if pa.types.is_dictionary(value.type) else value).as_buffer()
    _check_length(buffer.size, what)
    return buffer.to_pybytes()


# bytes and lines


def check_text(text: bytes, where: str) -> bytes:
    """The text itself, where it is UTF-8 and not too long."""
    _check_length(len(text), where)
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise EncoreError(f"{where} is not UTF-8 (byte {error.start:,}); convert it to UTF-8 or leave it out") from None
    return text


def _check_length(read_bytes: int, where: str, kind: str = "a document") -> None:
    """Raises EncoreError where what is held in memory as a whole is too long. kind: what that is."""
    if read_bytes > DOCUMENT_BYTES:
        raise EncoreError(f"{where} is longer than {kind} may be, {DOCUMENT_BYTES:,} bytes; split it into several")


def _join(pieces: Iterable[bytes], where: str, kind: str = "a document") -> bytes:
    text = bytearray()
    for piece in pieces:
        text += piece
        _check_length(len(text), where, kind)
    return bytes(text)


def _split_lines(pieces: Iterable[bytes], what: str) -> Iterator[bytes]:
    number = 1
    line = bytearray()  # grows in place: to copy it for each piece would take the square of a long line's length
    for piece in pieces:
        first, *others = piece.split(b"\n")
        line += first
        for other in others:
            yield bytes(line)
            number += 1
            line = bytearray(other)
        _check_length(len(line), f"{what}, line {number}")
    yield bytes(line)


def _read_pieces(path: Path, what: str) -> Iterator[bytes]:
    """A file's bytes, decompressed, a piece at a time."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if path.suffix == ".zst":
                yield from _decompress_zstd(iter(lambda: file.read(ZSTD_READ_BYTES), b""))
            else:
                yield from iter(lambda: file.read(READ_BYTES), b"")
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise EncoreError(f"{what} is damaged ({error}); bring it back or leave it out") from None


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
