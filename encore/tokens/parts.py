"""The corpus in parts of PART_TEXT_BYTES, each encoded to token shards of its own, kept in scratch until all are there.

A part holds text of a single source, and the parts of one source follow those of the one before.

So a run that was killed goes on behind the last finished part, other machines can encode parts ahead of it, and the
shards of all parts, numbered through, are the same however many machines and threads made them.

    SCRATCH/tokens/FINGERPRINT/            one corpus under one set of parameters
        tokenizer.tiktoken                 the ranks that all parts are encoded with
        learned.json                       their sha256, where they were learned from the corpus
        part-00000/                        whole or absent
            train_00000.bin  val_00000.bin
            part.json                      what lies beside it, and how the part ended
"""

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from filelock import FileLock

from encore.code import code_sha256
from encore.errors import EncoreError
from encore.files import link_or_copy, sha256_of, whole_folder, write_whole
from encore.json_files import read_sealed, write_sealed
from encore.mixture import split_cap
from encore.params import StageParams
from encore.progress import Progress, note
from encore.schemas import LearnedRanks, PartRecord, RawManifest, RawSource
from encore.tokens.documents import RowGroup, list_row_groups, read_documents
from encore.tokens.encode import EMPTY, RULES, Encoded, Tokens, encode_all, gather_batches, learning_texts
from encore.tokens.ranks import read_ranks, write_ranks
from encore.tokens.token_files import RANKS_FILE, SPLITS, Shard, ShardWriter, shard_name, shards_as_json, token_dtype
from encore.tokens.tokenizer import train_bpe

PART_TEXT_BYTES = 400_000_000  # about 90M tokens of GPT-2's
LEARNING_BYTES = 100_000_000  # byte pairs learned from this much text do not change to speak of with more
PART, LEARNED = "part.json", "learned.json"


@dataclass(frozen=True)
class EncodedPart:
    """A part's token shards in `folder`.

    stopped_at: the number of train tokens behind which it was cut off, None for one that goes to its last document.
    remarks: how many documents each of encode.RULES was for. tokenizer_sha256: of the ranks that it was encoded with.
    """

    folder: Path
    shards: dict[str, list[Shard]]
    stopped_at: int | None
    remarks: dict[str, int]
    tokenizer_sha256: str

    @property
    def train_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards["train"])


def plan_parts(groups: list[RowGroup]) -> list[list[RowGroup]]:
    """Consecutive row groups, gathered until each part holds PART_TEXT_BYTES by the footers of their files."""
    parts: list[list[RowGroup]] = []
    text_bytes = PART_TEXT_BYTES
    for group in groups:
        if text_bytes >= PART_TEXT_BYTES:
            parts.append([])
            text_bytes = 0
        parts[-1].append(group)
        text_bytes += group.text_bytes
    return parts


@dataclass(frozen=True)
class SourceParts:
    """A source, as data/raw describes it. token_cap: the training tokens that it may have. groups: all of its text.
    parts: the numbers of its parts."""

    described: RawSource
    token_cap: int
    groups: list[RowGroup]
    parts: range

    @property
    def documents(self) -> int:
        return sum(group.documents for group in self.groups)

    @property
    def text_bytes(self) -> int:
        return sum(group.text_bytes for group in self.groups)


