"""encore/tokens/token_files.py: shards against one plain array, and a reader that trusts nothing."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from encore.errors import EncoreError, bring_back
from encore.tokens.token_files import (
    MANIFEST,
    Shard,
    ShardWriter,
    TokenSplit,
    read_manifest,
    shard_name,
    shards_as_json,
    token_dtype,
)
from tests.sealed import write_with_seal
from tests.token_folders import about

END = 299


def make_documents(lengths: list[int]) -> tuple[list[np.ndarray], list[int]]:
    """Documents of these many tokens, each ending in END and having END nowhere else, and odd numbers of bytes."""
    random = np.random.default_rng(len(lengths))
    documents = [np.append(random.integers(0, END, length - 1), END).astype("<u2") for length in lengths]
    return documents, [1000 + 7 * number for number in range(len(lengths))]


def write_split(folder: Path, documents: list[np.ndarray], text_bytes: list[int], per_call: int, size: int) -> list:
    writer = ShardWriter(folder, "train", np.dtype("<u2"), size)
    for start in range(0, len(documents), per_call):
        some = documents[start : start + per_call]
        ends = np.cumsum([len(document) for document in some])
        writer.add(np.concatenate(some), ends, np.array(text_bytes[start : start + per_call]))
    assert writer.tokens == sum(len(document) for document in documents)
    assert writer.documents == len(documents)
    assert writer.text_bytes == sum(text_bytes)
    return writer.finish()


@pytest.mark.parametrize("per_call", [1, 3, 1000])
@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ([3, 1, 4, 1, 5, 9, 2, 6], 7),
        ([25], 7),  # one document over four shards
        ([7, 7, 7], 7),  # documents and shards end together
        ([1, 6, 8, 6], 7),  # an exact multiple in the end
        ([5], 100),
        ([1] * 20, 1),
        (list(range(1, 60)), 64),
    ],
)
def test_shards_hold_the_documents_in_order_and_count_what_ends_in_them(
    tmp_path: Path, lengths: list[int], size: int, per_call: int
) -> None:
    documents, text_bytes = make_documents(lengths)
    shards = write_split(tmp_path, documents, text_bytes, per_call, size)
    everything = np.concatenate(documents)

    assert [shard.name for shard in shards] == [f"train_{n:05d}.bin" for n in range(-(-len(everything) // size))]
    assert sorted(path.name for path in tmp_path.iterdir()) == [shard.name for shard in shards]
    assert b"".join((tmp_path / shard.name).read_bytes() for shard in shards) == everything.tobytes()
    last_tokens = np.cumsum(lengths) - 1
    for number, shard in enumerate(shards):
        data = (tmp_path / shard.name).read_bytes()
        here = everything[number * size : (number + 1) * size]
        assert data == here.tobytes()
        assert shard.tokens == len(here)
        assert shard.documents == int((here == END).sum())
        assert shard.text_bytes == sum(n for n, at in zip(text_bytes, last_tokens, strict=True) if at // size == number)
        assert shard.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("piece_tokens", [1, 4, 10])
def test_a_document_may_go_on_in_later_calls(tmp_path: Path, piece_tokens: int) -> None:
    """The same shards as from whole documents, whichever way the tokens are handed over."""
    documents, text_bytes = make_documents([3, 1, 40, 1, 5, 19, 2, 6])
    (tmp_path / "whole").mkdir()
    (tmp_path / "pieces").mkdir()
    whole = write_split(tmp_path / "whole", documents, text_bytes, 1, 7)
    writer = ShardWriter(tmp_path / "pieces", "train", np.dtype("<u2"), 7)
    everything, remaining = np.concatenate(documents), list(text_bytes)
    for start in range(0, len(everything), piece_tokens):
        piece = everything[start : start + piece_tokens]
        ends = np.flatnonzero(piece == END) + 1
        writer.add(piece, ends, np.array([remaining.pop(0) for _ in ends], np.int64))
    assert (writer.tokens, writer.documents, writer.text_bytes) == (77, 8, sum(text_bytes))
    assert writer.finish() == whole
    for shard in whole:
        assert (tmp_path / "pieces" / shard.name).read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()


def test_names_of_shards_sort_as_their_numbers() -> None:
    assert [shard_name("val", number) for number in (0, 12, 99_999)] == [
        "val_00000.bin",
        "val_00012.bin",
        "val_99999.bin",
    ]


def test_bytes_are_little_endian(tmp_path: Path) -> None:
    for name, dtype, expected in [("a", "<u2", b"\x02\x01"), ("b", "<u4", b"\x02\x01\x00\x00")]:
        (tmp_path / name).mkdir()
        writer = ShardWriter(tmp_path / name, "val", np.dtype(dtype))
        writer.add(np.array([0x0102], dtype), np.array([1]), np.array([1]))
        writer.finish()
        assert (tmp_path / name / "val_00000.bin").read_bytes() == expected


def test_a_writer_refuses_tokens_that_it_would_have_to_cut(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", np.dtype("<u2"))
    with pytest.raises(TypeError, match="tokens are uint32, shards are uint16"):
        writer.add(np.array([70_000], np.uint32), np.array([1]), np.array([1]))
    assert writer.finish() == []
    assert list(tmp_path.iterdir()) == []


def test_two_bytes_while_they_suffice() -> None:
    assert token_dtype(50_257) == token_dtype(65_536) == np.dtype("<u2")
    assert token_dtype(65_537) == np.dtype("<u4")
    assert np.array([65_535]).astype(token_dtype(65_536))[0] == 65_535
    assert np.array([65_536]).astype(token_dtype(65_537))[0] == 65_536


@pytest.fixture
def split_folder(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """40 documents in shards of 37 tokens, and all tokens in one array."""
    documents, text_bytes = make_documents([1 + number * 7 % 19 for number in range(40)])
    shards = write_split(tmp_path, documents, text_bytes, 6, 37)
    listed = {"train": shards_as_json(shards)}
    manifest = {**about(listed), "dtype": "uint16", "vocab_size": 300, "tokenizer_sha256": "0" * 64}
    write_with_seal(tmp_path / MANIFEST, {**manifest, "shards": listed})
    return tmp_path, np.concatenate(documents)


def test_reading_across_shards_is_slicing(split_folder: tuple[Path, np.ndarray]) -> None:
    folder, everything = split_folder
    split = TokenSplit(folder, "train")
    assert len(split.shards) > 5
    assert split.tokens == len(everything)
    assert split.documents == 40
    assert split.text_bytes == sum(1000 + 7 * number for number in range(40))
    random = np.random.default_rng(1)
    spans = [(0, split.tokens), (36, 1), (36, 2), (37, 37), (37, 38), (split.tokens - 1, 1), (0, 1)]
    spans += [(int(start), int(random.integers(1, split.tokens - start + 1))) for start in random.integers(0, 350, 200)]
    for start, count in spans:
        read = split.read(start, count)
        np.testing.assert_array_equal(read, everything[start : start + count])
        assert read.dtype == np.dtype("<u2")


def test_a_token_beyond_the_vocabulary_is_never_handed_out(split_folder: tuple[Path, np.ndarray]) -> None:
    folder, everything = split_folder
    tokens = np.fromfile(folder / "train_00002.bin", "<u2")
    for wrong in (300, 65_535):
        tokens[5] = wrong
        tokens.tofile(folder / "train_00002.bin")
        split = TokenSplit(folder, "train")
        place = 2 * 37 + 5
        np.testing.assert_array_equal(split.read(place + 1, 50), everything[place + 1 : place + 51])
        for start, count in ((place, 1), (0, len(everything)), (place - 40, 60)):
            with pytest.raises(EncoreError) as error:
                split.read(start, count)
            problem = f"{folder}: a token of the train split is {wrong}, and ids end at 299"
            assert str(error.value) == f"{problem}; {bring_back('data/tokens', 'tokenize')}"


def test_four_byte_tokens_are_read_as_such(tmp_path: Path) -> None:
    ids = np.array([1, 70_000, 100_000], "<u4")
    writer = ShardWriter(tmp_path, "val", np.dtype("<u4"), 2)
    writer.add(ids, np.array([3]), np.array([9]))
    listed = {"val": shards_as_json(writer.finish())}
    manifest = {**about(listed), "dtype": "uint32", "vocab_size": 100_001, "tokenizer_sha256": "0" * 64}
    write_with_seal(tmp_path / MANIFEST, {**manifest, "shards": listed})
    assert TokenSplit(tmp_path, "val").read(0, 3).tolist() == ids.tolist()


def test_missing_and_cut_shards_are_named_all_at_once(split_folder: tuple[Path, np.ndarray]) -> None:
    folder, _ = split_folder
    (folder / "train_00001.bin").unlink()
    (folder / "train_00003.bin").write_bytes(b"12345")
    with pytest.raises(EncoreError) as error:
        TokenSplit(folder, "train")
    assert str(error.value) == (
        f"{folder}/train_00001.bin is missing; {folder}/train_00003.bin has 5 bytes and the manifest says 74; "
        "`dvc repro -s -f tokenize` makes data/tokens anew, and `encore verify` tells whether "
        "`dvc checkout --force data/tokens` is enough"
    )


def test_no_manifest_and_a_foreign_one(tmp_path: Path) -> None:
    way_out = f"; {bring_back('data/tokens', 'tokenize')}"
    with pytest.raises(EncoreError) as error:
        TokenSplit(tmp_path, "train")
    assert str(error.value) == f"{tmp_path / MANIFEST} is missing{way_out}"
    for foreign in ([1], None, {"files": []}, {"dtype": "uint16", "shards": {}, "vocab_size": 3}):
        (tmp_path / MANIFEST).write_text(json.dumps(foreign))
        with pytest.raises(EncoreError) as error:
            read_manifest(tmp_path)
        problem = "has other bytes than Encore wrote (its own_sha256 differs)"
        assert str(error.value) == f"{tmp_path / MANIFEST} {problem}{way_out}"
    write_with_seal(tmp_path / MANIFEST, {"files": []})
    with pytest.raises(EncoreError) as error:
        read_manifest(tmp_path)
    problem = "is not what belongs there (sources: Field required)"
    assert str(error.value) == f"{tmp_path / MANIFEST} {problem}{way_out}"


def test_the_manifests_entries_make_the_same_shards_again() -> None:
    shard = Shard("train_00000.bin", 5, 2, 11, "ab" * 32)
    (entry,) = json.loads(json.dumps(shards_as_json([shard])))
    assert Shard(**entry) == shard
    assert list(entry) == ["name", "tokens", "documents", "text_bytes", "sha256"]
