"""A token folder made by plain loops over lists, and what a recount of it must find."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from encore.tokens.ranks import write_ranks
from tests.sealed import change_sealed, write_with_seal

Documents = list[list[int]]
# What a manifest says of a source beside what the bytes tell.
SOURCE = {
    "name": None,
    "dataset": "package:made-up",
    "dataset_revision": "1.0",
    "licence": "MIT",
    "whole_source": False,
    "token_cap": 1000,
    "cap_reached": True,
    "empty_documents": 0,
    "documents_with_end_of_text": 0,
    "cut_documents": 0,
}


def about(shards: dict[str, list[dict[str, Any]]], **changes: Any) -> dict[str, Any]:
    """What a manifest with one source says beside what the bytes tell. changes: of SOURCE and of the rest."""
    whats = ("tokens", "documents", "text_bytes")
    splits = {
        split: {"shards": len(entries), **{what: sum(entry[what] for entry in entries) for what in whats}}
        for split, entries in shards.items()
    }
    source = {key: changes.pop(key, value) for key, value in {**SOURCE, "splits": splits}.items()}
    return {"tokenizer": "bpe", "text_bytes_per_token": 4.5, "sources": [source], **changes}


def make_ranks(vocab_size: int) -> dict[bytes, int]:
    """Ranks of 1 to 15 bytes; the end-of-text token has the id after them."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return ranks | {b"%d" % number * (1 + number % 3): number for number in range(256, vocab_size - 1)}


def replace_shard(folder: Path, name: str, data: bytes) -> None:
    """Gives a shard other bytes of the same size, and the manifest their hash."""
    (folder / name).write_bytes(data)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    for entry in [*shards["train"], *shards["val"]]:
        if entry["name"] == name:
            entry["sha256"] = hashlib.sha256(data).hexdigest()
    change_sealed(folder / "manifest.json", shards=shards)


def make_documents(lengths: list[int], vocab_size: int, seed: int) -> Documents:
    """Documents of these many tokens, the last of which is the end of the text; the others are even."""
    draw = random.Random(seed)
    ids = range(0, vocab_size - 1, 2)
    return [[*(draw.choice(ids) for _ in range(length - 1)), vocab_size - 1] for length in lengths]


def write_token_folder(
    folder: Path, train: Documents, val: Documents, vocab_size: int, shard_tokens: int, **changes: Any
) -> None:
    """Writes shards, tokenizer and a manifest, of which `changes` replaces some values."""
    folder.mkdir(parents=True)
    ranks = make_ranks(vocab_size)
    (folder / "tokenizer.tiktoken").write_bytes(write_ranks(ranks))
    byte_lengths = {rank: len(token) for token, rank in ranks.items()}
    dtype = "uint16" if vocab_size <= 65_536 else "uint32"
    shards: dict[str, list[dict[str, Any]]] = {}
    for split, documents in (("train", train), ("val", val)):
        ids = [number for document in documents for number in document]
        shards[split] = []
        text_bytes = 0
        for start in range(0, len(ids), shard_tokens):
            here = ids[start : start + shard_tokens]
            entry = {"name": f"{split}_{len(shards[split]):05d}.bin", "tokens": len(here), "documents": 0}
            entry["text_bytes"] = 0
            for number in here:
                text_bytes += byte_lengths.get(number, 0)
                if number == vocab_size - 1:
                    entry["documents"] += 1
                    entry["text_bytes"] += text_bytes
                    text_bytes = 0
            data = b"".join(number.to_bytes(2 if dtype == "uint16" else 4, "little") for number in here)
            (folder / entry["name"]).write_bytes(data)
            shards[split].append({**entry, "sha256": hashlib.sha256(data).hexdigest()})
    tokens = sum(map(len, train))
    manifest = {
        "dtype": dtype,
        "vocab_size": vocab_size,
        "tokenizer_sha256": hashlib.sha256((folder / "tokenizer.tiktoken").read_bytes()).hexdigest(),
        "shards": shards,
    }
    write_with_seal(folder / "manifest.json", {**manifest, **about(shards, **{"token_cap": tokens, **changes})})
