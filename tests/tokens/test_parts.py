"""encore/tokens/parts.py: parts that are whole or absent, and together what one pass over the corpus would give."""

import json
import random
import re
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock, Timeout

from encore.errors import EncoreError
from encore.files import sha256_of
from encore.tokens import encode, parts
from encore.tokens.documents import is_val, list_row_groups
from encore.tokens.parts import EncodedPart, PartStore, fingerprint, merge, plan_parts, read_part
from encore.tokens.ranks import write_ranks
from encore.tokens.token_files import SPLITS, ShardWriter
from encore.tokens.tokenizer import END_OF_TEXT, make_tokenizer, train_bpe
from stages import tokenize
from tests.raw_text import (
    PLENTY,
    SEED,
    VAL_FRACTION,
    VOCAB_SIZE,
    check_parts,
    ids_of,
    plain_loop,
    small_shards,
    stage_params,
    total,
    write_raw,
)
from tests.sealed import change_sealed

# Empty ones, some with the end-of-text token's name, some of several batches.
TEXTS = [
    ["", f"{END_OF_TEXT} {number}", "ab cd ef gh " * 3, None][number % 9]
    if number % 9 < 4
    else f"the {number}: {number**2}"
    for number in range(36)
]


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Batches of a few documents, parts of one row group or two, shards of 40 tokens; and no waiting for the disk."""
    writers: list[ShardWriter] = []
    make = small_shards(40)
    monkeypatch.setattr(parts, "ShardWriter", lambda *arguments: writers.append(make(*arguments)) or writers[-1])
    monkeypatch.setattr(encode, "BATCH_BYTES", 25)
    monkeypatch.setattr(parts, "PART_TEXT_BYTES", 150)
    monkeypatch.setattr("encore.files.os.fsync", lambda _: None)
    yield
    for writer in writers:
        writer._file.close()  # as the end of a process does that failed


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., PartStore]:
    """Makes a store of TEXTS' parts; all that are made with the same parameters share a folder."""
    manifest = write_raw(tmp_path / "raw", TEXTS, file_size=20, row_group_size=6)
    return lambda **changes: PartStore(tmp_path / "raw", manifest, stage_params(**changes), tmp_path / "scratch")


def ignore(_: int) -> None:
    """Wants to know of no tokens."""


def bring_all(store: PartStore, token_cap: int) -> list[EncodedPart]:
    caps = stage_params(**{**store.params.as_dict(), "token_cap": token_cap})
    [encoded] = tokenize.encode(PartStore(store.raw, store.manifest, caps, store.folder.parents[1]), workers=1)
    return encoded


def test_parts_are_closed_as_soon_as_they_hold_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raw(tmp_path, TEXTS, file_size=24, row_group_size=2)
    groups = list_row_groups(sorted(tmp_path.glob("*.parquet")), "text")
    for part_bytes in (1, 150, 400, 1000, 10**6):
        monkeypatch.setattr(parts, "PART_TEXT_BYTES", part_bytes)
        planned = plan_parts(groups)
        assert [group for part in planned for group in part] == groups
        sizes = [[group.text_bytes for group in part] for part in planned]
        assert all(sum(part) >= part_bytes for part in sizes[:-1])
        assert all(sum(part[:-1]) < part_bytes for part in sizes)
    assert plan_parts([]) == []