class PartStore:
    """The parts of one corpus, finished and to come: the documents of the folder `raw`, which `manifest` describes.

    Raises EncoreError where `raw` holds the text of other sources than `params` names.
    """

    def __init__(self, raw: Path, manifest: RawManifest, params: StageParams, scratch: Path) -> None:
        self.raw, self.manifest, self.params = raw, manifest, params
        self.parts: list[list[RowGroup]] = []
        self.sources: list[SourceParts] = []
        token_caps = split_cap(params.token_cap, params.dataset_share)
        if [source["name"] for source in manifest["sources"]] != list(token_caps):
            raise EncoreError(f"{raw} holds the text of other sources than params.yaml names; `dvc repro download`")
        for source in manifest["sources"]:
            groups = list_row_groups([raw / file["name"] for file in source["files"]], source["text_column"])
            first = len(self.parts)
            self.parts += plan_parts(groups)
            numbers = range(first, len(self.parts))
            self.sources.append(SourceParts(source, token_caps[source["name"]], groups, numbers))
        self.folder = scratch / "tokens" / fingerprint(manifest, params)
        self.ranks_path = self.folder / RANKS_FILE

    @contextmanager
    def merging(self) -> Iterator[None]:
        """For whoever takes the parts away in the end: a second run of the same waits, and then finds them gone."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.with_suffix(".lock")):
            yield
            shutil.rmtree(self.folder)

    @cached_property
    def ranks(self) -> dict[bytes, int]:
        """The tokenizer's, published or learned from the corpus, which takes a while the first time."""
        params = self.params
        if params.tokenizer == "gpt2":
            published = self.manifest["tokenizer"]
            if published is None:
                raise EncoreError(f"{self.raw} has no published tokenizer; `dvc repro -f download` brings it")
            write_whole(self.ranks_path, (self.raw / published["name"]).read_bytes())
        elif not self._has_learned():
            learned = write_ranks(train_bpe(self._read_to_learn(), params.vocab_size))
            write_whole(self.ranks_path, learned)
            write_sealed(self.folder / LEARNED, {"sha256": hashlib.sha256(learned).hexdigest()})
        return read_ranks(self.ranks_path)

    def _has_learned(self) -> bool:
        """Whether the ranks that were learned from this corpus are there, as they were written."""
        if not (self.ranks_path.exists() and (self.folder / LEARNED).exists()):
            return False
        with suppress(EncoreError):
            record = read_sealed(self.folder / LEARNED, LearnedRanks)
            if record["sha256"] == sha256_of(self.ranks_path):
                return True
        note(f"{self.ranks_path} is damaged; the vocabulary is learned anew")
        return False

    def _read_to_learn(self) -> Iterator[str]:
        """The text that the vocabulary is learned from, of each source by its share; tells how far that is."""
        params = self.params
        most_bytes = share_learning_bytes(self.sources, params.val_fraction)
        total_bytes = sum(min(most, source.text_bytes) for source, most in zip(self.sources, most_bytes, strict=True))
        # The learner draws bars of its own in a terminal.
        with Progress("read for the vocabulary", total_bytes, "bytes of text", bar=False) as progress:
            for source, most in zip(self.sources, most_bytes, strict=True):
                documents = read_documents(source.groups)
                for text in learning_texts(documents, params.split_seed, params.val_fraction, most):
                    yield text
                    progress.add(len(text.encode()))
        print(f"learning {params.vocab_size:,} tokens from {progress.done:,} bytes of text", flush=True)

    @cached_property
    def tokenizer_sha256(self) -> str:
        _ = self.ranks  # which lay them there
        return sha256_of(self.ranks_path)

    @property
    def vocab_size(self) -> int:
        return len(self.ranks) + 1

    def part_folder(self, index: int) -> Path:
        return self.folder / f"part-{index:05d}"

    def is_finished(self, index: int) -> bool:
        """Whether the part is there, whole or as far as a cap let it go."""
        return (self.part_folder(index) / PART).exists()

    def bring(self, index: int, most_tokens: int | None, workers: int, on_tokens: Callable[[int], None]) -> EncodedPart:
        """The part up to the first training document that ends at or behind `most_tokens`, encoded if it is not there.

        on_tokens: is told of train tokens as they are written. None as `most_tokens`: all of the part. One that is
        damaged is encoded anew. Raises EncoreError where the part that is there has other ranks than the store.
        """
        folder = self.part_folder(index)
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"{folder.name}.lock"):  # another machine may be at it
            found = _try_to_read(folder) if self.is_finished(index) else None
            if found:
                if found.tokenizer_sha256 != self.tokenizer_sha256:
                    raise EncoreError(
                        f"{folder} was encoded with another tokenizer than {self.ranks_path} holds; "
                        f"delete {self.folder} and run again"
                    )
                if _serves(found, most_tokens) and _is_whole(found):
                    on_tokens(found.train_tokens)
                    return found
            with whole_folder(folder) as partial:
                self._encode(index, most_tokens, workers, on_tokens, partial)
            return read_part(folder)

    def _encode(
        self, index: int, most_tokens: int | None, workers: int, on_tokens: Callable[[int], None], folder: Path
    ) -> None:
        """Fills `folder` with the part's shards and their description."""
        params = self.params
        dtype = token_dtype(self.vocab_size)
        writers = {split: ShardWriter(folder, split, dtype) for split in SPLITS}
        documents = read_documents(self.parts[index])
        batches = gather_batches(documents, params.split_seed, params.val_fraction)
        results = encode_all(batches, self.ranks, workers)
        remarks: set[tuple[int, str]] = set()
        last = stopped_at = None
        for result in results:
            missing_tokens = None if most_tokens is None else most_tokens - writers["train"].tokens
            train, val, last = _until(result, missing_tokens)
            writers["train"].add(train.ids, train.ends, train.text_bytes)
            writers["val"].add(val.ids, val.ends, val.text_bytes)
            remarks.update(remark for remark in result.remarks if last is None or remark[0] <= last)
            on_tokens(len(train.ids))
            if last is not None:
                stopped_at = most_tokens
                break
        results.close()
        shards = {split: writer.finish() for split, writer in writers.items()}
        counts = Counter(rule for _, rule in remarks)
        groups = self.parts[index]
        seen = sum(group.documents for group in groups) if last is None else last + 1 - groups[0].first_document
        counts[EMPTY] = seen - sum(writer.documents for writer in writers.values())
        record = {
            "shards": {split: shards_as_json(of_split) for split, of_split in shards.items()},
            "stopped_at": stopped_at,
            "remarks": {rule: counts[rule] for rule in RULES},
            "tokenizer_sha256": self.tokenizer_sha256,
        }
        write_sealed(folder / PART, record)


