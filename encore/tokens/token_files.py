"""Token shards: headerless little-endian integers, at most 100M to a file, with a manifest that a reader checks.

`cat train_*.bin` is nanoGPT's train.bin. Every document is followed by the end-of-text token and none is cut.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encore.errors import EncoreError, bring_back
from encore.files import sha256_of
from encore.json_files import read_sealed, write_sealed
from encore.schemas import TokenManifest, TokenSource

SHARD_TOKENS = 100_000_000
MANIFEST = "manifest.json"
RANKS_FILE = "tokenizer.tiktoken"  # the tokenizer, see encore/tokens/tokenizer.py
SPLITS = ("train", "val")
WAY_OUT = bring_back("data/tokens", "tokenize")


@dataclass(frozen=True)
class Shard:
    """One file of tokens. `documents` counts the end-of-text tokens in it; `text_bytes` the UTF-8 bytes of the
    documents that end in it."""

    name: str
    tokens: int
    documents: int
    text_bytes: int
    sha256: str


@dataclass(frozen=True)
class SourceRange:
    """Where a source lies in a split: its tokens and its documents, both numbered through the split. text_bytes: UTF-8
    bytes of these documents."""

    name: str
    tokens: range
    documents: range
    text_bytes: int


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian uint16 where it can hold ids 0 to `vocab_size - 1`, else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def shard_name(split: str, number: int) -> str:
    """The name of a split's shard; they are numbered from 0."""
    return f"{split}_{number:05d}.bin"


class ShardWriter:
    """Writes one split's tokens into `folder` as `SPLIT_00000.bin`, `SPLIT_00001.bin`, ...

    A document may run on from one shard into the next, so that every shard but the last is full.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder = folder
        self.split = split
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.shards: list[Shard] = []
        self.tokens = 0
        self.documents = 0
        self.text_bytes = 0
        self._open()

    def add(self, tokens: np.ndarray, document_ends: np.ndarray, document_bytes: np.ndarray) -> None:
        """Appends documents laid end to end.

        tokens: (n,) ids, of the writer's dtype; behind the last end there may be a document that the next call goes on
        with. document_ends: (d,) the index just behind each end-of-text token. document_bytes: (d,) UTF-8 bytes of the
        text of each document that ends here.
        """
        if tokens.dtype != self.dtype:
            raise TypeError(f"tokens are {tokens.dtype}, shards are {self.dtype}")
        start = 0
        while start < len(tokens):
            stop = min(len(tokens), start + self.shard_tokens - self._shard_tokens)
            data = tokens[start:stop].tobytes()
            self._file.write(data)
            self._hash.update(data)
            self._shard_tokens += stop - start
            first, last = np.searchsorted(document_ends, [start, stop], side="right").tolist()
            self._shard_documents += last - first
            self._shard_text_bytes += int(document_bytes[first:last].sum())
            start = stop
            if self._shard_tokens == self.shard_tokens:
                self._close()
                self._open()
        self.tokens += len(tokens)
        self.documents += len(document_ends)
        self.text_bytes += int(document_bytes.sum())

    def finish(self) -> list[Shard]:
        """Ends the last shard and returns all of them."""
        self._close()
        return self.shards

    def _open(self) -> None:
        self._path = self.folder / shard_name(self.split, len(self.shards))
        self._file = self._path.open("wb")
        self._hash = hashlib.sha256()
        self._shard_tokens = self._shard_documents = self._shard_text_bytes = 0

    def _close(self) -> None:
        self._file.close()
        if self._shard_tokens == 0:
            self._path.unlink()
            return
        self.shards.append(
            Shard(
                self._path.name,
                self._shard_tokens,
                self._shard_documents,
                self._shard_text_bytes,
                self._hash.hexdigest(),
            )
        )


def shards_as_json(shards: list[Shard]) -> list[dict[str, Any]]:
    """The manifest's entries for a split."""
    return [asdict(shard) for shard in shards]


def sum_up(shards: list[Shard]) -> dict[str, int]:
    """How many shards, tokens, documents and bytes of text these are together."""
    whats = ("tokens", "documents", "text_bytes")
    return {"shards": len(shards), **{what: sum(getattr(shard, what) for shard in shards) for what in whats}}


