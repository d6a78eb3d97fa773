"""The tokenizer of model/ as transformers' AutoTokenizer reads it: the same ids as tiktoken's from the same ranks."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from encore.files import write_json
from encore.tokens.ranks import spell

END_OF_TEXT = "<|endoftext|>"


def save_hub_tokenizer(folder: Path, ranks: dict[bytes, int], block_size: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json beside a model of that context."""
    write_json(folder / "tokenizer.json", describe(ranks))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "model_max_length": block_size,
        },
    )


def describe(ranks: dict[bytes, int]) -> dict[str, Any]:
    """The `tokenizers` library's description of a byte-level BPE with GPT-2's pattern."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end_of_text = {
        "id": len(ranks),
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end_of_text],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {**{spell(token): rank for token, rank in ranks.items()}, END_OF_TEXT: len(ranks)},
            "merges": [f"{spell(left)} {spell(right)}" for left, right in find_merges(ranks)],
        },
    }


def find_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs whose merging makes the tokens, in the order of the ranks, which name only the results.

    A token that its own encoding never comes to has none.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = _merge(token, ranks, rank)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _merge(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """What byte-pair encoding makes of a token by merges of ranks below `limit`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        candidates = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        best = min(candidates)
        if best >= limit:
            break
        place = candidates.index(best)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts
