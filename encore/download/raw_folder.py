"""data/raw while it is filled: parquet files of text, numbered in the order of their documents."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from encore.errors import EncoreError
from encore.files import sha256_of

# Text is written in row groups, the unit that the tokenize stage shares out among its workers.
ROW_GROUP_BYTES = 4_000_000
FILE_BYTES = 256_000_000
FOOTER_BYTES = 2**24  # pyarrow takes some ten times as much memory to read one
Item = TypeVar("Item")


class Document(NamedTuple):
    """A document of a source that is not parquet. text: UTF-8. source: the name of its file in the source. repaired:
    whether something in it that is no text was replaced."""

    text: bytes
    source: str
    repaired: bool = False


@dataclass(frozen=True)
class RawFile:
    """A parquet file of text in data/raw. bytes: its size on the disk. documents: its rows. source: the file of the
    source that it is, or in which its first document lies."""

    name: str
    source: str
    bytes: int
    sha256: str
    documents: int


@dataclass(frozen=True)
class Footer:
    """What a parquet file says of itself: its rows, and the bytes of its text column before compression."""

    documents: int
    text_bytes: int


class BrokenParquet(EncoreError):
    """A file that is no parquet, or no longer, or whose footer is beyond all measure."""


class RawFolder:
    """The folder while a source fills it. files: what is of that source, the first of which has the number
    `first_number`. text_bytes: how much UTF-8 text that is.

    source_files: how many files of text the source has. whole_source: whether all of their text is here.
    licence: of the text, as the source names it.
    """

    def __init__(self, folder: Path, text_column: str, wanted_text_bytes: int, first_number: int = 0) -> None:
        self.folder, self.text_column, self.wanted_text_bytes = folder, text_column, wanted_text_bytes
        self.first_number = first_number
        self.files: list[RawFile] = []
        self.text_bytes = 0
        self.repaired_documents = 0
        self.source_files = 1
        self.whole_source = True
        self.licence: str | None = None

    @property
    def is_full(self) -> bool:
        """Whether there is as much text as is wanted."""
        return self.text_bytes >= self.wanted_text_bytes

    def until_full(self, items: Iterable[Item]) -> Iterator[Item]:
        """Hands on item after item until the text made of them is as much as is wanted, and asks for none beyond."""
        for item in items:
            yield item
            if self.is_full:
                return

    def write(self, groups: Iterator[list[Document]], stem: str) -> None:
        """Writes lists of documents, each as a row group, into files of FILE_BYTES of text.

        The bytes depend on the text and pyarrow's version alone.
        """
        schema = pa.schema([(self.text_column, pa.string())])
        for first in groups:
            path = self._next_path(stem)
            documents = file_bytes = 0
            with pq.ParquetWriter(
                path, schema, compression="zstd", use_dictionary=False, write_statistics=False, store_schema=False
            ) as writer:
                for group in chain([first], groups):
                    texts = [document.text for document in group]
                    writer.write_table(pa.table([pa.array(texts, pa.string())], schema), row_group_size=len(texts))
                    documents += len(texts)
                    group_bytes = sum(map(len, texts))
                    file_bytes += group_bytes
                    self.text_bytes += group_bytes
                    self.repaired_documents += sum(document.repaired for document in group)
                    if file_bytes >= FILE_BYTES:
                        break
            self._add(path, first[0].source, sha256_of(path), documents)

    def take(self, path: Path, source: str, footer: Footer, sha256: str, place: Callable[[Path, Path], object]) -> None:
        """Lets `place(path, target)` bring a parquet file here, whose footer and sha256 are these."""
        target = self._next_path(Path(source).stem)
        place(path, target)
        self.text_bytes += footer.text_bytes
        self._add(target, source, sha256, footer.documents)

    def _next_path(self, stem: str) -> Path:
        """A number keeps names apart and in order; what is kept of `stem` cannot lead out of the folder."""
        safe = re.sub(r"[^A-Za-z0-9_.-]", "_", stem)[:100]
        return self.folder / f"{self.first_number + len(self.files):05d}-{safe}.parquet"

    def _add(self, path: Path, source: str, sha256: str, documents: int) -> None:
        self.files.append(RawFile(path.name, source, path.stat().st_size, sha256, documents))


def read_footer(file: Path | pa.BufferReader, what: str, text_column: str) -> Footer:
    """The footer of a parquet file, of which its last bytes are enough.

    Raises BrokenParquet where it cannot be read or is larger than FOOTER_BYTES, and EncoreError where there is no such
    column of strings.
    """
    check_footer_size(_last_bytes(file), what)
    try:
        footer = pq.read_metadata(file)
    except (OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise BrokenParquet(
            f"{what} is not a readable parquet file ({reason}); bring it back or leave it out"
        ) from None
    paths = {column.path: column.name for column in footer.schema if column.logical_type.type == "STRING"}
    strings = [path for path, name in paths.items() if path == name]  # those in lists and structs have longer paths
    if text_column not in strings:
        raise EncoreError(f"{what} has no column of strings named {text_column!r}; {way_to_text(strings, [*paths])}")
    index = [column.path for column in footer.schema].index(text_column)
    groups = (footer.row_group(group).column(index) for group in range(footer.num_row_groups))
    return Footer(footer.num_rows, sum(column.total_uncompressed_size for column in groups))


def way_to_text(strings: list[str], nested: list[str]) -> str:
    """What to do where a file has no such column. strings: columns that could serve. nested: those within others."""
    if strings:
        return f"set text_column to one of {', '.join(strings)}"
    if nested:
        return f"its strings lie within other columns ({', '.join(nested)}); write the file anew with them as columns"
    return "it has none, so no text; leave it out"


def check_footer_size(last_bytes: bytes, what: str) -> int:
    """The size of a file's footer, by its last 8 bytes. Raises BrokenParquet where it is over FOOTER_BYTES."""
    footer_bytes = int.from_bytes(last_bytes[:4], "little")
    if last_bytes[4:] == b"PAR1" and footer_bytes > FOOTER_BYTES:
        raise BrokenParquet(
            f"{what} claims a footer of {footer_bytes:,} bytes, and Encore reads up to {FOOTER_BYTES:,}; write the "
            "file anew with larger row groups or fewer columns, or leave it out"
        )
    return footer_bytes


def _last_bytes(file: Path | pa.BufferReader) -> bytes:
    if isinstance(file, pa.BufferReader):
        size_bytes = file.size()
        return file.read_at(min(8, size_bytes), max(0, size_bytes - 8))
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - 8))
        return opened.read()


def gather_row_groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Gathers documents to lists of ROW_GROUP_BYTES, the four bytes that each one's length takes counted."""
    group: list[Document] = []
    group_bytes = 0
    for document in documents:
        group.append(document)
        group_bytes += len(document.text) + 4
        if group_bytes >= ROW_GROUP_BYTES:
            yield group
            group, group_bytes = [], 0
    if group:
        yield group
