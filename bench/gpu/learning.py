"""What recipes reach in a few minutes at GPT-2 124M's depth and width, each with a whole schedule of its own.

GPT-2 by AdamW at three rates, and nanochat's two models by Muon in a quarter and a sixth of its steps, at the rates
that `auto` would have if it were allowed at this size.
"""

import os
from pathlib import Path

import numpy as np

from bench.gpu.pages import Page, gpt2, make_tokens, nanochat, nanochat_plus, print_head, print_row
from bench.gpu.step import Job
from bench.token_folder import about
from encore.files import write_whole
from encore.muon_rates import find_rates, measure
from encore.tokens.ranks import write_ranks
from encore.tokens.token_files import MANIFEST, RANKS_FILE, SPLITS, ShardWriter, read_manifest, write_manifest

ITERATIONS, TINY_ITERATIONS, BATCH_SIZE = 720, 36, 16
RATES = (6e-4, 1e-3, 2e-3)
SHARES = (4, 6)
DOCUMENTS_A_VAL = 50  # every so many documents one is held out
TEXT, TOKENS = "ENGLISH_TEXT_DIR", Path("data/tokens")


def run(folder: Path, tiny: bool, nanogpt: Path | None) -> None:
    """One training at a time; the next ones compile meanwhile, or find what the first of their model has compiled."""
    tokens = make_tokens(folder / "tokens", tiny) if tiny else find_text(folder / "tokens")
    iterations = TINY_ITERATIONS if tiny else ITERATIONS
    rates, shares = (RATES[:1], SHARES[:1]) if tiny else (RATES, SHARES)
    common: Page = {"batch_size": BATCH_SIZE, "gradient_accumulation_steps": 1}
    adamw = {"max_iters": iterations, "warmup_iters": iterations // 10}
    recipes = {
        "GPT-2": [gpt2(tiny, **common, **adamw, learning_rate=rate, min_lr=rate / 10) for rate in rates],
        "nanochat-plus": [
            with_rates(nanochat_plus(tiny, **common, max_iters=iterations // share), tokens) for share in shares
        ],
        "nanochat": [with_rates(nanochat(tiny, **common, max_iters=iterations // share), tokens) for share in shares],
    }
    firsts = {name: Job.start(folder / name, pages[0], tokens, "train") for name, pages in recipes.items()}
    print_head("model", "by", "learning rate", "iterations", "minutes", "val loss, whole split")
    failed = 0
    for name, pages in recipes.items():
        job = firsts[name]
        for number, page in enumerate(pages, start=1):
            job.wait_until_ready()
            upcoming = pages[number : number + 1]
            following = [Job.start(folder / f"{name}-{number}", each, tokens, "train") for each in upcoming]
            result = job.do()
            failed += not result
            told = (f"{result['seconds'] / 60:.2f}", f"{result['loss']:.4f}") if result else ("", "failed")
            print_row(name, page["optimizer"], page["learning_rate"], page["max_iters"], *told)
            job = following[0] if following else job
    if failed:
        raise SystemExit(f"bench: {failed} trainings failed")


def with_rates(page: Page, tokens: Path) -> Page:
    """The page with the rule's rates, though it was found with smaller models."""
    return {**page, **find_rates(measure(page, read_manifest(tokens)["vocab_size"]))}


def find_text(folder: Path) -> Path:
    """Tokens of real text in GPT-2's ids."""
    if TEXT in os.environ:
        encode_folder(Path(os.environ[TEXT]), folder)
        return folder
    if not (TOKENS / MANIFEST).exists():
        raise SystemExit(f"bench: no text: set {TEXT} to a folder of parquet files with a column `text`")
    if read_manifest(TOKENS)["vocab_size"] < 50_257:
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
        shards[split] = writer.finish()
    write_manifest(
        folder,
        tokenizer.n_vocab,
        shards,
        about("files:english", "gpt2", shards),
    )
