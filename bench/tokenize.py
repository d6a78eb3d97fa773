"""How fast text becomes tokens: the tokenize stage against bare tiktoken and against a nanoGPT-style preparation.

    python -m bench.tokenize FOLDER [RUNS]      the two ratios, for the parquet files (column `text`) in FOLDER
    python -m bench.tokenize FOLDER --memory    peak memory and time for 1, 4, 16 times FOLDER and a 100 MB document

Wants GPT-2's ranks where tiktoken finds them (TIKTOKEN_CACHE_DIR, or the network), and `pip install datasets` for the
nanoGPT-style side. All sides work on all cores, in turn, in one run.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken

from encore.download.raw_folder import RawFile
from encore.files import sha256_of
from encore.json_files import write_sealed
from encore.tokens.encode import count_workers
from encore.tokens.ranks import write_ranks

ROOT = Path(__file__).parent.parent
RUNS = 5
DOCUMENT_BYTES = 100_000_000
# The stage in a process of its own. Prints the seconds without start-up, and its peak memory, which is not getrusage's:
# that begins with the memory of the process that started this one. Start-up is imports, and to load the parameters and
# the tokenizer, whose time is taken afterwards: bare tiktoken's clock starts behind these too.
STAGE = """
import json, re, time
from pathlib import Path
from encore.params import load_params
from encore.tokens.ranks import read_ranks
from encore.tokens.tokenizer import make_tokenizer
from stages import tokenize
started = time.perf_counter()
tokenize.main()
ended = time.perf_counter()
load_params("tokenize")
make_tokenizer(read_ranks(Path("data/raw/gpt2.tiktoken")))
seconds = (ended - started) - (time.perf_counter() - ended)
print(json.dumps([seconds, int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024]))
"""
# What nanoGPT's users run: a map over the documents with a process for each core, then a pass over all that came out,
# in 1,024 slices, into a memory map.
NANOGPT_STYLE = """
import sys
import numpy as np
import tiktoken
from datasets import load_dataset

encoding = tiktoken.get_encoding("r50k_base")

def encode(row):
    ids = encoding.encode_ordinary(row["text"])
    ids.append(encoding.eot_token)
    return {"ids": ids, "len": len(ids)}

