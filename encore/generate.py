"""Text from a model, token by token.

    python -m encore.generate --prompt "def " [--model DIR] [--max-new-tokens N] [--temperature T] [--top-k K]
        [--top-p P] [--seed S] [--num-samples N]

Prints the text as it comes. Without --prompt the prompt is read from standard input. The same seed gives the same text.
"""

import argparse
import codecs
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional as F

from encore.device import find_device
from encore.errors import EncoreError, run_stage
from encore.export import load_model
from encore.models.gpt2 import GPT2, Cache
from encore.token_files import RANKS_FILE
from encore.tokenizer import load_tokenizer


@torch.no_grad()
def generate(
    model: GPT2,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    end_of_text: int,
    generator: torch.Generator,
) -> Iterator[int]:
    """The ids that continue a prompt of at least one id: up to `max_new_tokens`, or to the end-of-text token, which is
    not among them. A temperature of 0 takes the likeliest token.

    The model sees at most the last block_size ids. Up to there a token costs one token's work, since keys and values of
    the earlier ones are kept; beyond, positions move, and each token costs the whole context's.
    """
    device = next(model.parameters()).device
    block_size = model.config.block_size
    ids = list(prompt[-block_size:])
    cache: Cache | None = Cache(model.config.n_layer)
    new = ids
    for _ in range(max_new_tokens):
        scores = model.logits(torch.tensor([new], device=device), cache)[0, -1].float().cpu()
        token = sample(scores, temperature, top_k, top_p, generator)
        if token == end_of_text:
            return
        yield token
        ids = [*ids, token][-block_size:]
        if cache and cache.length < block_size:
            new = [token]
        else:
            cache, new = None, ids


def sample(
    scores: torch.Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator
) -> int:
    """An id drawn by its score, (V,) float32: among the `top_k` likeliest, and of those among the likeliest that hold
    `top_p` of the probability together (Holtzman et al. 2020)."""
    if temperature == 0:
        return int(scores.argmax())
    likely, ids = scores.topk(min(top_k or len(scores), len(scores)))
    shares = F.softmax(likely / temperature, dim=0)
    before = shares.cumsum(0) - shares  # the first one is always kept
    shares = shares.masked_fill(before >= top_p, 0.0)
    return int(ids[torch.multinomial(shares, 1, generator=generator)])


def main() -> None:
    arguments = parse_arguments()
    model = load_model(arguments.model).to(find_device())
    tokenizer = load_tokenizer(arguments.model / RANKS_FILE)
    text = sys.stdin.read() if arguments.prompt is None else arguments.prompt
    # An empty prompt begins where every document begins: behind an end-of-text token.
    prompt = tokenizer.encode_ordinary(text) or [tokenizer.eot_token]
    if len(prompt) > model.config.block_size:
        print(
            f"encore: note: the prompt has {len(prompt):,} tokens; the model sees the last {model.config.block_size:,}",
            file=sys.stderr,
        )
    generator = torch.Generator().manual_seed(arguments.seed)
    for number in range(arguments.num_samples):
        if number:
            print("\n" + "-" * 80)
        print(text, end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several tokens
        for token in generate(
            model,
            prompt,
            arguments.max_new_tokens,
            arguments.temperature,
            arguments.top_k,
            arguments.top_p,
            tokenizer.eot_token,
            generator,
        ):
            print(decoder.decode(tokenizer.decode_single_token_bytes(token)), end="", flush=True)
        print(decoder.decode(b"", final=True))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m encore.generate", description="Prints what a model writes.")
    parser.add_argument("--model", type=Path, default=Path("model"), metavar="DIR", help="default: model")
    parser.add_argument("--prompt", help="its beginning; read from standard input where this is missing")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest; default: 0.8")
    parser.add_argument("--top-k", type=int, metavar="K", help="among the K likeliest; default: among all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="among those that hold P of the probability"
    )
    parser.add_argument("--seed", type=int, default=1337, metavar="S", help="default: 1337")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="default: 1")
    arguments = parser.parse_args()
    least = {"max_new_tokens": 1, "temperature": 0, "top_k": 1, "seed": 0, "num_samples": 1}
    for name, minimum in least.items():
        value = getattr(arguments, name)
        if value is not None and not value >= minimum:
            parser.error(f"--{name.replace('_', '-')}: {value} will not do; from {minimum} on")
    if not 0 < arguments.top_p <= 1:
        parser.error(f"--top-p: {arguments.top_p} will not do; above 0 and up to 1")
    if not arguments.model.is_dir():
        raise EncoreError(f"there is no folder {arguments.model}; `dvc repro train` makes model, --model names another")
    return arguments


if __name__ == "__main__":
    run_stage(main)