def write_manifest(folder: Path, vocab_size: int, shards: dict[str, list[Shard]], about: dict[str, Any]) -> None:
    """Describes a token folder that is complete but for this. about: the keys of TokenManifest that the bytes do not
    tell."""
    own = {"dtype": token_dtype(vocab_size).name, "vocab_size": vocab_size}
    tokenizer = {"tokenizer_sha256": sha256_of(folder / RANKS_FILE)}
    described = {"shards": {split: shards_as_json(of_split) for split, of_split in shards.items()}}
    write_sealed(folder / MANIFEST, {**about, **own, **tokenizer, **described})


class TokenSplit:
    """One split of a token folder, read by memory map as one long row of tokens. sources: where each source of a
    mixture lies; none where there is a single one.

    Opening checks the manifest, every shard's presence and size.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.name = folder, split
        self.manifest = read_manifest(folder)
        self.shards = [Shard(**entry) for entry in self.manifest["shards"][split]]
        self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        problems = [problem for shard in self.shards if (problem := self._size_problem(shard))]
        if problems:
            raise EncoreError(f"{'; '.join(problems)}; {WAY_OUT}")
        self._maps = [np.memmap(folder / shard.name, dtype=self.dtype, mode="r") for shard in self.shards]
        self._starts = np.cumsum([0, *(shard.tokens for shard in self.shards)])
        self.tokens = int(self._starts[-1])
        self.documents = sum(shard.documents for shard in self.shards)
        self.text_bytes = sum(shard.text_bytes for shard in self.shards)
        self.sources = _locate_sources(self.manifest["sources"], split)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count` of the split, (count,) in its dtype, across shard borders if need be.

        Raises EncoreError where one is beyond the vocabulary: an embedding has no row for it.
        """
        pieces = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while count > 0:
            offset = start - int(self._starts[shard])
            piece = self._maps[shard][offset : offset + count]
            pieces.append(piece)
            start, count, shard = start + len(piece), count - len(piece), shard + 1
        tokens = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        largest = int(tokens.max(initial=0))
        if largest >= self.manifest["vocab_size"]:
            raise EncoreError(
                f"{self.folder}: a token of the {self.name} split is {largest}, and ids end at "
                f"{self.manifest['vocab_size'] - 1}; {WAY_OUT}"
            )
        return tokens

    def _size_problem(self, shard: Shard) -> str | None:
        path, expected_bytes = self.folder / shard.name, shard.tokens * self.dtype.itemsize
        if not path.exists():
            return f"{path} is missing"
        if path.stat().st_size != expected_bytes:
            return f"{path} has {path.stat().st_size:,} bytes and the manifest says {expected_bytes:,}"
        return None


def _locate_sources(sources: list[TokenSource], split: str) -> list[SourceRange]:
    located, tokens, documents = [], 0, 0
    for source in sources:
        here = source["splits"][split]
        stops = tokens + here["tokens"], documents + here["documents"]
        if source["name"] is not None:
            ranges = range(tokens, stops[0]), range(documents, stops[1])
            located.append(SourceRange(source["name"], *ranges, here["text_bytes"]))
        tokens, documents = stops
    return located


def token_hashes(folder: Path, splits: Sequence[str] = SPLITS) -> dict[Path, str]:
    """The sha256 that the manifest has of each shard of these splits, and of the tokenizer."""
    manifest = read_manifest(folder)
    shards = [shard for split in splits for shard in manifest["shards"][split]]
    tokenizer = {folder / RANKS_FILE: manifest["tokenizer_sha256"]}
    return tokenizer | {folder / shard["name"]: shard["sha256"] for shard in shards}


def read_ranks_file(folder: Path) -> bytes:
    """The bytes of the folder's tokenizer. Raises EncoreError where they are not those that made the tokens."""
    path = folder / RANKS_FILE
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != read_manifest(folder)["tokenizer_sha256"]:
        raise EncoreError(f"{path} is not the tokenizer that made the tokens; {WAY_OUT}")
    return data


def manifest_sha256(folder: Path) -> str:
    """A hash that stands for all of the folder, since the manifest holds the hashes of the rest."""
    read_manifest(folder)
    return sha256_of(folder / MANIFEST)


def read_manifest(folder: Path) -> TokenManifest:
    """The token folder's manifest. Raises EncoreError where it is missing or not one of ours."""
    return read_sealed(folder / MANIFEST, TokenManifest, WAY_OUT)
