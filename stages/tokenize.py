"""Tokenizes the corpus until `token_cap` training tokens are written, in shards, the held-out documents beside them.

Of several sources each gives its share of token_cap, and the shards of one follow those of another.
"""

if not __package__:
    # From inside stages/ this file would stand in the way of the standard library's tokenize.
    raise SystemExit("encore: run this stage from the repository's root: python -m stages.tokenize")

from pathlib import Path
from typing import Any

from encore.code import check_code
from encore.errors import EncoreError, run_stage
from encore.files import whole_folder, write_whole
from encore.params import StageParams, load_params
from encore.pipeline.stage_history import record_stage
from encore.progress import Progress
from encore.scratch import scratch_folder
from encore.tokens.documents import check_raw
from encore.tokens.encode import RULES, count_workers
from encore.tokens.parts import EncodedPart, PartStore, SourceParts, merge
from encore.tokens.token_files import MANIFEST, RANKS_FILE, SPLITS, sum_up, write_manifest
from stages import STARTED

RAW = Path("data/raw")
TOKENS = Path("data/tokens")


def main() -> None:
    check_code("tokenize")
    params = load_params("tokenize")
    workers = count_workers()
    raw = check_raw(RAW, workers)
    store = PartStore(RAW, raw, params, scratch_folder())
    for source in store.sources:
        check_several(source)

    with store.merging(), whole_folder(TOKENS) as folder:
        encoded = encode(store, workers)
        for source, parts in zip(store.sources, encoded, strict=True):
            check_splits(source, parts, params)
        write_whole(folder / RANKS_FILE, store.ranks_path.read_bytes())
        shards = merge([part for parts in encoded for part in parts], folder)
        about = {
            "sources": list(map(describe, store.sources, encoded)),
            "tokenizer": params.tokenizer,
            "text_bytes_per_token": raw["text_bytes_per_token"],
        }
        write_manifest(folder, store.vocab_size, shards, about)
    for split, of_split in shards.items():
        tokens, documents = (sum_up(of_split)[what] for what in ("tokens", "documents"))
        shards_word = "shard" if len(of_split) == 1 else "shards"
        print(f"{split}: {tokens:,} tokens of {documents:,} documents in {len(of_split)} {shards_word}")
    record_stage("tokenize", TOKENS / MANIFEST, STARTED)


def encode(store: PartStore, workers: int) -> list[list[EncodedPart]]:
    """The parts of each source in order, until its cap is met by the first training document that ends at or behind
    it."""
    finished = sum(map(store.is_finished, range(len(store.parts))))
    if finished:
        print(f"encore: note: {finished} of {len(store.parts)} parts are in {store.folder} already")
    _ = store.ranks  # learned before the bar begins, whose rate is that of encoding
    encoded = []
    with Progress("tokenize", store.params.token_cap, "tokens") as progress:
        for source in store.sources:
            parts: list[EncodedPart] = []
            missing_tokens = source.token_cap
            for index in source.parts:
                parts.append(store.bring(index, missing_tokens, workers, progress.add))
                missing_tokens -= parts[-1].train_tokens
                if parts[-1].stopped_at is not None:
                    break
            encoded.append(parts)
    return encoded


def describe(source: SourceParts, parts: list[EncodedPart]) -> dict[str, Any]:
    """The manifest's entry for a source."""
    return {
        **{key: source.described[key] for key in ("name", "dataset", "dataset_revision", "licence", "whole_source")},
        "token_cap": source.token_cap,
        "cap_reached": parts[-1].stopped_at is not None,
        **{rule: sum(part.remarks[rule] for part in parts) for rule in RULES},
        "splits": {split: sum_up([shard for part in parts for shard in part.shards[split]]) for split in SPLITS},
    }


def check_several(source: SourceParts) -> None:
    """Raises EncoreError where there are too few documents for two splits, whatever val_fraction is."""
    if source.documents < 2:
        raise EncoreError(
            f"{label(source)}: the corpus is a single document, and one is never shared between train and "
            "val; a .txt is one document, so split it into several files, or write a .jsonl, of which each line is one"
        )


def check_splits(source: SourceParts, parts: list[EncodedPart], params: StageParams) -> None:
    """Raises EncoreError where a split came out empty."""
    for split in SPLITS:
        if not any(part.shards[split] for part in parts):
            of_source = f" of {label(source)}" if source.described["name"] else ""
            raise EncoreError(
                f"no document{of_source} fell into the {split} split; change val_fraction ({params.val_fraction}) "
                f"or split_seed ({params.split_seed}), or give more documents"
            )


def label(source: SourceParts) -> str:
    """The key of params.yaml that names this source."""
    name = source.described["name"]
    return f"dataset.{name}" if name else "dataset"


if __name__ == "__main__":
    run_stage(main)
