"""Tokenizes the corpus until `token_cap` training tokens are written, in shards, the held-out documents beside them."""

if not __package__:
    # From inside stages/ this file would stand in the way of the standard library's tokenize.
    raise SystemExit("encore: run this stage from the repository's root: python -m stages.tokenize")

from pathlib import Path

from encore.code import check_code
from encore.errors import EncoreError, run_stage
from encore.files import whole_folder, write_whole
from encore.params import StageParams, load_params
from encore.pipeline.stage_history import record_stage
from encore.progress import Progress
from encore.scratch import scratch_folder
from encore.tokens.documents import check_raw
from encore.tokens.encode import RULES, count_workers
from encore.tokens.parts import EncodedPart, PartStore, merge
from encore.tokens.token_files import MANIFEST, RANKS_FILE, Shard, write_manifest
from stages import STARTED

RAW = Path("data/raw")
TOKENS = Path("data/tokens")


def main() -> None:
    check_code("tokenize")
    params = load_params("tokenize")
    workers = count_workers()
    raw = check_raw(RAW, workers)
    store = PartStore(RAW, raw, params, scratch_folder())
    check_several(sum(group.documents for group in store.groups))

    with store.merging(), whole_folder(TOKENS) as folder:
        parts = encode(store, params.token_cap, workers)
        write_whole(folder / RANKS_FILE, store.ranks_path.read_bytes())
        shards = merge(parts, folder)
        check_splits(shards, params)
        about = {
            "dataset": raw["dataset"],
            "dataset_revision": raw["dataset_revision"],
            "licence": raw["licence"],
            "tokenizer": params.tokenizer,
            "token_cap": params.token_cap,
            "cap_reached": parts[-1].stopped_at is not None,
            "whole_source": raw["whole_source"],
            "text_bytes_per_token": raw["text_bytes_per_token"],
            **{rule: sum(part.remarks[rule] for part in parts) for rule in RULES},
        }
        write_manifest(folder, store.vocab_size, shards, about)
    for split, of_split in shards.items():
        tokens, documents = (sum(getattr(shard, what) for shard in of_split) for what in ("tokens", "documents"))
        shards_word = "shard" if len(of_split) == 1 else "shards"
        print(f"{split}: {tokens:,} tokens of {documents:,} documents in {len(of_split)} {shards_word}")
    record_stage("tokenize", TOKENS / MANIFEST, STARTED)


def encode(store: PartStore, token_cap: int, workers: int) -> list[EncodedPart]:
    """The parts in order, until `token_cap` is met by the first training document that ends at or behind it."""
    finished = sum(map(store.is_finished, range(len(store.parts))))
    if finished:
        print(f"encore: note: {finished} of {len(store.parts)} parts are in {store.folder} already")
    parts: list[EncodedPart] = []
    _ = store.ranks  # learned before the bar begins, whose rate is that of encoding
    with Progress("tokenize", token_cap, "tokens") as progress:
        missing_tokens = token_cap
        for index in range(len(store.parts)):
            parts.append(store.bring(index, missing_tokens, workers, progress.add))
            missing_tokens -= parts[-1].train_tokens
            if parts[-1].stopped_at is not None:
                break
    return parts


def check_several(documents: int) -> None:
    """Raises EncoreError where there are too few documents for two splits, whatever val_fraction is."""
    if documents < 2:
        raise EncoreError(
            "dataset: the corpus is a single document, and one is never shared between train and val; a .txt is one "
            "document, so split it into several files, or write a .jsonl, of which each line is one"
        )


def check_splits(shards: dict[str, list[Shard]], params: StageParams) -> None:
    """Raises EncoreError where a split came out empty."""
    for split, of_split in shards.items():
        if not of_split:
            raise EncoreError(
                f"no document fell into the {split} split; change val_fraction ({params.val_fraction}) "
                f"or split_seed ({params.split_seed}), or give more documents"
            )


if __name__ == "__main__":
    run_stage(main)