@pytest.mark.slow
@pytest.mark.parametrize(("part_bytes", "batch_bytes"), [(1, 7), (400, 20), (10**6, 10**6)])
def test_every_cap_is_met_at_the_first_end_of_a_training_document_at_or_behind_it(
    make_store: Callable[..., PartStore], monkeypatch: pytest.MonkeyPatch, part_bytes: int, batch_bytes: int
) -> None:
    """One cap after the other in any order, over the parts that the earlier ones left."""
    monkeypatch.setattr(parts, "PART_TEXT_BYTES", part_bytes)
    monkeypatch.setattr(encode, "BATCH_BYTES", batch_bytes)
    store = make_store()
    tokenizer = make_tokenizer(store.ranks)
    ends = plain_loop(tokenizer, TEXTS).ends["train"]
    caps = [*range(1, ends[-1] + 2), PLENTY]
    random.Random(1).shuffle(caps)
    for cap in caps:
        encoded = bring_all(store, cap)
        check_parts(encoded, TEXTS, plain_loop(tokenizer, TEXTS, cap))
        assert total(encoded, "train", "tokens") == min((end for end in ends if end >= cap), default=ends[-1])
        assert (encoded[-1].stopped_at is not None) == (cap <= ends[-1])
        assert all(part.stopped_at is None for part in encoded[:-1])