def share_learning_bytes(sources: list[SourceParts], val_fraction: float) -> list[int]:
    """How much training text of each source the vocabulary is learned from at most: LEARNING_BYTES in all, by the
    sources' shares.

    Where a source has less than its share of that, it is read whole and the others have less by as much.
    """
    token_cap = sum(source.token_cap for source in sources)
    scarcest = min(sources, key=lambda source: source.text_bytes / source.token_cap)
    training_bytes = scarcest.text_bytes * (1 - val_fraction)
    all_bytes = min(LEARNING_BYTES, training_bytes * token_cap / scarcest.token_cap)
    read_whole = scarcest if all_bytes < LEARNING_BYTES else None
    return [
        LEARNING_BYTES if source is read_whole else math.ceil(all_bytes * source.token_cap / token_cap)
        for source in sources
    ]


def read_part(folder: Path) -> EncodedPart:
    """A finished part."""
    record = read_sealed(folder / PART, PartRecord, f"delete {folder} and run again")
    shards = {split: [Shard(**entry) for entry in record["shards"][split]] for split in SPLITS}
    return EncodedPart(folder, shards, record["stopped_at"], record["remarks"], record["tokenizer_sha256"])


def _try_to_read(folder: Path) -> EncodedPart | None:
    """A finished part; None, with a note, where its record is damaged."""
    try:
        return read_part(folder)
    except EncoreError:
        note(f"{folder / PART} is damaged; the part is encoded anew")
        return None


def merge(parts: list[EncodedPart], folder: Path) -> dict[str, list[Shard]]:
    """Brings the shards of all parts to `folder`, numbered through, without copying where links will do."""
    merged: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    for split, shards in merged.items():
        for part in parts:
            for shard in part.shards[split]:
                name = shard_name(split, len(shards))
                link_or_copy(part.folder / shard.name, folder / name)
                shards.append(replace(shard, name=name))
    return merged


def fingerprint(manifest: RawManifest, params: StageParams) -> str:
    """16 hex digits for what the parts depend on: text, parameters other than the cap, and code."""
    texts = [[source["text_column"], *(file["sha256"] for file in source["files"])] for source in manifest["sources"]]
    keys = ("dataset_share", "tokenizer", "vocab_size", "val_fraction", "split_seed")
    inputs = [texts, [getattr(params, key) for key in keys], code_sha256("encore.tokens.parts")]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def _is_whole(part: EncodedPart) -> bool:
    """Whether the disk still has what was written."""
    shards = chain.from_iterable(part.shards.values())
    paths = {part.folder / shard.name: shard.sha256 for shard in shards}
    return all(path.exists() and sha256_of(path) == sha256 for path, sha256 in paths.items())


def _serves(part: EncodedPart, most_tokens: int | None) -> bool:
    """Whether the part is what would come out if it were encoded up to `most_tokens`."""
    if part.stopped_at is not None:
        return part.stopped_at == most_tokens
    return most_tokens is None or part.train_tokens < most_tokens


def _until(encoded: Encoded, missing_tokens: int | None) -> tuple[Tokens, Tokens, int | None]:
    """The train and val tokens of a batch up to the first training document that ends at or behind `missing_tokens`.

    And the number of that document, None where the batch has none. Nothing behind it counts, in neither split.
    """
    train, val = encoded.train, encoded.val
    if missing_tokens is None or not len(train.ends) or train.ends[-1] < missing_tokens:
        return train, val, None
    train = train.first(int(np.searchsorted(train.ends, missing_tokens)) + 1)
    last = int(train.numbers[-1])
    return train, val.first(int(np.searchsorted(val.numbers, last))), last
