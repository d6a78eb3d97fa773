"""What the manifest of a made-up token folder says beside its bytes."""

from typing import Any

from encore.tokens.encode import RULES
from encore.tokens.token_files import Shard, sum_up


def about(dataset: str, tokenizer: str, shards: dict[str, list[Shard]]) -> dict[str, Any]:
    """For `encore.tokens.token_files.write_manifest`."""
    splits = {split: sum_up(of_split) for split, of_split in shards.items()}
    source = {
        "name": None,
        "dataset": dataset,
        "dataset_revision": "0" * 64,
        "licence": None,
        "whole_source": True,
        "token_cap": splits["train"]["tokens"],
        "cap_reached": True,
        **dict.fromkeys(RULES, 0),
        "splits": splits,
    }
    return {"sources": [source], "tokenizer": tokenizer, "text_bytes_per_token": 4.4}
