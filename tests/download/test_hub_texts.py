"""hf:OWNER/NAME without parquet: which files are fetched, and that data/raw has the texts that `datasets` reads."""

import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import zstandard

from encore import files
from encore.download import readers, transfer
from encore.download.raw_folder import RawFolder
from encore.download.sources import current_revision, fetch
from encore.errors import EncoreError
from tests.hub import ALWAYS, COMMIT, REPOSITORY, Fault, Hub, connected, serving
from tests.text_sources import PLENTY, check_listed, fetch_all, texts_of, want

CHANCE = random.Random(2)
SHARD_TEXTS = 30
SHARDS = 12
NAMES = [f"en/c4-train.{number:05d}-of-{SHARDS:05d}.json.gz" for number in range(SHARDS)]
TEXTS = {name: [CHANCE.randbytes(CHANCE.randrange(20, 90)).hex() for _ in range(SHARD_TEXTS)] for name in NAMES}
TEXT_BYTES = {name: sum(map(len, texts)) for name, texts in TEXTS.items()}
STORE = Path("scratch/hub/owner--corpus") / COMMIT


def shard(texts: list[str]) -> bytes:
    """As C4 has it: a row in each line, with other keys beside the text."""
    rows = [json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://a.b/"}) for text in texts]
    return gzip.compress("".join(row + "\n" for row in rows).encode())


FILES = {name: shard(texts) for name, texts in TEXTS.items()}
OTHERS = {
    "en/c4-validation.00000-of-00001.json.gz": b"not asked for",
    "README.md": b"# A corpus",
    ".gitattributes": b"",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving({**OTHERS, **FILES}) as server, connected(monkeypatch, server.url, "hf_SeCrEt"):
        yield server


def fetch_raw(folder: Path, text_bytes: int = PLENTY, place: str = REPOSITORY, **order: object) -> RawFolder:
    for path in folder.iterdir():
        path.unlink()
    return fetch(f"hf:{place}", COMMIT, want(text_bytes, **order), folder, Path("scratch"))


def by_datasets(kind: str, *paths: Path, **options: object) -> list[str]:
    names = [str(path.resolve()) for path in paths]
    return [
        row["text"] for row in datasets.load_dataset(kind, data_files=names, split="train", streaming=True, **options)
    ]


@pytest.fixture(autouse=True)
def _datasets_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_all_of_it_is_what_datasets_reads(hub: Hub, fetch_folder: Path) -> None:
    hub.card = {"license": "odc-by"}
    raw = fetch_raw(fetch_folder)
    found = texts_of(fetch_folder, raw.files)
    assert found == [text for texts in TEXTS.values() for text in texts]
    assert found == by_datasets("json", *(STORE / name for name in NAMES))
    assert (raw.source_files, raw.whole_source, raw.licence) == (SHARDS, True, "odc-by")
    assert raw.text_bytes == sum(TEXT_BYTES.values())
    assert [(file.name, file.source) for file in raw.files] == [("00000-c4-train.parquet", NAMES[0])]
    check_listed(fetch_folder, raw.files)
    assert hub.bodies_served() == {name: len(content) for name, content in FILES.items()}


def test_the_bytes_are_those_of_local_files(hub: Hub, fetch_folder: Path, tmp_path: Path) -> None:
    raw = fetch_raw(fetch_folder)
    local = tmp_path / "local"
    local.mkdir()
    (same,) = fetch_all(f"files:{STORE}/en/*.json.gz", local)
    assert (fetch_folder / raw.files[0].name).read_bytes() == (local / same.name).read_bytes()


@pytest.mark.parametrize("wanted_files", [1, 2, 5, 11])
def test_no_file_is_fetched_that_is_not_needed(wanted_files: int, hub: Hub, fetch_folder: Path) -> None:
    """Here, where the files are much alike; the last of those that are needed is taken whole or in part."""
    needed = NAMES[:wanted_files]
    exactly = sum(TEXT_BYTES[name] for name in needed)
    raw = fetch_raw(fetch_folder, exactly)
    assert texts_of(fetch_folder, raw.files) == [text for name in needed for text in TEXTS[name]]
    assert (raw.source_files, raw.whole_source) == (SHARDS, False)
    assert hub.bodies_served() == {name: len(FILES[name]) for name in needed}
    fetch_raw(fetch_folder, exactly - TEXT_BYTES[needed[-1]] + 1)
    assert [hub.requests[f"GET {name}"] for name in NAMES] == [1] * wanted_files + [0] * (SHARDS - wanted_files)
    fetch_raw(fetch_folder, exactly + 1)
    assert [hub.requests[f"GET {name}"] for name in NAMES] == [1] * (wanted_files + 1) + [0] * (
        SHARDS - wanted_files - 1
    )


def test_files_beyond_are_at_most_seven(hub: Hub, fetch_folder: Path) -> None:
    """The first holds little text for its size, and so lets more be expected to be needed."""
    hub.files = {"train-0.jsonl": b'{"text": "abc", "more": "%s"}\n' % (b"x" * 1_000)}
    hub.files |= {f"train-{number}.jsonl": b'{"text": "%s"}\n' % (b"t" * 1_000) for number in range(1, 30)}
    assert texts_of(fetch_folder, fetch_raw(fetch_folder, 1_003).files) == ["abc", "t" * 1_000]
    assert len(hub.bodies_served()) == 1 + transfer.FILES_AT_ONCE
    assert fetch_raw(fetch_folder, 1_003).text_bytes == 1_003


def test_files_without_text_are_fetched_together(hub: Hub, fetch_folder: Path) -> None:
    hub.files = {f"train-{number:02d}.jsonl": b'{"text": null}\n' for number in range(20)}
    hub.files["train-20.jsonl"] = b'{"text": "the only one"}\n'
    assert texts_of(fetch_folder, fetch_raw(fetch_folder).files) == [""] * 20 + ["the only one"]


def test_text_is_cut_where_it_is_enough(hub: Hub, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of local files: at the end of a row group."""
    monkeypatch.setattr("encore.download.raw_folder.ROW_GROUP_BYTES", 500)
    raw = fetch_raw(fetch_folder, TEXT_BYTES[NAMES[0]] + 1_000)
    found = texts_of(fetch_folder, raw.files)
    assert found == [text for name in NAMES[:2] for text in TEXTS[name]][: len(found)]
    assert TEXT_BYTES[NAMES[0]] + 1_000 <= raw.text_bytes < TEXT_BYTES[NAMES[0]] + 1_000 + 700
    assert not raw.whole_source


def test_shuffled(hub: Hub, fetch_folder: Path) -> None:
    raw = fetch_raw(fetch_folder, 1, shard_order="shuffled", split_seed=5)
    (name,) = hub.bodies_served()
    assert name != NAMES[0]
    assert raw.files[0].source == name
    assert texts_of(fetch_folder, raw.files) == TEXTS[name]


CSV = "id,text\n" + "".join(f'{number},"a {number}, ""b""\nc"\n' for number in range(20))
KINDS = {
    "csv": ({"data/train.csv": CSV.encode(), "data/test.csv": b"no"}, {}),
    "csv, packed": ({"train.csv.gz": gzip.compress(CSV.encode()), "a.csv": b"no"}, {}),
    "json": ({"train.json": json.dumps([{"text": f"é {number}"} for number in range(9)]).encode()}, {}),
    "json, packed": ({"a.jsonl.zst": zstandard.compress(b'{"text": "a"}\n{"text": "b"}\n')}, {}),
    "text": ({"a.txt": b"one\n", "b.txt": b"two\nlines\n"}, {"sample_by": "document"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(kind: str, hub: Hub, fetch_folder: Path) -> None:
    hub.files, options = KINDS[kind]
    hub.in_git = set(hub.files)  # as the Hub has small files: it lists no sha256 of them
    found = texts_of(fetch_folder, fetch_raw(fetch_folder).files)
    paths = sorted(path for path in STORE.rglob("*") if path.is_file())
    assert len(found) > 1
    assert found == by_datasets(kind.split(",")[0], *paths, **options)


def test_what_datasets_has_saved(hub: Hub, fetch_folder: Path) -> None:
    of_split = {
        split: datasets.Dataset.from_dict({"text": [f"{split} {number}" for number in range(50)]})
        for split in ("train", "validation")
    }
    datasets.DatasetDict(of_split).save_to_disk("saved", num_shards={"train": 3, "validation": 1})
    paths = [path for path in Path("saved").rglob("*") if path.is_file()]
    hub.files = {path.relative_to("saved").as_posix(): path.read_bytes() for path in paths}
    assert len(hub.files) == 1 + 3 + 1 + 2 * 2
    raw = fetch_raw(fetch_folder)
    assert raw.source_files == 3
    assert texts_of(fetch_folder, raw.files) == datasets.load_from_disk("saved")["train"]["text"]
    assert (
        texts_of(fetch_folder, fetch_raw(fetch_folder, place=f"{REPOSITORY}/validation").files)[49] == "validation 49"
    )


def test_a_broken_row_is_named_as_the_hub_names_its_file(hub: Hub, fetch_folder: Path) -> None:
    hub.files = {"train.jsonl": b'{"text": "a"}\n{"body": "b"}\n'}
    with pytest.raises(EncoreError) as error:
        fetch_raw(fetch_folder)
    where = f"hf:{REPOSITORY} at {COMMIT}, file train.jsonl, line 2"
    assert str(error.value) == f"{where} has no key 'text'; set text_column to one of body"
    hub.files = {"train.csv.gz": gzip.compress(os.urandom(999))[:-20]}
    with pytest.raises(
        EncoreError, match=rf"^hf:{REPOSITORY} at {COMMIT}, file train\.csv\.gz is damaged \(Compressed"
    ):
        fetch_raw(fetch_folder)


def test_faults_of_the_network_and_of_the_disk(hub: Hub, fetch_folder: Path) -> None:
    undisturbed = [file.sha256 for file in fetch_raw(fetch_folder).files]
    (STORE / NAMES[0]).write_bytes(bytes(len(FILES[NAMES[0]])))
    (STORE / NAMES[1]).rename(STORE / f"{NAMES[1]}.partial")
    os.truncate(STORE / f"{NAMES[1]}.partial", 500)
    (STORE / NAMES[2]).unlink()
    hub.faults[NAMES[2]] = [Fault("damage"), Fault("end", after_bytes=900)]
    hub.bytes_served.clear()
    assert [file.sha256 for file in fetch_raw(fetch_folder).files] == undisturbed
    sizes = [len(FILES[name]) for name in NAMES]
    assert hub.bodies_served() == {NAMES[0]: sizes[0], NAMES[1]: sizes[1] - 500, NAMES[2]: 2 * sizes[2]}
    (STORE / NAMES[1]).unlink()
    hub.faults[NAMES[1]] = [Fault("damage", ALWAYS)]
    with pytest.raises(EncoreError, match="sha256 that is not the listed one"):
        fetch_raw(fetch_folder)


def test_room_for_what_is_missing(hub: Hub, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = len(FILES[NAMES[0]]) - 1
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(EncoreError, match=r"scratch/hub/\S+: 0\.0 MB are going to be written .*make room, set ENCORE_"):
        fetch_raw(fetch_folder, 1)
    assert hub.bodies_served() == {}
    free += 1
    fetch_raw(fetch_folder, 1)
    free = 0
    fetch_raw(fetch_folder, 1)


def test_the_revision_needs_no_file(hub: Hub) -> None:
    assert current_revision(f"hf:{REPOSITORY}") == COMMIT
    assert hub.bodies_served() == {}


def test_memory_does_not_grow_with_the_file(hub: Hub, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of a file is handed on row by row: no more of it than the wanted text is ever read."""
    read_bytes = 0
    pieces_of = readers._read_pieces

    def count(path: Path, what: str) -> Iterator[bytes]:
        nonlocal read_bytes
        for piece in pieces_of(path, what):
            read_bytes += len(piece)
            yield piece

    monkeypatch.setattr(readers, "_read_pieces", count)
    hub.files = {"train.jsonl": b'{"text": "%s"}\n' % (b"x" * 1_000) * 20_000}
    fetch_raw(fetch_folder, 1_000)
    assert 4_000_000 <= read_bytes <= 4_000_000 + 2 * readers.READ_BYTES  # a row group
