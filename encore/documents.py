"""The documents of data/raw, streamed: memory holds a page of a parquet file at a time, however large its row groups.

Every document has a running number, its row in the corpus. By that number and `split_seed` alone it belongs to train
or val, so neither a pass over the data nor the number of workers has a say.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from encore.errors import EncoreError, bring_back
from encore.files import sha256_of
from encore.json_files import read_sealed
from encore.schemas import RanksEntry, RawFileEntry, RawManifest

RAW_MANIFEST = "manifest.json"
WAY_OUT = bring_back("data/raw", "download")
READ_BYTES = 2**20
# A row group is decoded as a whole up to this size, and one row at a time above it.
WHOLE_GROUP_BYTES = 16_000_000


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file. first_row: in its file. first_document: the number of that row in the corpus.
    text_bytes: of its text column before compression, by the file's footer."""

    path: Path
    index: int
    first_row: int
    first_document: int
    documents: int
    text_bytes: int


def read_raw_manifest(folder: Path) -> RawManifest:
    """The manifest of the raw text. Raises EncoreError where it is missing or damaged."""
    return read_sealed(folder / RAW_MANIFEST, RawManifest, WAY_OUT)


def check_raw(folder: Path, workers: int) -> RawManifest:
    """The manifest of the raw text. Raises EncoreError naming each file that is not the one that it describes."""
    manifest = read_raw_manifest(folder)
    tokenizer = [manifest["tokenizer"]] if manifest["tokenizer"] else []
    check_files(folder, [*manifest["files"], *tokenizer], workers)
    return manifest


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
    """All row groups in order. Raises EncoreError for a file that is no parquet or lacks the column."""
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
            text_bytes = group.column(column).total_uncompressed_size
            groups.append(RowGroup(path, index, first_row, documents + first_row, group.num_rows, text_bytes))
            first_row += group.num_rows
        documents += first_row
    return groups


def read_documents(groups: list[RowGroup], text_column: str) -> Iterator[tuple[int, bytes]]:
    """Yields each document's number and UTF-8 text; a null is an empty document.

    Memory: a row group of WHOLE_GROUP_BYTES, or of a larger one a page, which holds at least one document.
    """
    for path, of_file in groupby(groups, key=lambda group: group.path):
        with pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as parquet:
            for group in of_file:
                batch_rows = max(1, group.documents) if group.text_bytes <= WHOLE_GROUP_BYTES else 1
                batches = parquet.iter_batches(batch_rows, [group.index], [text_column], use_threads=False)
                number = group.first_document
                for batch in batches:
                    for text in _as_utf8(
                        batch.column(0), path, group.first_row + number - group.first_document
                    ).to_pylist():
                        yield number, text or b""
                        number += 1


def is_val(number: int, split_seed: int, val_fraction: float) -> bool:
    """Whether the document with this running number is held out: a uniform hash of (seed, number) decides."""
    digest = hashlib.blake2b(f"{split_seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2.0**64


def _as_utf8(column: pa.Array, path: Path, first_row: int) -> pa.Array:
    """The column as bytes, which are UTF-8. Raises EncoreError naming the first row that is not."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    texts = column.cast(pa.large_binary())
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        for row, text in enumerate(texts.to_pylist(), first_row):
            try:
                (text or b"").decode()
            except UnicodeDecodeError as error:
                raise EncoreError(
                    f"{path}, row {row} is not UTF-8 (byte {error.start:,}); mend the file where it comes from"
                ) from None
        raise
    return texts
