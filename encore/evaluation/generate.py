"""Text from a model, token by token.

    encore generate --prompt "def " [--model DIR] [--max-new-tokens N] [--temperature T] [--top-k K]
        [--top-p P] [--seed S] [--num-samples N]

Prints the text as it comes. Without --prompt the prompt is read from standard input. The same seed gives the same text.
"""

import argparse
import codecs
import sys
from collections.abc import Iterator
from pathlib import Path

import tiktoken
import torch
from torch.nn import functional as F

from encore.devices.device import find_device, set_up_numerics
from encore.errors import EncoreError
from encore.models.architectures import Model
from encore.models.cuda_graph import Replay
from encore.models.kv_cache import Cache
from encore.pretrained.model_folder import load_model
from encore.tokens.token_files import RANKS_FILE
from encore.tokens.tokenizer import load_tokenizer

LARGEST_SEED = 2**64 - 1  # of torch


def generate(
    model: Model,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    end_of_text: int,
    generator: torch.Generator,
    records_graph: bool = True,
) -> Iterator[int]:
    """The ids that continue a prompt of at least one id: up to `max_new_tokens`, or to the end-of-text token, which is
    not among them. A temperature of 0 takes the likeliest token. records_graph: whether a GPU records a pass over one
    token and replays it; not in the midst of training, whose memory and hooks a recording would meet."""
    how = (max_new_tokens, temperature, top_k, top_p, end_of_text, generator, records_graph)
    scored = generate_with_scores(model, prompt, *how)
    return (token for token, _ in scored)


@torch.no_grad()
def generate_with_scores(
    model: Model,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    end_of_text: int,
    generator: torch.Generator,
    records_graph: bool = True,
) -> Iterator[tuple[int, torch.Tensor]]:
    """As `generate`, and with each id the model's scores of all ids in its place, (V,) float32 on the CPU, from which
    it was drawn: temperature, top-k and top-p have not touched them.

    The model sees at most the last block_size ids. Up to there a token costs one token's work, since keys and values of
    the earlier ones are kept; beyond, positions move, and each token costs the whole context's.
    """
    device = next(model.parameters()).device
    block_size = model.config.block_size
    ids = list(prompt[-block_size:])
    cache: Cache | None = Cache(model.config.n_layer, block_size)
    replay: Replay | None = None
    new = ids
    for _ in range(max_new_tokens):
        found = replay(new[0]) if replay else model.logits(torch.tensor([new], device=device), cache)[0, -1]
        scores = found.float().cpu()
        token = sample(scores, temperature, top_k, top_p, generator)
        if token == end_of_text:
            return
        yield token, scores
        ids = [*ids, token][-block_size:]
        if cache and cache.length < block_size:
            new = [token]
            if device.type == "cuda" and replay is None and records_graph:
                replay = Replay(model, cache)
        else:
            cache, replay, new = None, None, ids


def sample(
    scores: torch.Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator
) -> int:
    """An id drawn by its score, (V,) float32: among the `top_k` likeliest, and of those among the likeliest that hold
    `top_p` of the probability together (Holtzman et al. 2020). Raises EncoreError where the best is not finite."""
    best = int(scores.argmax())  # NaN, if there is one
    if not scores[best].isfinite():
        raise EncoreError(f"the model gives a score of {scores[best]:g}; take other weights, or train these again")
    if temperature == 0:
        return best
    likely, ids = scores.topk(min(top_k or len(scores), len(scores)))
    likely = likely / temperature
    if not likely[0].isfinite():  # so little that float32 has no room: the same as 0
        return best
    shares = F.softmax(likely, dim=0)
    before = shares.cumsum(0) - shares  # the first one is always kept
    shares = shares.masked_fill(before >= top_p, 0.0)
    return int(ids[torch.multinomial(shares, 1, generator=generator)])


def open_model(folder: Path) -> tuple[Model, tiktoken.Encoding]:
    """The model of a folder, on the best device that there is, set up for repeatable arithmetic, and its tokenizer.
    Raises EncoreError where a part is missing or damaged."""
    if not folder.is_dir():
        raise EncoreError(f"there is no folder {folder}; `dvc repro train` makes model, --model names another")
    device = find_device()
    set_up_numerics(device)  # before the model computes its rotations
    return load_model(folder).to(device), load_tokenizer(folder / RANKS_FILE)


def encode_prompt(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """The ids of a prompt. An empty one begins where every document begins: behind an end-of-text token."""
    return tokenizer.encode_ordinary(text) or [tokenizer.eot_token]


def note_of_cut(prompt: list[int], block_size: int) -> str | None:
    """What to tell the user where the model will not see the whole prompt."""
    if len(prompt) <= block_size:
        return None
    return f"the prompt has {len(prompt):,} tokens; the model sees the last {block_size:,}"


def main() -> None:
    arguments = parse_arguments()
    model, tokenizer = open_model(arguments.model)
    text = sys.stdin.read() if arguments.prompt is None else arguments.prompt
    prompt = encode_prompt(tokenizer, text)
    if note := note_of_cut(prompt, model.config.block_size):
        print(f"encore: note: {note}", file=sys.stderr)
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
    parser = argparse.ArgumentParser("encore generate", description="Prints what a model writes.")
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
    if arguments.seed > LARGEST_SEED:
        parser.error(f"--seed: {arguments.seed} will not do; up to {LARGEST_SEED}")
    if not 0 < arguments.top_p <= 1:
        parser.error(f"--top-p: {arguments.top_p} will not do; above 0 and up to 1")
    return arguments
