"""Brings the text of `dataset` to data/raw as parquet files, with the published tokenizer where that is wanted, and the
weights of `init_from` to data/init, and the data of `evaluate_tasks` to data/tasks.

The only stage that uses the network. What it brings is the same, byte by byte, on every machine.
"""

import signal
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from encore.code import check_code
from encore.download.sources import Wanted, fetch, fetch_gpt2_ranks
from encore.errors import Interrupted, run_stage
from encore.evaluation.tasks import fetch_tasks
from encore.files import sha256_of, whole_folder
from encore.json_files import write_sealed
from encore.params import load_params
from encore.pipeline.experiment_copy import check_copied
from encore.pipeline.stage_history import record_stage
from encore.pretrained.initial_weights import fetch_initial
from encore.scratch import scratch_folder
from stages import STARTED

INIT = Path("data/init")
RAW = Path("data/raw")
TASKS = Path("data/tasks")
MANIFEST = "manifest.json"
# How much text is fetched for a token. A GPT-2 token holds 4.40 bytes of OpenWebText on average; the rest is margin,
# since too little would end the corpus before token_cap. Pairs that are learned from the corpus itself can hold more,
# and how much is known only once they are learned.
TEXT_BYTES_PER_TOKEN = {"gpt2": 4.40 * 1.02, "bpe": 6.0}


def main() -> None:
    check_code("download")
    params = load_params("download")
    check_copied(params.dataset, params.init_from)
    tokens = params.token_cap / (1 - params.val_fraction)
    text_bytes_per_token = TEXT_BYTES_PER_TOKEN[params.tokenizer]
    wanted = Wanted(params.text_column, int(tokens * text_bytes_per_token), params.shard_order, params.split_seed)

    with whole_folder(INIT) as folder:
        fetch_initial(params.init_from, folder, scratch_folder())
    with whole_folder(TASKS) as folder:
        fetch_tasks(params.evaluate_tasks, folder)
    with whole_folder(RAW) as folder:
        tokenizer = None
        if params.tokenizer == "gpt2":
            ranks = fetch_gpt2_ranks(folder, scratch_folder())
            tokenizer = {"name": ranks.name, "sha256": sha256_of(ranks)}
        raw = fetch(params.dataset, params.dataset_revision, wanted, folder, scratch_folder())
        write_sealed(
            folder / MANIFEST,
            {
                "dataset": params.dataset,
                "dataset_revision": params.dataset_revision,
                "licence": raw.licence,
                "text_column": params.text_column,
                "source_files": raw.source_files,
                "whole_source": raw.whole_source,
                "text_bytes": raw.text_bytes,
                "text_bytes_per_token": text_bytes_per_token,
                "repaired_documents": raw.repaired_documents,
                "files": [asdict(file) for file in raw.files],
                "tokenizer": tokenizer,
            },
        )

    count = "1 file" if len(raw.files) == 1 else f"{len(raw.files)} files"
    documents = sum(file.documents for file in raw.files)
    megabytes = sum(file.bytes for file in raw.files) / 1e6
    print(f"{params.dataset}: {count}, {documents:,} documents, {megabytes:,.1f} MB in {RAW}")
    record_stage("download", RAW / MANIFEST, STARTED)


def stop(number: int, frame: FrameType | None) -> None:
    """Ends the stage in order: the unfinished data/raw goes, and what was downloaded stays."""
    signal.signal(number, signal.SIG_DFL)
    name = signal.Signals(number).name
    raise Interrupted(number, f"stopped by {name}; what is downloaded is kept, run the same command to go on")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup lets it be ignored
        signal.signal(signal.SIGHUP, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs in the background ignore it
    run_stage(main)
