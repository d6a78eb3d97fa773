"""Counts a token folder again from its bytes alone, and compares what they say with its manifest.

Each shard is read once, in pieces that the processor's cache holds while they are hashed and counted. Threads share
the shards out: reading, hashing and numpy's loops let go of Python's lock. It shares no code with what wrote them,
and so finds a mistake there: 1.3 GB a second on two cores.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from encore.errors import EncoreError
from encore.files import sha256_of
from encore.progress import Progress
from encore.schemas import TokenManifest
from encore.tokens.ranks import read_ranks
from encore.tokens.token_files import MANIFEST, RANKS_FILE, SPLITS, Shard, read_manifest, shard_name

PIECE_TOKENS = 2**17


@dataclass(frozen=True)
class ShardCount:
    """What the bytes of a shard say.

    document_tokens: (d,) uint32, for each document that ends in the shard its tokens there, the end-of-text token
    among them. text_bytes: the UTF-8 bytes of these. open_tokens, open_text_bytes: the same of what follows, of a
    document that goes on in the next shard. used: (vocab_size,) whether an id occurs. largest_id: of all that occur,
    those beyond the vocabulary too.
    """

    sha256: str
    document_tokens: np.ndarray
    text_bytes: int
    open_tokens: int
    open_text_bytes: int
    used: np.ndarray
    largest_id: int


@dataclass(frozen=True)
class SplitCount:
    """What the bytes of a split say, or of what a source has in it.

    document_tokens: (d,) uint32, the length of each document, its end-of-text token counted, so that they add up to
    `tokens`. text_bytes: UTF-8 bytes of all documents. used: (vocab_size,) whether an id occurs.
    """

    document_tokens: np.ndarray
    text_bytes: int
    used: np.ndarray

    @property
    def tokens(self) -> int:
        return int(self.document_tokens.sum())

    @property
    def documents(self) -> int:
        return len(self.document_tokens)


def recount(folder: Path, token_cap: int, threads: int) -> list[dict[str, SplitCount]]:
    """Counts both splits of each source; the number of threads changes nothing but the time.

    Raises EncoreError with every disagreement between the folder, its manifest and `token_cap`.
    """
    manifest = read_manifest(folder)
    vocab_size, dtype = manifest["vocab_size"], np.dtype(manifest["dtype"]).newbyteorder("<")
    shards = {split: [Shard(**entry) for entry in manifest["shards"][split]] for split in SPLITS}
    both = shards["train"] + shards["val"]
    sources = share_out(manifest, shards)

    ranks, tokenizer_problems = read_tokenizer(folder, manifest)
    counts, damage = count_shards(folder, both, dtype, byte_lengths(ranks, vocab_size), threads)
    problems = check_manifest(manifest, shards, token_cap) + check_sources(manifest, shards)
    problems += tokenizer_problems + damage
    for its_shards in (of_split for source in sources for of_split in source.values()):
        problems += compare(folder, its_shards, counts, vocab_size)
        # Without the tokenizer nobody knows the text, and a document may begin in a damaged shard.
        if ranks and all(shard.name in counts for shard in its_shards):
            problems += compare_text(folder, its_shards, counts)
    problems += find_strangers(folder, both)
    if problems:
        raise EncoreError(f"{folder / MANIFEST}: {'; '.join(problems)}. `dvc repro -f tokenize` writes them anew")
    return [
        {split: join([counts[shard.name] for shard in its_shards]) for split, its_shards in source.items()}
        for source in sources
    ]


def share_out(manifest: TokenManifest, shards: dict[str, list[Shard]]) -> list[dict[str, list[Shard]]]:
    """The shards of each source, by split, as far as there are so many."""
    remaining = {split: iter(of_split) for split, of_split in shards.items()}
    return [
        {split: list(islice(remaining[split], source["splits"][split]["shards"])) for split in SPLITS}
        for source in manifest["sources"]
    ]


def add_up(counts: list[SplitCount]) -> SplitCount:
    """What several sources have together in a split."""
    return SplitCount(
        np.concatenate([count.document_tokens for count in counts]),
        sum(count.text_bytes for count in counts),
        np.logical_or.reduce([count.used for count in counts]),
    )


def byte_lengths(ranks: dict[bytes, int], vocab_size: int) -> np.ndarray:
    """(vocab_size + 1,) uint32, the UTF-8 bytes of each id: 0 for the end-of-text token, which has the last id, and 0
    once more for all ids beyond."""
    lengths = np.zeros(vocab_size + 1, np.uint32)
    for token, rank in ranks.items():
        lengths[rank] = len(token)
    return lengths


def count_shards(
    folder: Path, shards: list[Shard], dtype: np.dtype, lengths: np.ndarray, threads: int
) -> tuple[dict[str, ShardCount], list[str]]:
    """What the bytes of each shard say, by its name, and a sentence for each whose bytes are not the manifest's."""

    def examine(shard: Shard) -> ShardCount | str:
        path, expected_bytes = folder / shard.name, shard.tokens * dtype.itemsize
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected_bytes:
            return f"{path} has {path.stat().st_size:,} bytes and the manifest says {expected_bytes:,}"
        count = count_shard(path, dtype, lengths)
        if count.sha256 != shard.sha256:
            return f"{path}: its bytes are not the ones that the manifest describes (sha256 differs)"
        return count

    counts, damage = {}, []
    pool = ThreadPoolExecutor(threads)
    try:
        with Progress("count", sum(shard.tokens for shard in shards), "tokens") as progress:
            for shard, count in zip(shards, pool.map(examine, shards), strict=True):
                progress.add(shard.tokens)
                if isinstance(count, str):
                    damage.append(count)
                else:
                    counts[shard.name] = count
    finally:
        pool.shutdown(cancel_futures=True)
    return counts, damage


