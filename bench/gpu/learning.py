"""What recipes reach in a few minutes at GPT-2 124M's depth and width, each with a whole schedule of its own.

GPT-2 by AdamW at three rates, and nanochat's two models by Muon in a quarter and a sixth of its steps.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from bench.gpu.pages import Page, gpt2, make_tokens, nanochat, nanochat_plus, print_head, print_row
from encore.files import read_json, sha256_of, write_json, write_whole
from encore.ranks import write_ranks
from encore.token_files import MANIFEST, RANKS_FILE, SPLITS, ShardWriter, shards_as_json

ITERATIONS, BATCH_SIZE = 720, 16
RATES = (6e-4, 1e-3, 2e-3)
SHARES = (4, 6)
DOCUMENTS_A_VAL = 50  # every so many documents one is held out
TEXT, TOKENS = "ENGLISH_TEXT_DIR", Path("data/tokens")


def run(folder: Path, tiny: bool, nanogpt: Path | None) -> None:
    """The recipes of a model share a process, which compiles once; the models take turns."""
    tokens = make_tokens(folder / "tokens", tiny) if tiny else find_text(folder / "tokens")
    iterations = 12 if tiny else ITERATIONS
    common: Page = {"batch_size": BATCH_SIZE, "gradient_accumulation_steps": 1}
    adamw = {"max_iters": iterations, "warmup_iters": iterations // 10}
    recipes = {
        "GPT-2": [gpt2(tiny, **common, **adamw, learning_rate=rate, min_lr=rate / 10) for rate in RATES],
        "nanochat-plus": [nanochat_plus(tiny, **common, max_iters=iterations // share) for share in SHARES],
        "nanochat": [nanochat(tiny, **common, max_iters=iterations // share) for share in SHARES],
    }
    processes = {name: start(folder / name, pages, tokens) for name, pages in recipes.items()}
    print_head("model", "by", "learning rate", "iterations", "minutes", "val loss, whole split")
    missing = 0
    for name, pages in recipes.items():
        process = processes[name]
        assert process.stdin is not None
        assert process.stdout is not None
        ready = any(line == "ready\n" for line in process.stdout)
        if ready:
            process.stdin.write("go\n")
            process.stdin.flush()
        results = (json.loads(line) for line in process.stdout if line.startswith("{"))
        for page, result in zip(pages, results, strict=False):
            minutes, loss = f"{result['seconds'] / 60:.2f}", f"{result['loss']:.4f}"
            print_row(name, page["optimizer"], page["learning_rate"], page["max_iters"], minutes, loss)
            missing -= 1
        missing += len(pages)
        process.wait()
    if missing:
        raise SystemExit(f"bench: {missing} trainings failed")


def start(folder: Path, pages: list[Page], tokens: Path) -> subprocess.Popen[str]:
    """Begins to compile."""
    (folder / "data").mkdir(parents=True)
    (folder / "data/tokens").symlink_to(tokens)
    (folder / "pages.json").write_text(json.dumps(pages))
    command = [sys.executable, "-m", "bench.gpu.recipes", "pages.json"]
    return subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def find_text(folder: Path) -> Path:
    """Tokens of real text in GPT-2's ids."""
    if TEXT in os.environ:
        encode_folder(Path(os.environ[TEXT]), folder)
        return folder
    if not (TOKENS / MANIFEST).exists():
        raise SystemExit(f"bench: no text: set {TEXT} to a folder of parquet files with a column `text`")
    if read_json(TOKENS / MANIFEST)["vocab_size"] < 50_257:
        print(f"The tokens of {TOKENS} are not in GPT-2's ids: losses do not compare with others'.\n")
    return TOKENS.resolve()


def encode_folder(texts: Path, folder: Path) -> None:
    """Parquet files as a token folder; every so many documents one is in val."""
    import tiktoken
    from pyarrow import parquet

    documents = [
        text for path in sorted(texts.glob("*.parquet")) for text in parquet.read_table(path)["text"].to_pylist()
    ]
    if not documents:
        raise SystemExit(f"bench: {TEXT}={texts} holds no parquet files")
    tokenizer = tiktoken.get_encoding("gpt2")
    encoded = [np.array([*ids, tokenizer.eot_token], dtype="<u2") for ids in tokenizer.encode_ordinary_batch(documents)]
    folder.mkdir(parents=True)
    write_whole(folder / RANKS_FILE, write_ranks(tokenizer._mergeable_ranks))
    numbers = np.arange(len(documents))
    shards = {}
    for split, mine in zip(SPLITS, (numbers % DOCUMENTS_A_VAL > 0, numbers % DOCUMENTS_A_VAL == 0), strict=True):
        parts = [encoded[i] for i in numbers[mine]]
        text_bytes = np.array([len(documents[i].encode()) for i in numbers[mine]])
        writer = ShardWriter(folder, split, np.dtype("<u2"))
        writer.add(np.concatenate(parts), np.array([len(part) for part in parts]), text_bytes)
        shards[split] = shards_as_json(writer.finish())
    manifest = {
        "dataset": "files:english",
        "dataset_revision": "0" * 64,
        "licence": None,
        "tokenizer": "gpt2",
        "dtype": "uint16",
        "vocab_size": tokenizer.n_vocab,
        "tokenizer_sha256": sha256_of(folder / RANKS_FILE),
        "shards": shards,
    }
    write_json(folder / MANIFEST, manifest)
