"""Brings the text of each source to data/raw as parquet files, with the published tokenizer where that is wanted.

What it brings is the same, byte by byte, on every machine.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from encore.code import check_code
from encore.download.sources import Wanted, fetch, fetch_gpt2_ranks
from encore.download.stopping import run_download
from encore.files import sha256_of, whole_folder
from encore.json_files import write_sealed
from encore.mixture import Source, list_sources
from encore.params import StageParams, load_params
from encore.pipeline.experiment_copy import check_copied
from encore.pipeline.stage_history import record_stage
from encore.progress import as_size
from encore.scratch import scratch_folder
from stages import STARTED

RAW = Path("data/raw")
MANIFEST = "manifest.json"
# How much text is fetched for a token. A GPT-2 token holds 4.40 bytes of OpenWebText on average; the rest is margin,
# since too little would end the corpus before token_cap. Pairs that are learned from the corpus itself can hold more,
# and how much is known only once they are learned.
TEXT_BYTES_PER_TOKEN = {"gpt2": 4.40 * 1.02, "bpe": 6.0}


def main() -> None:
    check_code("download")
    params = load_params("download")
    sources = list_sources(params)
    for source in sources:
        check_copied(dataset=source.dataset)

    with whole_folder(RAW) as folder:
        tokenizer = None
        if params.tokenizer == "gpt2":
            ranks = fetch_gpt2_ranks(folder, scratch_folder())
            tokenizer = {"name": ranks.name, "sha256": sha256_of(ranks)}
        fetched: list[dict[str, Any]] = []
        for source in sources:
            first_number = sum(len(entry["files"]) for entry in fetched)
            fetched.append(fetch_source(source, params, folder, first_number))
        write_sealed(
            folder / MANIFEST,
            {
                "sources": fetched,
                "text_bytes_per_token": TEXT_BYTES_PER_TOKEN[params.tokenizer],
                "tokenizer": tokenizer,
            },
        )
    record_stage("download", RAW / MANIFEST, STARTED)


def fetch_source(source: Source, params: StageParams, folder: Path, first_number: int) -> dict[str, Any]:
    """Brings as much text of a source as its part of token_cap needs. Returns the manifest's entry for it."""
    tokens = source.token_cap / (1 - params.val_fraction)
    text_bytes = int(tokens * TEXT_BYTES_PER_TOKEN[params.tokenizer])
    wanted = Wanted(source.text_column, text_bytes, params.shard_order, params.split_seed)
    raw = fetch(source.dataset, source.revision, wanted, folder, scratch_folder(), first_number)
    documents = sum(file.documents for file in raw.files)
    rest = "all of it" if raw.whole_source else "as much as token_cap needs"
    print(f"{source.dataset}: {documents:,} documents, {as_size(raw.text_bytes)} of text in {RAW}, {rest}")
    return {
        "name": source.name,
        "dataset": source.dataset,
        "dataset_revision": source.revision,
        "licence": raw.licence,
        "text_column": source.text_column,
        "source_files": raw.source_files,
        "whole_source": raw.whole_source,
        "text_bytes": raw.text_bytes,
        "repaired_documents": raw.repaired_documents,
        "files": [asdict(file) for file in raw.files],
    }


if __name__ == "__main__":
    run_download(main)