def count_shard(path: Path, dtype: np.dtype, lengths: np.ndarray) -> ShardCount:
    """Hashes and counts a shard. What memory holds of it is a piece, and the lengths of its documents.

    lengths: (vocab_size + 1,) of `byte_lengths`.
    """
    vocab_size = len(lengths) - 1
    # The byte lengths of the ids met so far and 0 for all others. So one look-up measures the text and finds the tokens
    # that want a closer look: the first ones of their id, ends of documents, ids beyond the vocabulary.
    known = np.zeros_like(lengths)
    text = np.empty(PIECE_TOKENS, lengths.dtype)
    digest, ends = hashlib.sha256(), [np.zeros(1, np.int64)]
    tokens = text_bytes = open_text_bytes = largest_id = 0
    for data in read_pieces(path, PIECE_TOKENS * dtype.itemsize):
        digest.update(data)
        piece = np.frombuffer(data, dtype)
        piece_text = known.take(piece, mode="clip", out=text[: len(piece)])
        positions = np.flatnonzero(piece_text == 0)
        ids = piece[positions].astype(np.int64)
        largest_id = max(largest_id, int(ids.max(initial=0)))
        ids = np.minimum(ids, vocab_size)
        known[ids] = piece_text[positions] = lengths[ids]

        piece_ends = positions[ids == vocab_size - 1] + 1
        ends.append(tokens + piece_ends)
        tokens += len(piece)
        last_end = int(piece_ends[-1]) if len(piece_ends) else 0
        if last_end:
            text_bytes += open_text_bytes + sum_bytes(piece_text[:last_end])
            open_text_bytes = 0
        open_text_bytes += sum_bytes(piece_text[last_end:])
    document_ends = np.concatenate(ends)
    used = known[:vocab_size] > 0
    used[-1] = len(document_ends) > 1
    return ShardCount(
        sha256=digest.hexdigest(),
        document_tokens=np.diff(document_ends).astype(np.uint32),
        text_bytes=text_bytes,
        open_tokens=tokens - int(document_ends[-1]),
        open_text_bytes=open_text_bytes,
        used=used,
        largest_id=largest_id,
    )


def read_pieces(path: Path, piece_bytes: int) -> Iterator[memoryview]:
    """Yields a file's bytes, `piece_bytes` at a time, each piece in the place of the one before."""
    buffer = memoryview(bytearray(piece_bytes))
    with path.open("rb") as file:
        while size_bytes := file.readinto(buffer):
            yield buffer[:size_bytes]


def sum_bytes(lengths: np.ndarray) -> int:
    """The sum of a piece's byte lengths, in their own type: four times as fast, and enough for 32 kB a token."""
    return int(lengths.sum(dtype=lengths.dtype))


def join(counts: list[ShardCount]) -> SplitCount:
    """A split out of its shards in order, the last of which ends with a document."""
    document_tokens = np.concatenate([count.document_tokens for count in counts])
    first = open_tokens = 0
    for count in counts:
        if len(count.document_tokens):
            document_tokens[first] += open_tokens
            open_tokens = 0
        first += len(count.document_tokens)
        open_tokens += count.open_tokens
    return SplitCount(
        document_tokens=document_tokens,
        text_bytes=sum(count.text_bytes + count.open_text_bytes for count in counts),
        used=np.logical_or.reduce([count.used for count in counts]),
    )


