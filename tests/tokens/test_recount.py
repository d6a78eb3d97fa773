"""recount.py: the numbers of plain loops, and a sentence for every way in which a token folder can be wrong."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encore.errors import EncoreError
from encore.tokens import recount
from encore.tokens.ranks import write_ranks
from tests.sealed import change_sealed
from tests.token_folders import Documents, make_documents, make_ranks, write_token_folder

SHARD = 50
# In shards of 50: the third document fills three and parts of two more; 300, 350, 450 and 550 are ends of both.
TRAIN_LENGTHS = [40, 3, 180, 1, 17, 59, 20, 30, 100, 5, 95]
VAL_LENGTHS = [30, 25, 45]
TOKENS = 550


def documents_of(vocab_size: int) -> tuple[Documents, Documents]:
    return make_documents(TRAIN_LENGTHS, vocab_size, 1), make_documents(VAL_LENGTHS, vocab_size, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_token_folder(tmp_path / "tokens", *documents_of(300), vocab_size=300, shard_tokens=SHARD)
    return tmp_path / "tokens"


@pytest.mark.parametrize("vocab_size", [300, 65_536, 70_000])
def test_the_numbers_are_those_of_plain_loops(tmp_path: Path, vocab_size: int) -> None:
    splits = documents_of(vocab_size)
    write_token_folder(tmp_path / "tokens", *splits, vocab_size=vocab_size, shard_tokens=SHARD)
    [counts] = recount.recount(tmp_path / "tokens", TOKENS, threads=2)
    assert list(counts) == ["train", "val"]
    byte_lengths = {rank: len(token) for token, rank in make_ranks(vocab_size).items()} | {vocab_size - 1: 0}
    for count, documents in zip(counts.values(), splits, strict=True):
        ids = [number for document in documents for number in document]
        assert count.tokens == len(ids)
        assert count.documents == len(documents)
        assert count.document_tokens.tolist() == [len(document) for document in documents]
        assert count.text_bytes == sum(byte_lengths[number] for number in ids)
        assert np.flatnonzero(count.used).tolist() == sorted(set(ids))
        assert len(count.used) == vocab_size


@pytest.mark.parametrize("threads", [1, 2, 30])
@pytest.mark.parametrize("piece", [1, 7, SHARD, SHARD + 1])
def test_neither_threads_nor_pieces_change_a_number(
    folder: Path, threads: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    [expected] = recount.recount(folder, TOKENS, threads=1)
    monkeypatch.setattr(recount, "PIECE_TOKENS", piece)
    [counts] = recount.recount(folder, TOKENS, threads=threads)
    for split, count in counts.items():
        assert count.document_tokens.tolist() == expected[split].document_tokens.tolist()
        assert count.used.tolist() == expected[split].used.tolist()
        assert count.text_bytes == expected[split].text_bytes


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("piece", [3, 64, 1000])
def test_a_shard_by_itself(tmp_path: Path, dtype: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 ids up to 59 of a vocabulary of 50, whose end of text is 49: with what runs in, out, and beyond."""
    monkeypatch.setattr(recount, "PIECE_TOKENS", piece)
    ids = np.random.default_rng(3).integers(0, 60, 500)
    ids[ids == 7] = 8
    ids[-20:] = 8
    path = tmp_path / "shard.bin"
    ids.astype(dtype).tofile(path)
    lengths = np.array([*range(1, 50), 0, 0], np.uint32)
    count = recount.count_shard(path, np.dtype(dtype), lengths)

    documents, here = [], []
    for number in ids.tolist():
        here.append(number)
        if number == 49:
            documents.append(here)
            here = []
    assert count.sha256 == sha256(path.read_bytes()).hexdigest()
    assert count.document_tokens.tolist() == [len(document) for document in documents]
    assert count.open_tokens == len(here) >= 20
    assert count.text_bytes == sum(number + 1 for document in documents for number in document if number < 49)
    assert count.open_text_bytes == sum(number + 1 for number in here if number < 49)
    assert count.used.tolist() == [number != 7 for number in range(50)]
    assert count.largest_id == 59


def test_a_piece_of_long_tokens_is_summed_without_overflow() -> None:
    lengths = np.full(recount.PIECE_TOKENS, 32_000, np.uint32)
    assert recount.sum_bytes(lengths) == 32_000 * recount.PIECE_TOKENS


