"""hf:OWNER/NAME: what a Hub on loopback lists, which of its files are chosen, and what is kept of them."""

import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from encore import files
from encore.download import hub as hub_module
from encore.download import transfer
from encore.download.hub import DataSet
from encore.download.raw_folder import RawFile, RawFolder
from encore.download.sources import current_revision, fetch
from encore.errors import EncoreError
from tests.hub import ALWAYS, COMMIT, REPOSITORY, Fault, Hub, connected, serving
from tests.text_sources import PLENTY, check_listed, parquet_bytes, sha256, texts_of, want

SECRET = "hf_SeCrEtToKeN"
RANDOM = random.Random(1)
SHARDS = {
    f"data/train-{number:05d}-of-00003.parquet": [RANDOM.randbytes(400).hex() for _ in range(9)] for number in range(3)
}
SHARD_BYTES = {name: parquet_bytes(texts) for name, texts in SHARDS.items()}
NAMES = list(SHARDS)
# A length of four bytes stands before each text, and the footer counts the pages' headers as well.
TEXT_BYTES = [sum(len(text) + 4 for text in texts) for texts in SHARDS.values()]
STORE = Path("scratch/hub/owner--corpus") / COMMIT


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    others = {"data/test-00000-of-00001.parquet": b"not asked for", "README.md": b"# A corpus"}
    with (
        serving({**others, **dict(reversed(SHARD_BYTES.items()))}) as server,
        connected(monkeypatch, server.url, SECRET),
    ):
        yield server


def fetch_raw(folder: Path, wanted_text_bytes: int = PLENTY, place: str = REPOSITORY, **order: object) -> RawFolder:
    for path in folder.iterdir():
        path.unlink()
    return fetch(f"hf:{place}", COMMIT, want(wanted_text_bytes, **order), folder, Path("scratch"))


def fetch_hub(folder: Path, wanted_text_bytes: int = PLENTY, place: str = REPOSITORY) -> list[RawFile]:
    return fetch_raw(folder, wanted_text_bytes, place).files


def test_the_train_files_in_order(hub: Hub, fetch_folder: Path) -> None:
    raw = fetch_raw(fetch_folder)
    files = raw.files
    assert texts_of(fetch_folder, files) == [text for texts in SHARDS.values() for text in texts]
    assert [file.sha256 for file in files] == [sha256(content) for content in SHARD_BYTES.values()]
    assert [file.name for file in files] == [f"0000{n}-train-0000{n}-of-00003.parquet" for n in range(3)]
    assert [file.source for file in files] == NAMES
    assert (raw.source_files, raw.whole_source) == (3, True)
    assert sum(TEXT_BYTES) <= raw.text_bytes < sum(TEXT_BYTES) + 3 * 100
    check_listed(fetch_folder, files)
    assert hub.bodies_served() == {name: len(content) for name, content in SHARD_BYTES.items()}
    assert (STORE / NAMES[0]).samefile(fetch_folder / files[0].name)
    assert not list(Path("scratch").rglob("*.partial"))
    assert not list(Path("scratch").rglob(".link-*"))
    assert hub.authorizations == {f"Bearer {SECRET}"}
    assert hub.encodings == {"identity"}  # a partial file could not be continued otherwise


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (None, None),
        ({"language": ["en"]}, None),
        ({"license": "cc0-1.0"}, "cc0-1.0"),
        ({"license": ["mit", "odc-by"]}, "mit, odc-by"),
    ],
)
def test_the_licence_is_the_cards(hub: Hub, fetch_folder: Path, card: dict | None, licence: str | None) -> None:
    hub.card = card
    assert fetch_raw(fetch_folder, 1).licence == licence


