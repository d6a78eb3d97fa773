"""The documents of data/raw, streamed: memory holds a page of a parquet file at a time, however large its row groups.

Every document has a running number, its row in the text of its source. By that number and `split_seed` alone it
belongs to train or val, so neither a pass over the data nor the number of workers has a say, nor other sources.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from encore.errors import EncoreError, bring_back
from encore.files import sha256_of
from encore.json_files import read_sealed
from encore.schemas import RanksEntry, RawFileEntry, RawManifest

RAW_MANIFEST = "manifest.json"
WAY_OUT = bring_back("data/raw", "download")
READ_BYTES = 2**20
# Rows are decoded together that hold so much text by the average of their row group, and never more than BATCH_ROWS.
BATCH_BYTES = 16_000_000
BATCH_ROWS = 4096
DIFFERENCES_ROWS = 64  # where each text can be a few bytes of the file and a copy of the one before


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file. first_row: in its file. first_document: the number of that row in its source.
    text_bytes: of its text column before compression, by the file's footer. encodings: parquet's, of that column."""

    path: Path
    text_column: str
    index: int
    first_row: int
    first_document: int
    documents: int
    text_bytes: int
    encodings: tuple[str, ...]

    @property
    def has_dictionary(self) -> bool:
        """Whether some texts stand in the file by their places in a list, and none as the difference from the one
        before, of which pyarrow can make no dictionary."""
        kinds = " ".join(self.encodings)
        return "DICTIONARY" in kinds and "DELTA" not in kinds

    @property
    def rows_at_once(self) -> int:
        """How many rows are decoded together."""
        rows = BATCH_BYTES * self.documents // max(1, self.text_bytes)
        most = DIFFERENCES_ROWS if "DELTA_BYTE_ARRAY" in self.encodings else BATCH_ROWS
        return max(1, min(rows, most))


def read_raw_manifest(folder: Path) -> RawManifest:
    """The manifest of the raw text. Raises EncoreError where it is missing or damaged."""
    return read_sealed(folder / RAW_MANIFEST, RawManifest, WAY_OUT)


def check_raw(folder: Path, workers: int) -> RawManifest:
    """The manifest of the raw text. Raises EncoreError naming each file that is not the one that it describes."""
    manifest = read_raw_manifest(folder)
    check_files(folder, list_files(manifest), workers)
    return manifest


def list_files(manifest: RawManifest) -> list[RawFileEntry | RanksEntry]:
    """Everything that the manifest describes: the text of all sources, and the tokenizer if it is a published one."""
    texts = [file for source in manifest["sources"] for file in source["files"]]
    return [*texts, *([manifest["tokenizer"]] if manifest["tokenizer"] else [])]


def check_files(folder: Path, files: Sequence[RawFileEntry | RanksEntry], workers: int) -> None:
    """Reads these of the manifest's files. Raises EncoreError naming each that is not the one that is described."""

    def find_problem(file: RawFileEntry | RanksEntry) -> str | None:
        path = folder / file["name"]
        if not path.exists():
            return f"{path} is missing"
        if sha256_of(path) != file["sha256"]:
            return f"{path} has other bytes than {folder / RAW_MANIFEST} says"
        return None

    with ThreadPoolExecutor(workers) as pool:
        problems = list(filter(None, pool.map(find_problem, files)))
    if problems:
        raise EncoreError(f"{'; '.join(problems)}; {WAY_OUT}")


def list_row_groups(files: list[Path], text_column: str) -> list[RowGroup]:
    """All row groups of a source's files in order. Raises EncoreError for a file without the column, or no parquet."""
    groups: list[RowGroup] = []
    documents = 0
    for path in files:
        try:
            with pq.ParquetFile(path) as parquet:
                columns = [column.path for column in parquet.schema]
                names = [name for name in parquet.schema_arrow.names if name in columns]  # a nested one has other paths
                metadata = parquet.metadata
        except (OSError, ValueError) as error:
            raise EncoreError(f"{path} is not a readable parquet file ({error}); `dvc repro -f download`") from None
        if text_column not in names:
            raise EncoreError(f"{path} has no column {text_column!r}; set text_column to one of {', '.join(names)}")
        column = columns.index(text_column)
        first_row = 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            chunk = group.column(column)
            where = (path, text_column, index, first_row, documents + first_row, group.num_rows)
            groups.append(RowGroup(*where, chunk.total_uncompressed_size, tuple(chunk.encodings)))
            first_row += group.num_rows
        documents += first_row
    return groups


def read_documents(groups: list[RowGroup]) -> Iterator[tuple[int, bytes]]:
    """Yields the number and UTF-8 text of each document that has text.

    Memory: about BATCH_BYTES, or a page, which holds at least one document. A text that stands in many rows is in
    memory once, however few bytes of the file say so. Raises EncoreError where a row group cannot be read.
    """
    for (path, has_dictionary), of_file in groupby(groups, key=lambda group: (group.path, group.has_dictionary)):
        in_file = list(of_file)
        dictionaries = [in_file[0].text_column] if has_dictionary else []
        with pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False, read_dictionary=dictionaries) as parquet:
            for group in in_file:
                first = group.first_document
                for column in _read_columns(parquet, group):
                    for row, text in _texts_of(column, path, group.first_row + first - group.first_document):
                        yield first + row, text
                    first += len(column)


def _read_columns(parquet: pq.ParquetFile, group: RowGroup) -> Iterator[pa.Array]:
    """The text column of a row group, some rows at a time. Raises EncoreError where it cannot be read."""
    try:
        for batch in parquet.iter_batches(group.rows_at_once, [group.index], [group.text_column], use_threads=False):
            yield batch.column(0)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise EncoreError(
            f"{group.path}: row group {group.index} cannot be read ({reason}); mend the file where it comes from"
        ) from None


def _texts_of(column: pa.Array, path: Path, first_row: int) -> Iterator[tuple[int, bytes]]:
    """The rows of a column that have text, each with its index. Raises EncoreError naming the first row that is not
    UTF-8. first_row: the number of the column's first row in the file."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    indices = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    used, places = np.unique(indices, return_inverse=True)
    texts: list[bytes] = []
    if used.size and used[-1] >= 0:
        wanted = used[used >= 0]
        values = column.dictionary
        if len(wanted) < len(values):
            values = values.take(pa.array(wanted))
        texts = values.cast(pa.large_binary()).to_pylist()
        try:
            values.validate(full=True)
        except pa.ArrowInvalid:
            _refuse_other_bytes(texts, places - (len(used) - len(texts)), path, first_row)
            raise
    if used.size and used[0] < 0:
        texts.insert(0, b"")
    has_text = np.array([bool(text) for text in texts], bool)
    for row in np.flatnonzero(has_text[places]).tolist() if texts else []:
        yield row, texts[places[row]]


def _refuse_other_bytes(texts: list[bytes], places: np.ndarray, path: Path, first_row: int) -> None:
    """Raises EncoreError for the first row whose text is not UTF-8. places: of each row's text, below 0 for a null."""
    for row, place in enumerate(places.tolist(), first_row):
        try:
            if place >= 0:
                texts[place].decode()
        except UnicodeDecodeError as error:
            raise EncoreError(
                f"{path}, row {row} is not UTF-8 (byte {error.start:,}); mend the file where it comes from"
            ) from None


def is_val(number: int, split_seed: int, val_fraction: float) -> bool:
    """Whether the document with this running number is held out: a uniform hash of (seed, number) decides."""
    digest = hashlib.blake2b(f"{split_seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2.0**64
