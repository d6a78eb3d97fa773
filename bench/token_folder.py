"""What the manifest of a made-up token folder says beside its bytes."""

from typing import Any

from encore.tokens.encode import RULES


def about(dataset: str, tokenizer: str, token_cap: int) -> dict[str, Any]:
    """For `encore.tokens.token_files.write_manifest`."""
    return {
        "dataset": dataset,
        "dataset_revision": "0" * 64,
        "licence": None,
        "tokenizer": tokenizer,
        "token_cap": token_cap,
        "cap_reached": True,
        "whole_source": True,
        "text_bytes_per_token": 4.4,
        **dict.fromkeys(RULES, 0),
    }