def test_what_is_wanted_and_nothing_twice(hub: Hub, fetch_folder: Path) -> None:
    assert len(fetch_hub(fetch_folder, TEXT_BYTES[0] - 1)) == 1
    assert set(hub.bodies_served()) == {NAMES[0]}
    raw = fetch_raw(fetch_folder, TEXT_BYTES[0] + TEXT_BYTES[1] // 2)
    assert [file.source for file in raw.files] == NAMES[:2]
    assert (raw.source_files, raw.whole_source) == (3, False)
    assert len(fetch_hub(fetch_folder, 1)) == 1
    assert [hub.requests[f"GET {name}"] for name in NAMES] == [1, 1, 0]
    assert hub.requests["list COMMIT"] == 3
    assert hub.bodies_served() == {name: len(SHARD_BYTES[name]) for name in NAMES[:2]}


def test_files_are_hashed_once(hub: Hub, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    digest_of = transfer.hashlib.file_digest

    def note_and_hash(file, kind: str):
        hashed.append(Path(file.name).name)
        return digest_of(file, kind)

    monkeypatch.setattr(transfer.hashlib, "file_digest", note_and_hash)
    fetch_hub(fetch_folder)
    assert [name for name in hashed if not name.endswith(".partial")] == []  # while they came
    fetch_hub(fetch_folder)
    assert sorted(hashed[-3:]) == [Path(name).name for name in NAMES]
    assert len(hashed) == 6  # three partial files without a byte, and each whole file


# which files


def test_shuffled_order_is_that_of_hashes(hub: Hub, fetch_folder: Path) -> None:
    """As `printf SEED:NAME | b2sum -l 64` has them."""
    sums = {
        2: ["add5ca1b466fd274", "2be088b4b748c5fc", "483afe9cb53d13d9"],
        7: ["1743b830a8aa2db0", "816b693835b3b399", "64db23e5e49251ab"],
    }
    for seed, hashes in sums.items():
        by_hash = dict(sorted(zip(hashes, NAMES, strict=True)))
        files = fetch_raw(fetch_folder, shard_order="shuffled", split_seed=seed).files
        assert [file.source for file in files] == list(by_hash.values())
        assert [file.name[:5] for file in files] == ["00000", "00001", "00002"]
    assert fetch_raw(fetch_folder, 1, shard_order="shuffled", split_seed=7).files[0].source == NAMES[0]


def test_a_long_footer_is_asked_for_again(hub: Hub, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "TAIL_BYTES", 40)
    assert len(fetch_hub(fetch_folder, TEXT_BYTES[0] + 1_000)) == 2
    footer_bytes = [int.from_bytes(content[-8:-4], "little") + 8 for content in SHARD_BYTES.values()]
    assert [hub.requests[f"GET {name}#tail"] for name in NAMES] == [2, 2, 2]
    assert [hub.bytes_served[f"{name}#tail"] for name in NAMES] == [40 + count for count in footer_bytes]


def test_footers_are_asked_for_as_they_are_needed(hub: Hub, fetch_folder: Path) -> None:
    content = parquet_bytes(["x" * 1_000])
    hub.files = {f"train-{number:05d}.parquet": content for number in range(2_000)}
    raw = fetch_raw(fetch_folder, 3_000)
    asked = sum(count for name, count in hub.requests.items() if name.endswith("#tail"))
    assert [file.source for file in raw.files] == [f"train-{number:05d}.parquet" for number in range(3)]
    assert (raw.source_files, raw.whole_source) == (2_000, False)
    assert 3 <= asked <= 2 + hub_module.FOOTERS_AT_ONCE


def test_the_choice_is_the_same_without_ranges(hub: Hub, fetch_folder: Path) -> None:
    with_ranges = fetch_raw(fetch_folder, TEXT_BYTES[0] + 1_000).files
    shutil.rmtree("scratch")
    hub.bytes_served.clear()
    for name in NAMES:
        hub.faults[f"{name}#tail"] = [Fault("no_range", ALWAYS)]
    assert fetch_raw(fetch_folder, TEXT_BYTES[0] + 1_000).files == with_ranges
    assert hub.bodies_served() == {name: len(SHARD_BYTES[name]) for name in NAMES[:2]}


@pytest.mark.parametrize("kind", ["damage_end", "end"])
def test_a_damaged_footer_does_not_decide(kind: str, hub: Hub, fetch_folder: Path) -> None:
    """The first tail is unreadable, or the connection ends within it; that of the second file says too much."""
    hub.faults[f"{NAMES[0]}#tail"] = [Fault(kind, after_bytes=30)]
    assert [file.source for file in fetch_hub(fetch_folder, TEXT_BYTES[0] + 1_000)] == NAMES[:2]


def test_a_footer_that_lies_is_not_believed(hub: Hub, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lie = parquet_bytes(["x" * 50_000])
    honest = transfer.read_tail

    def read_tail(file: transfer.RemoteFile, count: int, *others: object) -> bytes | None:
        return lie[-count:] if file.path.name == Path(NAMES[0]).name else honest(file, count, *others)

    monkeypatch.setattr(transfer, "read_tail", read_tail)
    assert [file.source for file in fetch_hub(fetch_folder, 12_000)] == NAMES[:2]


def test_openwebtext_needs_37_of_its_files() -> None:
    """80 files of the size that DESIGN.md tells; 4 B tokens with a val split of 0.0005 fill 36 of them, and the margin
    makes 37."""
    from stages.download import TEXT_BYTES_PER_TOKEN

    data_set = DataSet.__new__(DataSet)
    names = [f"plain_text/train-{number:05d}-of-00080.parquet" for number in range(80)]
    footers = iter([SimpleNamespace(text_bytes=39_769_491_688 // 80)] * 80)
    data_set._read_footer = lambda name, text_column, stopping: next(footers)  # type: ignore[method-assign]
    wanted_text_bytes = int(4e9 / (1 - 0.0005) * TEXT_BYTES_PER_TOKEN["gpt2"])
    assert list(data_set._choose_enough(names, "text", wanted_text_bytes)) == names[:37]


def test_column_that_is_none(hub: Hub, fetch_folder: Path) -> None:
    with pytest.raises(EncoreError, match=r"file data/train-00000\S+ has no column of strings named 'body'; .* text$"):
        fetch(f"hf:{REPOSITORY}", COMMIT, want(column="body"), fetch_folder, Path("scratch"))
    assert hub.bodies_served() == {}


# what the store holds


def test_file_that_was_damaged_on_the_disk_is_fetched_again(hub: Hub, fetch_folder: Path) -> None:
    fetch_hub(fetch_folder, 1)
    (STORE / NAMES[0]).write_bytes(bytes(len(SHARD_BYTES[NAMES[0]])))
    assert fetch_hub(fetch_folder, 1)[0].sha256 == sha256(SHARD_BYTES[NAMES[0]])
    assert hub.requests[f"GET {NAMES[0]}"] == 2


def test_whole_file_gives_its_footer_without_the_network(hub: Hub, fetch_folder: Path) -> None:
    fetch_hub(fetch_folder)
    hub.requests.clear()
    fetch_hub(fetch_folder)
    assert hub.requests == {"list COMMIT": 1}


def test_file_in_git_is_checked_by_its_blob_id(hub: Hub, fetch_folder: Path) -> None:
    hub.in_git.add(NAMES[0])
    assert fetch_hub(fetch_folder, 1)[0].sha256 == sha256(SHARD_BYTES[NAMES[0]])
    (STORE / NAMES[0]).unlink()
    hub.faults[NAMES[0]] = [Fault("damage", ALWAYS)]
    with pytest.raises(EncoreError, match="sha256 that is not the listed one"):
        fetch_hub(fetch_folder, 1)


def test_links_and_copies_where_it_cannot(hub: Hub, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    files = fetch_hub(fetch_folder, 1)
    assert (fetch_folder / files[0].name).read_bytes() == SHARD_BYTES[NAMES[0]]
    assert (fetch_folder / files[0].name).stat().st_nlink == 1


def test_room_is_asked_for_first(hub: Hub, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_bytes = sum(map(len, SHARD_BYTES.values()))
    free = all_bytes - 1
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    sentence = r"scratch/hub/\S+: 0\.0 MB are going to be written and 0\.0 MB are free on its disk; make room, set "
    with pytest.raises(EncoreError, match=sentence + "ENCORE_SCRATCH .*, or lower token_cap"):
        fetch_hub(fetch_folder)
    assert hub.bodies_served() == {}
    free = all_bytes
    fetch_hub(fetch_folder)  # a link takes no room
    free = 0
    fetch_hub(fetch_folder)  # all is there

    def no_links(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    free = all_bytes - 1
    with pytest.raises(EncoreError, match="make room"):
        fetch_hub(fetch_folder)
    shutil.rmtree("scratch")
    free = 2 * all_bytes - 1
    with pytest.raises(EncoreError, match="make room"):
        fetch_hub(fetch_folder)
    free = 2 * all_bytes
    fetch_hub(fetch_folder)


def test_room_for_the_rest_of_a_partial_file(hub: Hub, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = STORE / f"{NAMES[0]}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(SHARD_BYTES[NAMES[0]][:1_000])
    free = len(SHARD_BYTES[NAMES[0]]) - 1_001
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(EncoreError, match="make room"):
        fetch_hub(fetch_folder, 1)
    free += 1
    fetch_hub(fetch_folder, 1)


def test_two_at_once_fetch_once(hub: Hub, fetch_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults[NAMES[0]] = [Fault("stall", after_bytes=100)]
    found: list[str] = []

    def bring() -> None:
        data_set = DataSet(REPOSITORY, COMMIT, Path("scratch"))
        data_set.fetch_enough(NAMES, "text", 1, fetch_folder)
        found.extend(data_set.sha256.values())

    threads = [threading.Thread(target=bring) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    waiting = ""
    while "another process is fetching it" not in (waiting := waiting + capsys.readouterr().err):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    hub.go_on.set()
    for thread in threads:
        thread.join()
    assert found == [sha256(SHARD_BYTES[NAMES[0]])] * 2
    assert hub.requests[f"GET {NAMES[0]}"] == 1
    assert not list(Path("scratch").rglob("*.partial"))


def test_newest_commit(hub: Hub) -> None:
    assert current_revision(f"hf:{REPOSITORY}") == COMMIT
    assert current_revision(f"hf:{REPOSITORY}/data") == COMMIT
    assert hub.requests == {"list newest": 2}
