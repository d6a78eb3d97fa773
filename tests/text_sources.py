"""What the tests of text sources share: fetching, reading what arrived, and the text files that go in."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from encore.download.raw_folder import RawFile
from encore.download.sources import Wanted, current_revision, fetch

PLENTY = 10**12


def want(text_bytes: int = PLENTY, column: str = "text", shard_order: str = "by_name", split_seed: int = 1) -> Wanted:
    return Wanted(column, text_bytes, shard_order, split_seed)


def fetch_all(dataset: str, folder: Path, wanted_text_bytes: int = PLENTY, column: str = "text") -> list[RawFile]:
    return fetch(dataset, current_revision(dataset), want(wanted_text_bytes, column), folder, Path("scratch")).files


def texts_of(folder: Path, files: list[RawFile], column: str = "text") -> list[str]:
    return [text for file in files for text in pq.read_table(folder / file.name)[column].to_pylist()]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def parquet_bytes(texts: list[str], column: str = "text") -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"id": range(len(texts)), column: texts})
    pq.write_table(table, sink, use_dictionary=False, write_statistics=False)
    return sink.getvalue().to_pybytes()


def check_listed(folder: Path, files: list[RawFile]) -> None:
    """The list says what is in the folder, all of it, in the order of the names."""
    assert [file.name for file in files] == sorted(path.name for path in folder.iterdir())
    for file in files:
        content = (folder / file.name).read_bytes()
        assert (file.bytes, file.sha256) == (len(content), sha256(content))
        assert file.documents == pq.read_metadata(folder / file.name).num_rows
