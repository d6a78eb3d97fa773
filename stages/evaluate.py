"""Evaluates the trained model: its loss over the whole val split, and samples of what it writes."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from encore.batches import Windows
from encore.device import find_device, find_dtype, set_up_numerics
from encore.errors import run_stage
from encore.evaluation import sum_losses
from encore.export import load_model
from encore.files import write_json, write_whole
from encore.generate import generate
from encore.params import load_params
from encore.progress import Progress
from encore.token_files import RANKS_FILE, TokenSplit
from encore.tokenizer import load_tokenizer

TOKENS = Path("data/tokens")
MODEL = Path("model")
METRICS = Path("metrics/eval.json")
SAMPLES = Path("metrics/samples.md")
Batch = tuple[torch.Tensor, torch.Tensor]
BATCH_TOKENS = 2**13  # how many tokens are evaluated at a time; it does not change the result


def main() -> None:
    params = load_params("evaluate")
    device = find_device()
    dtype = find_dtype(params.dtype, device)
    set_up_numerics(device)
    model = load_model(MODEL).to(device)

    val = TokenSplit(TOKENS, "val")
    windows = Windows(val, model.config.block_size, "val")
    batch_size = max(1, BATCH_TOKENS // model.config.block_size)
    with Progress("evaluate", val.tokens, "tokens") as progress:
        losses = sum_losses(model, watched(windows.every_token(batch_size), progress), device, dtype)
    result = {
        "loss": losses.mean,
        "perplexity": losses.perplexity,
        "bits_per_byte": losses.bits_per_byte(val.text_bytes),
        "tokens": losses.tokens,
    }
    write_json(METRICS, {"eval": result})
    print(f"val loss {losses.mean:.4f} over {losses.tokens:,} tokens, perplexity {losses.perplexity:.2f}")

    tokenizer = load_tokenizer(MODEL / RANKS_FILE)
    # An empty prompt begins where every document begins: behind an end-of-text token.
    prompt = tokenizer.encode_ordinary(params.start) or [tokenizer.eot_token]
    how = (params.max_new_tokens, params.temperature, params.top_k, 1.0, tokenizer.eot_token)
    generator = torch.Generator().manual_seed(params.seed)
    texts = [tokenizer.decode(list(generate(model, prompt, *how, generator))) for _ in range(params.num_samples)]
    write_whole(SAMPLES, as_markdown(params.start, texts).encode())


def watched(batches: Iterable[Batch], progress: Progress) -> Iterator[Batch]:
    """Passes batches of inputs and targets on, and counts the targets of each when it has been worked on."""
    for batch in batches:
        yield batch
        progress.add(batch[1].numel())


def as_markdown(start: str, texts: list[str]) -> str:
    """Each sample, prompt included, in a code block that the text itself cannot end."""
    blocks = [f"## Sample {number}\n\n~~~~~~text\n{start}{text}\n~~~~~~\n" for number, text in enumerate(texts, 1)]
    return "\n".join(["# What the model writes\n", *blocks])


if __name__ == "__main__":
    run_stage(main)