def test_every_shard_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    open_path = Path.open

    def note(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(path.name)
        return open_path(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", note)
    recount.recount(folder, TOKENS, threads=2)
    shards = sorted(path.name for path in folder.glob("*.bin"))
    assert len(shards) == 13
    assert sorted(name for name in opened if name.endswith(".bin")) == shards


def edit_manifest(folder: Path, **changes: Any) -> None:
    change_sealed(folder / "manifest.json", **changes)


def edit_source(folder: Path, split: str | None = None, **changes: Any) -> None:
    """Changes what the manifest says of its only source, or of that one's part of a split."""
    [source] = json.loads((folder / "manifest.json").read_text())["sources"]
    (source["splits"][split] if split else source).update(changes)
    edit_manifest(folder, sources=[source])


def edit_shard(folder: Path, split: str, number: int, **changes: int) -> None:
    """Adds to what the manifest says of a shard, and so of its source."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for key, change in changes.items():
        manifest["shards"][split][number][key] += change
        manifest["sources"][0]["splits"][split][key] += change
    edit_manifest(folder, shards=manifest["shards"], sources=manifest["sources"])


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 2
    path.write_bytes(data)


def add_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def take_another_tokenizer(folder: Path) -> None:
    data = write_ranks(make_ranks(290))
    (folder / "tokenizer.tiktoken").write_bytes(data)
    edit_manifest(folder, tokenizer_sha256=sha256(data).hexdigest())


def write_last_document(folder: Path, document: list[int]) -> None:
    """The folder anew with another last document in val."""
    train, val = documents_of(300)
    shutil.rmtree(folder)
    write_token_folder(folder, train, [*val[:-1], document], vocab_size=300, shard_tokens=SHARD)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (
        lambda folder: flip_bit(folder / "train_00002.bin"),
        "DIR/train_00002.bin: its bytes are not the ones that the manifest describes (sha256 differs)",
    ),
    "a cut shard": (
        lambda folder: (folder / "val_00000.bin").write_bytes((folder / "val_00000.bin").read_bytes()[:-2]),
        "DIR/val_00000.bin has 98 bytes and the manifest says 100",
    ),
    "a token too many": (
        lambda folder: add_bytes(folder / "val_00000.bin", b"ab"),
        "DIR/val_00000.bin has 102 bytes and the manifest says 100",
    ),
    "a byte too many": (
        lambda folder: add_bytes(folder / "train_00010.bin", b"a"),
        "DIR/train_00010.bin has 101 bytes and the manifest says 100",
    ),
    "a missing shard": (lambda folder: (folder / "train_00005.bin").unlink(), "DIR/train_00005.bin is missing"),
    "a folder for a shard": (
        lambda folder: replace_by_a_folder(folder / "train_00005.bin"),
        "DIR/train_00005.bin is missing",
    ),
    "a foreign shard": (
        lambda folder: shutil.copy(folder / "train_00000.bin", folder / "train_00011.bin"),
        "DIR/train_00011.bin is in no manifest",
    ),
    "a foreign file": (lambda folder: (folder / ".notes").touch(), "DIR/.notes is in no manifest"),
    "a foreign folder": (lambda folder: (folder / "old").mkdir(), "DIR/old is in no manifest"),
    "a document too few": (
        lambda folder: edit_shard(folder, "train", 5, documents=1),
        "DIR/train_00005.bin holds 1 documents, the manifest says 2",
    ),
    "an id beyond the vocabulary": (
        lambda folder: write_last_document(folder, [5] * 20 + [300] + [6] * 23 + [299]),
        "DIR/val_00001.bin holds id 300; ids end at 299",
    ),
    "a document without an end": (
        lambda folder: write_last_document(folder, [5] * 45),
        "DIR/val_00001.bin is the last of its split and ends amid a document",
    ),
    "a flipped bit in the tokenizer": (
        lambda folder: flip_bit(folder / "tokenizer.tiktoken"),
        "DIR/tokenizer.tiktoken is not the tokenizer that made the tokens",
    ),
    "a missing tokenizer": (
        lambda folder: (folder / "tokenizer.tiktoken").unlink(),
        "DIR/tokenizer.tiktoken is not the tokenizer that made the tokens",
    ),
    "another tokenizer": (take_another_tokenizer, "DIR/tokenizer.tiktoken has 290 ids, the manifest says 300"),
    "another cap": (
        lambda folder: edit_source(folder, token_cap=500),
        "it was made for token_cap 500, which is 550 in params.yaml",
    ),
    "another number of a source's tokens": (
        lambda folder: edit_source(folder, "val", tokens=1_000),
        "it says 1,000 tokens of val, and 100 by its shards",
    ),
    "a cap that was reached": (
        lambda folder: edit_source(folder, cap_reached=False),
        "cap_reached is False with 550 of 550 training tokens",
    ),
}


def problems_of(folder: Path, threads: int = 2) -> str:
    with pytest.raises(EncoreError) as error:
        recount.recount(folder, TOKENS, threads)
    begin, end = f"{folder}/manifest.json: ", ". `dvc repro -f tokenize` writes them anew"
    assert str(error.value).startswith(begin)
    assert str(error.value).endswith(end)
    return str(error.value)[len(begin) : -len(end)].replace(str(folder), "DIR")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_disagreement_is_told_and_nothing_else_is(folder: Path, damage: str) -> None:
    do, sentence = DAMAGES[damage]
    do(folder)
    assert problems_of(folder) == sentence


@pytest.mark.parametrize(
    ("split", "number", "documents"), [("val", 1, (1, 3)), ("train", 4, (2, 5)), ("train", 2, (0, 0))]
)
def test_text_that_differs_names_the_shard_in_which_it_ends(
    folder: Path, split: str, number: int, documents: tuple[int, int]
) -> None:
    """documents: the numbers of those that end in the shard, wherever they begin."""
    byte_lengths = {rank: len(token) for token, rank in make_ranks(300).items()} | {299: 0}
    of_split = dict(zip(("train", "val"), documents_of(300), strict=True))[split]
    text_bytes = sum(byte_lengths[token] for document in of_split[slice(*documents)] for token in document)
    edit_shard(folder, split, number, text_bytes=1)
    assert problems_of(folder) == (
        f"the documents that end in DIR/{split}_{number:05d}.bin hold {text_bytes:,} bytes of text, "
        f"the manifest says {text_bytes + 1:,}"
    )


@pytest.mark.parametrize("shards", [[], [1, 0], [0, 0, 1]])
def test_shards_out_of_order_are_told(folder: Path, shards: list[int]) -> None:
    listed = json.loads((folder / "manifest.json").read_text())["shards"]
    edit_manifest(folder, shards={**listed, "val": [listed["val"][number] for number in shards]})
    assert "its val shards are not val_00000.bin and what follows in order" in problems_of(folder)


def test_a_shard_that_the_manifest_forgot(folder: Path) -> None:
    listed = json.loads((folder / "manifest.json").read_text())["shards"]
    edit_manifest(folder, shards={**listed, "val": listed["val"][:1]})
    assert problems_of(folder).split("; ") == [
        "its sources have 2 val shards, and it lists 1",
        "DIR/val_00000.bin is the last of its split and ends amid a document",
        "DIR/val_00001.bin is in no manifest",
    ]


@pytest.mark.parametrize("threads", [1, 4])
def test_all_disagreements_are_told_at_once(folder: Path, threads: int) -> None:
    parts = ("another cap", "a missing tokenizer", "a flipped bit", "a missing shard", "a cut shard", "a foreign file")
    for damage in parts:
        DAMAGES[damage][0](folder)
    edit_shard(folder, "train", 4, documents=-1)
    edit_shard(folder, "train", 10, documents=1, text_bytes=-3)  # the text is not known without the tokenizer
    assert problems_of(folder, threads).split("; ") == [
        *(DAMAGES[damage][1] for damage in parts[:-1]),
        "DIR/train_00004.bin holds 3 documents, the manifest says 2",
        "DIR/train_00010.bin holds 1 documents, the manifest says 2",
        DAMAGES[parts[-1]][1],
    ]


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(EncoreError, match=r"manifest\.json is missing; `dvc repro -s -f tokenize`"):
        recount.recount(tmp_path, TOKENS, threads=1)