def test_a_document_that_is_cut_is_counted_once_and_only_up_to_the_cap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents 0 to 6 are for training, 7 and 8 held out. Each "x" * 100 is cut four times."""
    monkeypatch.setattr(encode, "UNBROKEN_BYTES", 5)
    texts = ["x" * 100, "short", "y" * 100, "", "x" * 100, "", "end", "z" * 100, ""]
    manifest = write_raw(tmp_path / "raw", texts)
    store = PartStore(tmp_path / "raw", manifest, stage_params(vocab_size=257), tmp_path / "scratch")
    seen = {}
    for cap in (1, 101, 102, 107, 108, 209, 313, 314):
        (part,) = bring_all(store, cap)
        seen[cap] = (total([part], "train", "tokens"), total([part], "val", "tokens"), *part.remarks.values())
    assert seen == {
        1: (101, 0, 0, 0, 1),
        101: (101, 0, 0, 0, 1),
        102: (107, 0, 0, 0, 1),
        107: (107, 0, 0, 0, 1),
        108: (208, 0, 0, 0, 2),
        209: (309, 0, 1, 0, 3),
        313: (313, 0, 2, 0, 3),
        314: (313, 101, 3, 0, 4),
    }


def test_a_part_says_what_lies_beside_it_and_how_it_ended(make_store: Callable[..., PartStore]) -> None:
    store = make_store()
    told: list[int] = []
    for most_tokens in (None, 40):
        told.clear()
        part = store.bring(0, most_tokens, 1, told.append)
        assert part == read_part(store.folder / "part-00000")
        shards = [*part.shards["train"], *part.shards["val"]]
        assert {path.name for path in part.folder.iterdir()} == {"part.json", *(shard.name for shard in shards)}
        assert part.stopped_at == most_tokens
        assert sum(told) == part.train_tokens == total([part], "train", "tokens")
        assert len(told) > 2
    assert {path.name for path in store.folder.iterdir()} == {
        "part-00000",
        "part-00000.lock",
        "tokenizer.tiktoken",
        "learned.json",
    }
    assert [store.is_finished(index) for index in range(3)] == [True, False, False]


def test_what_is_there_is_not_made_again(
    make_store: Callable[..., PartStore], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store()
    first = bring_all(store, 110)
    assert (len(store.parts), len(first)) == (4, 3)
    assert capsys.readouterr().out.startswith("learning 300 tokens from ")

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(parts, "encode_all", refuse)
    monkeypatch.setattr(parts, "train_bpe", refuse)
    other = make_store(token_cap=1)
    told: list[int] = []
    assert bring_all(other, 110) == first
    assert capsys.readouterr().out == f"encore: note: 3 of 4 parts are in {store.folder} already\n"
    assert other.bring(0, None, 1, told.append) == first[0]
    assert told == [first[0].train_tokens]
    assert other.vocab_size == VOCAB_SIZE


@pytest.mark.parametrize(("split", "token_cap"), [("train", PLENTY), ("val", PLENTY), ("train", 20)])
@pytest.mark.parametrize("damage", ["flipped", "shorter", "longer", "missing", "half removed"])
def test_a_part_that_the_disk_has_spoiled_is_made_anew(
    make_store: Callable[..., PartStore], split: str, damage: str, token_cap: int
) -> None:
    store = make_store()
    expected = plain_loop(make_tokenizer(store.ranks), TEXTS, token_cap)
    good = bring_all(store, token_cap)[0]
    path = good.folder / f"{split}_00000.bin"
    data = path.read_bytes()
    path.unlink()
    spoiled = {"flipped": bytes([data[0] ^ 1]) + data[1:], "shorter": data[:-2], "longer": data + b"  "}
    if damage in spoiled:
        path.write_bytes(spoiled[damage])
    elif damage == "half removed":
        (good.folder / "part.json").unlink()
    check_parts(bring_all(make_store(), token_cap), TEXTS, expected)
    assert path.read_bytes() == data


@pytest.mark.slow
@pytest.mark.parametrize("made_before", [[None], [30], [31], [29, None, 30], [None, 12], [1], [PLENTY]])
def test_a_part_that_others_made_is_taken_or_made_anew_as_the_cap_wants(
    make_store: Callable[..., PartStore], made_before: list[int | None]
) -> None:
    """As another machine does, that encodes parts ahead: it knows of no cap."""
    store = make_store()
    tokenizer = make_tokenizer(store.ranks)
    whole_tokens = store.bring(0, None, 1, ignore).train_tokens
    for cap in (1, 12, 30, whole_tokens - 1, whole_tokens, whole_tokens + 1, whole_tokens + 30, PLENTY):
        for index in range(len(store.parts)):
            for most_tokens in made_before:
                make_store().bring(index, most_tokens, 1, ignore)
        check_parts(bring_all(store, cap), TEXTS, plain_loop(tokenizer, TEXTS, cap))


def test_a_whole_part_is_kept_where_the_cap_lies_behind_it(make_store: Callable[..., PartStore]) -> None:
    store = make_store()
    part = store.bring(0, None, 1, ignore)
    inode = (part.folder / "part.json").stat().st_ino
    store.bring(0, part.train_tokens + 1, 1, ignore)
    assert (part.folder / "part.json").stat().st_ino == inode
    stopped = store.bring(0, part.train_tokens, 1, ignore)
    assert (stopped.stopped_at, stopped.train_tokens) == (part.train_tokens, part.train_tokens)


@pytest.mark.parametrize("token_cap", [90, PLENTY])
def test_work_that_fails_anywhere_leaves_whole_parts_and_goes_on_behind_them(
    make_store: Callable[..., PartStore], monkeypatch: pytest.MonkeyPatch, token_cap: int
) -> None:
    """The disk is full at once, then after one batch, after two more, and so on."""
    store = make_store()
    expected = plain_loop(make_tokenizer(store.ranks), TEXTS, token_cap)
    encode_all, seen = encode.encode_all, [0]

    def fail_after(count: int) -> Callable[..., Iterator[Any]]:
        left = iter(range(count))

        def encode_some(*arguments: Any) -> Iterator[Any]:
            for result in encode_all(*arguments):
                if next(left, None) is None:
                    raise OSError(28, "No space left on device")
                yield result

        return encode_some

    for count in range(100):
        monkeypatch.setattr(parts, "encode_all", fail_after(count))
        before = [index for index in range(4) if store.is_finished(index)]
        try:
            encoded = bring_all(make_store(), token_cap)
        except OSError:
            finished = [index for index in range(4) if store.is_finished(index)]
            assert finished[: len(before)] == before
            assert finished == list(range(len(finished)))
            assert {path.name for path in store.folder.glob("part-*[0-9]")} == {f"part-{n:05d}" for n in finished}
            seen.append(len(finished))
        else:
            check_parts(encoded, TEXTS, expected)
            break
    assert max(seen) > 0


def test_published_ranks_are_taken_from_the_raw_text_each_time(tmp_path: Path) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"the": 256}
    manifest = write_raw(tmp_path / "raw", TEXTS, ranks=write_ranks(ranks))
    store = PartStore(tmp_path / "raw", manifest, stage_params(tokenizer="gpt2"), tmp_path / "scratch")
    store.folder.mkdir(parents=True)
    store.ranks_path.write_bytes(b"what a disk made of it")
    assert (store.ranks, store.vocab_size) == (ranks, 258)
    assert store.ranks_path.read_bytes() == write_ranks(ranks)


def test_ranks_are_learned_from_the_training_documents(make_store: Callable[..., PartStore]) -> None:
    store = make_store()
    training = [text for number, text in enumerate(TEXTS) if text and not is_val(number, SEED, VAL_FRACTION)]
    assert store.ranks == train_bpe(training, VOCAB_SIZE) != train_bpe(filter(None, TEXTS), VOCAB_SIZE)
    assert store.ranks_path.read_bytes() == write_ranks(store.ranks)


def test_parts_of_another_tokenizer_are_not_mixed_with_these(make_store: Callable[..., PartStore]) -> None:
    """Should a disk or another machine have changed the ranks that lie beside them."""
    store = make_store()
    store.bring(0, None, 1, ignore)
    other = write_ranks(train_bpe(["quite another corpus, with other pairs"] * 2, 270))
    store.ranks_path.write_bytes(other)
    change_sealed(store.folder / "learned.json", sha256=sha256(other).hexdigest())
    with pytest.raises(EncoreError) as error:
        bring_all(make_store(), PLENTY)
    assert str(error.value) == (
        f"{store.folder}/part-00000 was encoded with another tokenizer than {store.ranks_path} holds; "
        f"delete {store.folder} and run again"
    )


@pytest.mark.parametrize("name", ["tokenizer.tiktoken", "learned.json"])
def test_a_damaged_vocabulary_is_learned_anew(
    make_store: Callable[..., PartStore], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    expected = make_store().ranks
    path = make_store().folder / name
    data = path.read_bytes()
    path.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    store = make_store()
    assert store.ranks == expected
    assert capsys.readouterr().err == f"encore: note: {store.ranks_path} is damaged; the vocabulary is learned anew\n"
    assert make_store().ranks == expected
    assert capsys.readouterr().err == ""


def test_a_part_whose_record_is_damaged_is_encoded_anew(
    make_store: Callable[..., PartStore], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = bring_all(make_store(), PLENTY)
    path = expected[1].folder / "part.json"
    path.write_text(path.read_text().replace('"documents": ', '"documents": 1', 1))
    assert bring_all(make_store(), PLENTY) == expected
    assert capsys.readouterr().err == f"encore: note: {path} is damaged; the part is encoded anew\n"


def test_parts_are_kept_by_what_they_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_raw(tmp_path / "raw", TEXTS, file_size=24)
    base = fingerprint(manifest, stage_params())
    assert re.fullmatch("[0-9a-f]{16}", base)
    assert fingerprint(json.loads(json.dumps(manifest)), stage_params(token_cap=7)) == base
    [source] = manifest["sources"]

    def of(*sources: dict[str, Any]) -> str:
        return fingerprint({**manifest, "sources": [{**source, **changes} for changes in sources]}, stage_params())

    assert of({"whole_source": False, "dataset": "files:elsewhere"}) == base
    one, other = source["files"]
    texts = [[{"files": [other, one]}], [{"files": [one]}], [{"files": [one, {**other, "sha256": "0" * 64}]}]]
    texts += [[{"files": [one]}, {"files": [other]}], [{"text_column": "x"}]]
    pages = [
        {"dataset_share": {"a": 1.0}},
        {"tokenizer": "gpt2"},
        {"vocab_size": 9},
        {"val_fraction": 0.3},
        {"split_seed": 1},
    ]
    others = [of(*text) for text in texts]
    others += [fingerprint(manifest, stage_params(**page)) for page in pages]

    monkeypatch.setattr(parts, "code_sha256", lambda module: f"other code of {module}")
    others.append(fingerprint(manifest, stage_params()))
    assert len({base, *others}) == 2 + len(texts) + len(pages)


def test_parts_of_other_parameters_are_never_met(make_store: Callable[..., PartStore]) -> None:
    store, other = make_store(), make_store(split_seed=1)
    encoded = bring_all(store, PLENTY)
    assert other.folder != store.folder
    assert not any(map(other.is_finished, range(4)))
    bring_all(other, PLENTY)
    assert bring_all(make_store(), PLENTY) == encoded


def test_a_part_is_locked_while_it_is_made(make_store: Callable[..., PartStore]) -> None:
    store, tries = make_store(), []

    def try_the_locks(_: int) -> None:
        for name in ("part-00000.lock", "part-00001.lock"):
            try:
                with FileLock(store.folder / name, timeout=0):
                    tries.append((name, "free"))
            except Timeout:
                tries.append((name, "held"))

    store.bring(0, None, 1, try_the_locks)
    assert set(tries) == {("part-00000.lock", "held"), ("part-00001.lock", "free")}
    tries.clear()
    store.bring(1, None, 1, try_the_locks)
    assert set(tries) == {("part-00000.lock", "free"), ("part-00001.lock", "held")}


def test_who_merges_does_so_alone_and_takes_the_parts_away(make_store: Callable[..., PartStore]) -> None:
    store, other = make_store(), make_store(split_seed=1)
    with store.merging():
        bring_all(store, 50)
        with pytest.raises(Timeout), FileLock(store.folder.with_suffix(".lock"), timeout=0):
            pass
        with other.merging():
            other.bring(0, None, 1, ignore)
        assert [path.name for path in store.folder.parent.iterdir() if path.is_dir()] == [store.folder.name]
    assert not any(path.is_dir() for path in store.folder.parent.iterdir())
    with FileLock(store.folder.with_suffix(".lock"), timeout=0):
        pass


def fail_while_merging(store: PartStore) -> None:
    with store.merging():
        bring_all(store, PLENTY)
        raise KeyboardInterrupt


def test_parts_stay_where_merging_fails(make_store: Callable[..., PartStore]) -> None:
    store = make_store()
    with pytest.raises(KeyboardInterrupt):
        fail_while_merging(store)
    assert all(map(make_store().is_finished, range(4)))
    with make_store().merging():
        pass
    assert not store.folder.exists()


@pytest.mark.parametrize("links", [True, False])
def test_merged_shards_are_numbered_through_and_lie_on_the_disk_once(
    make_store: Callable[..., PartStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr("encore.files.os.link", refuse_to_link)
    encoded = bring_all(make_store(), PLENTY)
    assert max(len(part.shards["train"]) for part in encoded) > 1, "some part has several shards"
    (tmp_path / "tokens").mkdir()
    merged = merge(encoded, tmp_path / "tokens")
    ids = ids_of(encoded)
    for split in SPLITS:
        old = [part.folder / shard.name for part in encoded for shard in part.shards[split]]
        assert [shard.name for shard in merged[split]] == [f"{split}_{number:05d}.bin" for number in range(len(old))]
        new = [tmp_path / "tokens" / shard.name for shard in merged[split]]
        assert np.frombuffer(b"".join(path.read_bytes() for path in new), "<u2").tolist() == ids[split]
        assert [shard.sha256 for shard in merged[split]] == [sha256_of(path) for path in new]
        assert [path.samefile(other) for path, other in zip(old, new, strict=True)] == [links] * len(old)
        for what in ("tokens", "documents", "text_bytes"):
            assert sum(getattr(shard, what) for shard in merged[split]) == total(encoded, split, what)
    assert len(list((tmp_path / "tokens").iterdir())) == sum(map(len, merged.values()))


def refuse_to_link(*_: object) -> None:
    raise OSError(18, "Invalid cross-device link")
