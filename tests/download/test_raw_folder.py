"""data/raw while it is filled: the sizes and names of its files, and the footers of those it takes."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from encore.download import raw_folder
from encore.download.raw_folder import BrokenParquet, Document, gather_row_groups, read_footer
from encore.download.sources import current_revision, fetch
from encore.errors import EncoreError
from tests.text_sources import fetch_all, parquet_bytes, texts_of, want


def test_gathered_files_and_row_groups_have_bounded_bytes(fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_folder, "ROW_GROUP_BYTES", 1_000)
    monkeypatch.setattr(raw_folder, "FILE_BYTES", 5_000)
    expected = [f"{number:096d}" for number in range(175)]  # 100 bytes each with its length
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in expected))
    files = fetch_all("files:*.jsonl", fetch_folder)
    assert texts_of(fetch_folder, files) == expected
    assert [file.documents for file in files] == [60, 60, 55]  # 960 bytes of text a group: 6 groups pass 5,000
    assert [file.name for file in files] == ["00000-a.parquet", "00001-a.parquet", "00002-a.parquet"]
    first = pq.read_metadata(fetch_folder / files[0].name)
    assert [first.row_group(i).num_rows for i in range(first.num_row_groups)] == [10] * 6
    # Documents without text take room as well.
    assert [len(group) for group in gather_row_groups(iter([Document(b"", "a")] * 600))] == [250, 250, 100]


def test_no_more_files_than_wanted(fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_folder, "ROW_GROUP_BYTES", 1_040)
    rows = "".join(json.dumps({"text": "x" * 100}) + "\n" for _ in range(100))
    Path("a.jsonl").write_text(rows)
    for name in ("b", "c"):
        Path(f"{name}.parquet").write_bytes(parquet_bytes(["y" * 1_000] * 2))
    Path("d.jsonl").write_text("broken, and not needed\n")
    revision = current_revision("files:*.*")

    def documents(wanted_text_bytes: int) -> list[int]:
        for path in fetch_folder.iterdir():
            path.unlink()
        raw = fetch("files:*.*", revision, want(wanted_text_bytes), fetch_folder, Path("s"))
        return [file.documents for file in raw.files]

    assert documents(1) == [10]
    assert documents(1_000) == [10]
    assert documents(1_001) == [20]
    assert documents(10_000) == [100]
    assert documents(10_001) == [100, 2]
    assert documents(12_500) == [100, 2, 2]
    with pytest.raises(EncoreError, match=r"d\.jsonl, line 1"):
        documents(20_000)


def test_names_stay_in_the_folder_and_apart(fetch_folder: Path) -> None:
    names = ["x/same.parquet", "y/same.parquet", "y/..parquet", "y/a b;é\n.parquet", f"z/{'ü' * 120}.parquet"]
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(parquet_bytes([name]))
    files = fetch_all("files:*/*.parquet", fetch_folder)
    fetched = texts_of(fetch_folder, files) + texts_of(fetch_folder, fetch_all("files:y/..parquet", fetch_folder))
    assert sorted({*fetched}) == sorted(names)
    assert {path.parent for path in fetch_folder.rglob("*")} == {fetch_folder}
    assert all(file.name.isascii() and len(file.name) <= 120 for file in files)


def test_column_must_hold_strings(fetch_folder: Path) -> None:
    pq.write_table(pa.table({"text": [[1], [2]], "n": [1, 2]}), "lists.parquet")
    with pytest.raises(
        EncoreError, match=r"lists\.parquet has no column of strings named .* it has none, so no text; leave it out$"
    ):
        fetch_all("files:lists.parquet", fetch_folder)


def test_strings_within_other_columns_are_never_proposed(fetch_folder: Path) -> None:
    nested = {"meta": [{"text": "a"}], "text": [["a", "b"]], "a.b": ["top"]}
    pq.write_table(pa.table({**nested}), "some.parquet")
    for name in ("text", "meta.text", "text.list.element"):
        with pytest.raises(EncoreError, match=r"; set text_column to one of a\.b$"):
            read_footer(Path("some.parquet"), "it", name)
    assert read_footer(Path("some.parquet"), "it", "a.b").documents == 1
    pq.write_table(pa.table({key: nested[key] for key in ("meta", "text")}), "none.parquet")
    told = (
        "its strings lie within other columns (meta.text, text.list.element); write the file anew with them as columns"
    )
    with pytest.raises(EncoreError) as error:
        read_footer(Path("none.parquet"), "it", "text")
    assert str(error.value) == f"it has no column of strings named 'text'; {told}"


def test_footer_counts_rows_and_text(tmp_path: Path) -> None:
    texts = [f"{number:01000d}" for number in range(500)]
    path = tmp_path / "a.parquet"
    for kind in (pa.string(), pa.large_string()):
        table = pa.table({"n": range(500), "text": pa.array(texts, kind)})
        pq.write_table(table, path, row_group_size=64, use_dictionary=False)
        footer = read_footer(path, "it", "text")
        assert footer.documents == 500
        assert 500_000 <= footer.text_bytes < 520_000  # pages repeat their smallest and largest text


def test_footer_needs_no_more_than_the_last_bytes(tmp_path: Path) -> None:
    content = parquet_bytes([f"{number:01000d}" for number in range(100)])
    footer_bytes = int.from_bytes(content[-8:-4], "little") + 8
    footer = read_footer(pa.BufferReader(content[-footer_bytes:]), "it", "text")
    assert footer.documents == 100
    assert 100_400 <= footer.text_bytes < 100_500  # four bytes of length before each, and the page's header
    (tmp_path / "a.parquet").write_bytes(content)
    assert footer == read_footer(tmp_path / "a.parquet", "it", "text")
    with pytest.raises(BrokenParquet, match=r"it is not a readable parquet file \("):
        read_footer(pa.BufferReader(content[-footer_bytes + 1 :]), "it", "text")