def compare(folder: Path, shards: list[Shard], counts: dict[str, ShardCount], vocab_size: int) -> list[str]:
    """A sentence for each thing that a split's undamaged shards have otherwise than the manifest says."""
    problems = []
    for shard in shards:
        path, count = folder / shard.name, counts.get(shard.name)
        if count is None:
            continue
        documents = len(count.document_tokens)
        if documents != shard.documents:
            problems.append(f"{path} holds {documents:,} documents, the manifest says {shard.documents:,}")
        if count.largest_id >= vocab_size:
            problems.append(f"{path} holds id {count.largest_id}; ids end at {vocab_size - 1}")
        if shard is shards[-1] and count.open_tokens:
            problems.append(f"{path} is the last of its split and ends amid a document")
    return problems


def compare_text(folder: Path, shards: list[Shard], counts: dict[str, ShardCount]) -> list[str]:
    """A sentence for each shard of a split in which documents end that hold other text than the manifest says."""
    problems, open_text_bytes = [], 0
    for shard in shards:
        count, text_bytes = counts[shard.name], 0
        if len(count.document_tokens):
            text_bytes, open_text_bytes = open_text_bytes + count.text_bytes, 0
        open_text_bytes += count.open_text_bytes
        if text_bytes != shard.text_bytes:
            problems.append(
                f"the documents that end in {folder / shard.name} hold {text_bytes:,} bytes of text, "
                f"the manifest says {shard.text_bytes:,}"
            )
    return problems


def read_tokenizer(folder: Path, manifest: TokenManifest) -> tuple[dict[bytes, int], list[str]]:
    """The ranks of the folder's tokenizer; or none, and a sentence, where it is not the one of the manifest."""
    path, vocab_size = folder / RANKS_FILE, manifest["vocab_size"]
    if not path.is_file() or sha256_of(path) != manifest["tokenizer_sha256"]:
        return {}, [f"{path} is not the tokenizer that made the tokens"]
    ranks = read_ranks(path)
    if len(ranks) + 1 != vocab_size:
        return {}, [f"{path} has {len(ranks) + 1:,} ids, the manifest says {vocab_size:,}"]
    return ranks, []


def check_manifest(manifest: TokenManifest, shards: dict[str, list[Shard]], token_cap: int) -> list[str]:
    """A sentence for each thing that the manifest says against itself or against `token_cap`."""
    problems = []
    for split, of_split in shards.items():
        names = [shard.name for shard in of_split]
        if not names or names != [shard_name(split, number) for number in range(len(names))]:
            problems.append(f"its {split} shards are not {shard_name(split, 0)} and what follows in order")
    made_for = sum(source["token_cap"] for source in manifest["sources"])
    if made_for != token_cap:
        problems.append(f"it was made for token_cap {made_for}, which is {token_cap} in params.yaml")
    for source in manifest["sources"]:
        tokens, cap, reached = source["splits"]["train"]["tokens"], source["token_cap"], source["cap_reached"]
        if reached != (tokens >= cap):
            of_source = f" of {source['name']}" if source["name"] else ""
            problems.append(f"cap_reached{of_source} is {reached} with {tokens:,} of {cap:,} training tokens")
    return problems


def check_sources(manifest: TokenManifest, shards: dict[str, list[Shard]]) -> list[str]:
    """A sentence for each thing that the manifest says otherwise of a source than of its shards."""
    problems = []
    for split, of_split in shards.items():
        listed = sum(source["splits"][split]["shards"] for source in manifest["sources"])
        if listed != len(of_split):
            problems.append(f"its sources have {listed} {split} shards, and it lists {len(of_split)}")
            continue
        for source, its_shards in zip(manifest["sources"], share_out(manifest, shards), strict=True):
            of_source = f" of {source['name']}" if source["name"] else ""
            said = source["splits"][split]
            for what in ("tokens", "documents", "text_bytes"):
                found = sum(getattr(shard, what) for shard in its_shards[split])
                if found != said[what]:
                    problems.append(f"it says {said[what]:,} {what} of {split}{of_source}, and {found:,} by its shards")
    return problems


def find_strangers(folder: Path, shards: list[Shard]) -> list[str]:
    """A sentence for each file or folder that does not belong there."""
    known = {MANIFEST, RANKS_FILE, *(shard.name for shard in shards)}
    return [f"{path} is in no manifest" for path in sorted(folder.iterdir()) if path.name not in known]