if __name__ == "__main__":
    folder, cache, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
    rows = load_dataset("parquet", data_files=folder + "/*.parquet", split="train", cache_dir=cache, num_proc=workers)
    splits = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    encoded = splits.map(encode, remove_columns=rows.column_names, num_proc=workers)
    for name, split in encoded.items():
        total = int(np.sum(split["len"], dtype=np.uint64))
        tokens = np.memmap(f"{cache}/{name}.bin", dtype=np.uint16, mode="w+", shape=(total,))
        place, slices = 0, min(1024, len(split))
        for index in range(slices):
            batch = split.shard(num_shards=slices, index=index, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            tokens[place : place + len(ids)] = ids
            place += len(ids)
        tokens.flush()
    print(sum(int(np.sum(split["len"], dtype=np.uint64)) for split in encoded.values()))
"""


def prepare(folder: Path, files: list[Path]) -> None:
    """A place where the stage runs on `files`: its page of parameters and data/raw, as the download stage leaves it."""
    raw = folder / "data/raw"
    raw.mkdir(parents=True)
    listed = []
    for number, file in enumerate(files):
        path = raw / f"{number:05d}.parquet"
        path.symlink_to(file)
        listed.append(asdict(RawFile(path.name, file.name, file.stat().st_size, sha256_of(file), documents=0)))
    ranks = raw / "gpt2.tiktoken"
    ranks.write_bytes(write_ranks(tiktoken.get_encoding("r50k_base")._mergeable_ranks))
    tokenizer = {"name": ranks.name, "sha256": sha256_of(ranks)}
    source = {
        "name": None,
        "dataset": f"files:{files[0].parent}/*.parquet",
        "dataset_revision": "0" * 64,
        "licence": None,
        "text_column": "text",
        "source_files": len(files),
        "whole_source": True,
        "text_bytes": 0,
        "repaired_documents": 0,
        "files": listed,
    }
    write_sealed(raw / "manifest.json", {"sources": [source], "text_bytes_per_token": 4.5, "tokenizer": tokenizer})
    page = (ROOT / "presets/gpt2-owt-4b.yaml").read_text()
    (folder / "params.yaml").write_text(page.replace("4_000_000_000", "1_000_000_000_000"))
    shutil.copy(ROOT / "dvc.yaml", folder)


def run_stage(folder: Path) -> tuple[float, float, int, int]:
    """Seconds with and without start-up, peak bytes of memory, and tokens."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = subprocess.run(
        [sys.executable, "-c", STAGE], cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout
    whole_seconds = time.perf_counter() - started
    seconds, peak_bytes = json.loads(output.splitlines()[-1])
    manifest = json.loads((folder / "data/tokens/manifest.json").read_text())
    tokens = sum(shard["tokens"] for split in manifest["shards"].values() for shard in split)
    return whole_seconds, seconds, peak_bytes, tokens


def run_nanogpt_style(folder: Path, workers: int) -> tuple[float, int]:
    """Seconds with start-up, and tokens."""
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        script = Path(cache) / "prepare.py"
        script.write_text(NANOGPT_STYLE)
        output = subprocess.run(
            [sys.executable, str(script), str(folder), cache, str(workers)],
            env={**os.environ, "HF_HOME": cache, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return time.perf_counter() - started, int(output.splitlines()[-1])


def read_texts(files: list[Path]) -> list[str]:
    return [text for file in files for text in pq.read_table(file)["text"].to_pylist()]


def encode_share(files: list[Path], worker: int, workers: int, barrier: Barrier) -> None:
    """Every so many-th document, into arrays and then into lists; between barriers, so that all do the same at once."""
    encoding = tiktoken.get_encoding("r50k_base")
    texts = read_texts(files)[worker::workers]
    for encode in (lambda text: encoding.encode_to_numpy(text, disallowed_special=()), encoding.encode_ordinary):
        barrier.wait()
        for text in texts:
            encode(text)
        barrier.wait()


def run_bare(files: list[Path], texts: list[str], workers: int) -> tuple[float, float, float]:
    """Seconds for tiktoken alone, with the texts in memory: into arrays and into lists with a process a core, and
    into lists with its own threads."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers + 1)
    shares = [(files, worker, workers, barrier) for worker in range(workers)]
    processes = [context.Process(target=encode_share, args=share) for share in shares]
    for process in processes:
        process.start()
    seconds = []
    for _ in range(2):
        barrier.wait()
        started = time.perf_counter()
        barrier.wait()
        seconds.append(time.perf_counter() - started)
    for process in processes:
        process.join()
    started = time.perf_counter()
    tiktoken.get_encoding("r50k_base").encode_ordinary_batch(texts, num_threads=workers)
    return seconds[0], seconds[1], time.perf_counter() - started


def measure_speed(source: Path, runs: int) -> None:
    files = sorted(source.glob("*.parquet"))
    texts = read_texts(files)
    text_bytes = sum(len(text.encode()) for text in texts)
    workers = count_workers()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), files)
        for _ in range(runs + 1):
            whole_seconds, seconds, _, tokens = run_stage(Path(folder))
            bare = run_bare(files, texts, workers)
            nano_seconds, nano_tokens = run_nanogpt_style(source, workers)
            assert tokens == nano_tokens, (tokens, nano_tokens)
            rows.append((whole_seconds, seconds, nano_seconds, *bare))
    rows = rows[1:]  # the first fills the disk's cache
    whole, ours, nano, arrays, lists, threads = (statistics.median(column) for column in zip(*rows, strict=True))
    to_nano = statistics.median(row[2] / row[0] for row in rows)
    print(f"{text_bytes / 1e6:.1f} MB, {tokens:,} tokens, {workers} cores, medians of {runs}:")
    for seconds, how in (
        (arrays, "a process a core, encode_to_numpy"),
        (lists, "a process a core, encode_ordinary"),
        (threads, "encode_ordinary_batch"),
    ):
        print(f"  bare tiktoken         {seconds:6.2f} s  {tokens / seconds / 1e6:5.1f} M tokens/s  {how}")
    print(f"  tokenize stage        {ours:6.2f} s  {tokens / ours / 1e6:5.1f} M tokens/s  without start-up")
    print(f"                        {whole:6.2f} s  {tokens / whole / 1e6:5.1f} M tokens/s  with start-up")
    print(f"  nanoGPT-style prepare {nano:6.2f} s  {tokens / nano / 1e6:5.1f} M tokens/s  with start-up")
    for column, how in ((3, "into arrays"), (4, "into lists"), (5, "by its own threads")):
        to_bare = statistics.median(row[column] / row[1] for row in rows)
        print(f"speed of the stage over bare tiktoken {how}, without start-up: {to_bare:.2f}")
    print(f"speed of the stage over the nanoGPT-style prepare, with start-up: {to_nano:.2f}")


def write_long_document(files: list[Path], path: Path) -> None:
    """A file with a document of DOCUMENT_BYTES among others, all of one row group."""
    texts = read_texts(files)
    text = "\n\n".join(texts)
    while len(text.encode()) < DOCUMENT_BYTES:
        text += "\n\n" + text
    pq.write_table(pa.table({"text": [*texts[:50], text[:DOCUMENT_BYTES], *texts[50:100]]}), path, compression="zstd")


def measure_memory(source: Path) -> None:
    files = sorted(source.glob("*.parquet"))
    for times in (1, 4, 16):
        with tempfile.TemporaryDirectory() as folder:
            long = Path(folder) / "long.parquet"
            write_long_document(files, long)
            prepare(Path(folder) / "run", [*files, long] * times)
            _, seconds, peak_bytes, tokens = run_stage(Path(folder) / "run")
        rate = tokens / seconds / 1e6
        print(f"{times:2d}x: {tokens:11,} tokens, {seconds:6.1f} s, {rate:.1f} M/s, peak {peak_bytes / 1e6:,.0f} MB")


def main() -> None:
    if len(sys.argv) not in (2, 3) or not Path(sys.argv[1]).is_dir():
        raise SystemExit(__doc__)
    source = Path(sys.argv[1]).resolve()
    if sys.argv[2:] == ["--memory"]:
        measure_memory(source)
    else:
        measure_speed(source, int(sys.argv[2]) if sys.argv[2:] else RUNS)


if __name__ == "__main__":
    main()
