"""What the tests of the tokenize path share: data/raw as the download stage leaves it, and a plain loop over it."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken

from encore.params import StageParams
from encore.tokens.documents import is_val
from encore.tokens.encode import RULES
from encore.tokens.parts import EncodedPart
from encore.tokens.token_files import SPLITS, ShardWriter
from encore.tokens.tokenizer import END_OF_TEXT
from tests.conftest import ROOT, write_page
from tests.sealed import with_seal

SEED, VAL_FRACTION, VOCAB_SIZE = 2357, 0.2, 300
PLENTY = 10**12


def write_parquet(path: Path, texts: Sequence[str | None], row_group_size: int, column: str = "text") -> None:
    """A parquet file of documents, with a column beside the text."""
    table = pa.table({"id": range(len(texts)), column: pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=row_group_size, use_dictionary=False, write_statistics=False)


def write_raw(
    folder: Path,
    texts: Sequence[str | None],
    file_size: int = 130,
    row_group_size: int = 25,
    ranks: bytes | None = None,
) -> dict[str, Any]:
    """Raw text in files of `file_size` documents, and published ranks where there are some. Returns the manifest."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = []
    for start in range(0, len(texts), file_size):
        path = folder / f"{len(files):05d}-text.parquet"
        write_parquet(path, texts[start : start + file_size], row_group_size)
        data = path.read_bytes()
        documents = len(texts[start : start + file_size])
        digest = sha256(data).hexdigest()
        files.append(
            {"name": path.name, "source": path.name, "bytes": len(data), "sha256": digest, "documents": documents}
        )
    tokenizer = None
    if ranks is not None:
        (folder / "published.tiktoken").write_bytes(ranks)
        tokenizer = {"name": "published.tiktoken", "sha256": sha256(ranks).hexdigest()}
    source = {
        "name": None,
        "dataset": "package:made-up",
        "dataset_revision": "1.0",
        "licence": "MIT",
        "text_column": "text",
        "source_files": len(files),
        "whole_source": True,
        "text_bytes": sum(len((text or "").encode()) for text in texts),
        "repaired_documents": 0,
        "files": files,
    }
    manifest = with_seal({"sources": [source], "text_bytes_per_token": 6.0, "tokenizer": tokenizer})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def write_params(**changes: Any) -> None:
    """A page in the working directory that suits a small corpus."""
    page = {"vocab_size": VOCAB_SIZE, "split_seed": SEED, "val_fraction": VAL_FRACTION, "token_cap": 2500}
    write_page(Path("params.yaml"), **{**page, **changes})


def prepare_root(texts: Sequence[str | None]) -> None:
    """Makes the working directory one where the stage runs on these documents."""
    shutil.copy(ROOT / "dvc.yaml", ".")
    write_raw(Path("data/raw"), texts)
    write_params()


def read_folder(tokens: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(tokens.iterdir())}


def joined(folder: dict[str, bytes], split: str) -> bytes:
    """What `cat SPLIT_*.bin` prints."""
    return b"".join(data for name, data in folder.items() if name.startswith(f"{split}_"))


def stage_params(**changes: Any) -> StageParams:
    """The tokenize stage's parameters."""
    values = {
        "dataset_share": None,
        "tokenizer": "bpe",
        "vocab_size": VOCAB_SIZE,
        "token_cap": PLENTY,
        "val_fraction": VAL_FRACTION,
        "split_seed": SEED,
    }
    return StageParams("tokenize", {**values, **changes})


@dataclass
class Corpus:
    """What should come out: of each split the ids, and the numbers and end of each document; and the remarks."""

    ids: dict[str, list[int]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    numbers: dict[str, list[int]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    ends: dict[str, list[int]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    remarks: Counter[str] = field(default_factory=Counter)

    def as_bytes(self, split: str) -> bytes:
        return np.array(self.ids[split], "<u2").tobytes()


def plain_loop(tokenizer: tiktoken.Encoding, texts: Sequence[str | None], token_cap: int = PLENTY) -> Corpus:
    """One document after the other, until the training documents hold `token_cap` tokens."""
    corpus = Corpus()
    for number, text in enumerate(texts):
        if len(corpus.ids["train"]) >= token_cap:
            break
        if not text:
            corpus.remarks["empty_documents"] += 1
            continue
        corpus.remarks["documents_with_end_of_text"] += END_OF_TEXT in text
        split = "val" if is_val(number, SEED, VAL_FRACTION) else "train"
        corpus.ids[split] += [*tokenizer.encode_ordinary(text), tokenizer.eot_token]
        corpus.numbers[split].append(number)
        corpus.ends[split].append(len(corpus.ids[split]))
    return corpus


def small_shards(shard_tokens: int) -> type[ShardWriter]:
    """A writer of short shards, for the one of encore/tokens/parts.py."""

    class SmallShards(ShardWriter):
        def __init__(self, folder: Path, split: str, dtype: np.dtype) -> None:
            super().__init__(folder, split, dtype, shard_tokens)

    return SmallShards


def ids_of(parts: list[EncodedPart]) -> dict[str, list[int]]:
    """The uint16 ids of both splits, after their shards are compared with what the parts say of them."""
    ids: dict[str, list[int]] = {split: [] for split in SPLITS}
    for part in parts:
        for split in SPLITS:
            for shard in part.shards[split]:
                data = (part.folder / shard.name).read_bytes()
                assert (len(data), sha256(data).hexdigest()) == (2 * shard.tokens, shard.sha256)
                ids[split] += np.frombuffer(data, "<u2").tolist()
    return ids


def total(parts: list[EncodedPart], split: str, what: str) -> int:
    """The sum of something that shards count."""
    return sum(getattr(shard, what) for part in parts for shard in part.shards[split])


def check_parts(parts: list[EncodedPart], texts: Sequence[str | None], expected: Corpus) -> None:
    """Ids, documents, bytes of text and remarks of some parts are the plain loop's."""
    assert ids_of(parts) == expected.ids
    for split in SPLITS:
        assert total(parts, split, "documents") == len(expected.numbers[split])
        assert total(parts, split, "text_bytes") == sum(len(texts[n].encode()) for n in expected.numbers[split])
    for rule in RULES:
        assert sum(part.remarks[rule] for part in parts) == expected.remarks[rule]
