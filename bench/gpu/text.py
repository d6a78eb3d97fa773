"""Tokens a second of GPT-2 124M behind one prompt: Encore's generate beside transformers' with its static cache."""

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.gpu.pages import TINY_VOCAB_SIZE, print_head, print_row
from bench.train import VOCAB_SIZE
from encore.devices.device import find_device
from encore.evaluation.generate import generate
from encore.models.flops import synchronize
from encore.models.gpt2 import GPT2, GPT2Config
from encore.models.kv_cache import Cache
from encore.pretrained.gpt2_hub import to_hub, to_hub_config

PROMPT = list(range(16))
ROUNDS = 5


def run(folder: Path, tiny: bool, nanogpt: Path | None) -> None:
    """All ways write what is likeliest, in float32, so their texts must be one and the same."""
    torch.manual_seed(0)
    n_layer, n_head, n_embd = (1, 1, 32) if tiny else (12, 12, 768)
    vocab_size, block_size = (TINY_VOCAB_SIZE, 64) if tiny else (VOCAB_SIZE, 1024)
    config = GPT2Config(vocab_size, block_size, n_layer, n_head, n_embd, bias=True)
    model = GPT2(config).eval()
    with torch.no_grad():  # scores that differ, so that a text is not one word
        for parameter in model.parameters():
            parameter.mul_(3)
    tokens = 20 if tiny else 500
    ways: dict[str, Callable[[], list[int]]] = {
        "Encore": lambda: list(generate(model, PROMPT, tokens, 0, None, 1.0, -1, torch.Generator())),
        "a pass a token, not recorded": lambda: write_unrecorded(model, tokens),
    }
    if find_spec("transformers"):
        ways["transformers, static cache"] = make_transformers_way(model, tokens)
    else:
        print("transformers is not installed here, so it has no row.\n")
    model.to(find_device())
    print_head("way", "tokens/s", "ms a token", "text")
    texts: dict[str, list[int]] = {}
    for name, write in ways.items():
        seconds = [clock(write, texts, name) for _ in range(1 + ROUNDS)][1:]
        median = statistics.median(seconds)
        same = "the same" if texts[name] == texts["Encore"] else "ANOTHER"
        print_row(name, f"{tokens / median:.0f}", f"{1e3 * median / tokens:.2f}", same)
    if any(text != texts["Encore"] for text in texts.values()):
        raise SystemExit("bench: the texts differ")


def clock(write: Callable[[], list[int]], texts: dict[str, list[int]], name: str) -> float:
    """Seconds that a text takes, which goes to `texts`."""
    synchronize(find_device())
    started = time.perf_counter()
    texts[name] = write()
    synchronize(find_device())
    return time.perf_counter() - started


@torch.no_grad()
def write_unrecorded(model: GPT2, tokens: int) -> list[int]:
    """With keys and values kept, and each pass launched anew."""
    cache, new, ids = Cache(model.config.n_layer, model.config.block_size), PROMPT, []
    for _ in range(tokens):
        new = [int(model.logits(torch.tensor([new], device=find_device()), cache)[0, -1].argmax())]
        ids += new
    return ids


def make_transformers_way(model: GPT2, tokens: int) -> Callable[[], list[int]]:
    """transformers' generate on the same weights; its decoding is compiled where there is a GPU, in the first call."""
    from transformers import GPT2Config as HubConfig
    from transformers import GPT2LMHeadModel

    hub = GPT2LMHeadModel(HubConfig(**to_hub_config(model.config))).eval()
    hub.load_state_dict(to_hub(model), strict=False)
    hub.to(find_device())
    prompt = torch.tensor([PROMPT], device=find_device())
    how = {"max_new_tokens": tokens, "do_sample": False, "cache_implementation": "static", "eos_token_id": None}

    def write() -> list[int]:
        ids = hub.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **how)
        return ids[0, len(PROMPT) :].tolist()

    return write
