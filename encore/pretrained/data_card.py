"""README.md of uploaded data/tokens, in the form that the Hugging Face Hub shows as a card.

It is made for the upload and is no file of data/tokens, whose bytes stay those of the pipeline.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from encore.pretrained.markup import as_markdown, as_markdown_code
from encore.pretrained.model_card import HUB_LICENCES, as_yaml, hub_repository
from encore.schemas import ShardEntry, TokenManifest, TokenSource
from encore.tokens.token_files import RANKS_FILE, SPLITS, read_manifest
from encore.tokens.tokenizer import END_OF_TEXT, GPT2_PATTERN

# The Hub's names for how many rows there are, by the power of ten that they do not reach.
SIZES = {3: "n<1K", 4: "1K<n<10K", 5: "10K<n<100K", 6: "100K<n<1M", 7: "1M<n<10M", 8: "10M<n<100M", 9: "100M<n<1B"}
LARGEST = "1B<n<10B"
USE = f"""\
import base64
from pathlib import Path
import numpy as np
import tiktoken

tokens = np.memmap("train_00000.bin", dtype="DTYPE", mode="r")
lines = [line.split() for line in Path("{RANKS_FILE}").read_bytes().splitlines()]
ranks = {{base64.b64decode(token): int(rank) for token, rank in lines}}
pattern = r"{GPT2_PATTERN}"
encoding = tiktoken.Encoding(
    "data", pat_str=pattern, mergeable_ranks=ranks, special_tokens={{"{END_OF_TEXT}": len(ranks)}}
)
print(encoding.decode(tokens[:100].tolist()))
"""


def describe_folder(folder: Path) -> bytes:
    """The card of a token folder. Raises EncoreError where its manifest is missing or damaged."""
    return describe(read_manifest(folder)).encode()


def describe(manifest: TokenManifest) -> str:
    """The card of the tokens that a manifest describes."""
    sources, shards, dtype = manifest["sources"], manifest["shards"], np.dtype(manifest["dtype"])
    tokenizer, vocab_size = as_markdown_code(manifest["tokenizer"]), manifest["vocab_size"]
    token_cap = sum(source["token_cap"] for source in sources)
    documents = sum(shard["documents"] for split in SPLITS for shard in shards[split])
    tokens = sum(shard["tokens"] for split in SPLITS for shard in shards[split])
    lines = [
        "---",
        as_yaml(_describe_for_hub(sources, documents)).removesuffix("\n"),
        "---",
        "",
        "# Tokens made with Encore",
        "",
        f"{tokens:,} tokens of {documents:,} documents. They can be turned back into the text, whose licence holds.",
        "",
        "| source | revision | licence | training tokens |",
        "|---|---|---|---|",
        *map(_describe_source, sources),
        "",
        "| split | files | tokens | documents | bytes of text | bytes of tokens |",
        "|---|---|---|---|---|---|",
        *(_describe_split(split, shards[split], dtype) for split in SPLITS),
        "",
        f"- Tokenizer: {tokenizer}, {vocab_size:,} ids. `{RANKS_FILE}` holds its ranks.",
        f"- Files: {dtype.name}, little-endian, without a header; at most 100M tokens in each.",
        f"- Documents: each is followed by the end-of-text token, {vocab_size - 1}. One may go on in the next file.",
        "- `manifest.json` has the sha256 of each file.",
        "",
        "## How to read it",
        "",
        "```python",
        *USE.replace("DTYPE", np.dtype(dtype).newbyteorder("<").str).splitlines(),
        "```",
        "",
        "`encore.TokenWindows` reads the folder as well.",
        "",
        "## How to make it again",
        "",
        "`dvc repro tokenize` in the commit of Encore whose dvc.lock names this folder's hash",
        "(`git log -S HASH -- dvc.lock`) gives the same bytes. `manifest.json` names each source and its revision, the",
        f"tokenizer and `token_cap`, {token_cap:,} here; the commit's params.yaml has the other keys.",
        "",
    ]
    return "\n".join(lines)


def _describe_source(source: TokenSource) -> str:
    licence = as_markdown(source["licence"] or "not named by the source: look there before you use it")
    names = " | ".join(as_markdown_code(source[key]) for key in ("dataset", "dataset_revision"))
    return f"| {names} | {licence} | {source['splits']['train']['tokens']:,} |"


def _describe_for_hub(sources: Sequence[TokenSource], documents: int) -> dict[str, Any]:
    """What the Hub lists and searches data sets by. It has no viewer for files of integers."""
    licences = [(source["licence"] or "").lower() for source in sources]
    known = list(dict.fromkeys(licences)) if HUB_LICENCES.issuperset(licences) else []
    repositories = list(dict.fromkeys(filter(None, map(hub_repository, sources))))
    return {
        **({"license": known[0] if len(known) == 1 else known} if known else {}),
        "task_categories": ["text-generation"],
        "tags": ["encore", "tokens"],
        "size_categories": [SIZES.get(max(3, math.floor(math.log10(max(1, documents))) + 1), LARGEST)],
        **({"source_datasets": repositories} if repositories else {}),
        "viewer": False,
    }


def _describe_split(split: str, shards: Sequence[ShardEntry], dtype: np.dtype) -> str:
    tokens = sum(shard["tokens"] for shard in shards)
    documents = sum(shard["documents"] for shard in shards)
    text_bytes = sum(shard["text_bytes"] for shard in shards)
    cells = (len(shards), tokens, documents, text_bytes, tokens * dtype.itemsize)
    return " | ".join([f"| {split}", *(f"{cell:,}" for cell in cells)]) + " |"
