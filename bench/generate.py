"""Tokens a second that a model of GPT-2's size writes, with keys and values kept and without.

    python -m bench.generate [--tokens N] [--rounds N]

The weights are random; the prompt has 16 tokens. Both ways write the same text, in turn, in one run.
"""

import argparse
import statistics
import time

import torch

from encore.devices.device import find_device
from encore.evaluation.generate import generate
from encore.models.flops import synchronize
from encore.models.gpt2 import GPT2, GPT2Config

PROMPT = list(range(16))


def write_kept(model: GPT2, tokens: int) -> list[int]:
    """Encore's."""
    return list(generate(model, PROMPT, tokens, 0, None, 1.0, -1, torch.Generator()))


@torch.no_grad()
def write_anew(model: GPT2, tokens: int) -> list[int]:
    """Each token from the whole text before it."""
    ids = list(PROMPT)
    device = next(model.parameters()).device
    for _ in range(tokens):
        ids.append(int(model.logits(torch.tensor([ids], device=device))[0, -1].argmax()))
    return ids[len(PROMPT) :]


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.generate", description=__doc__)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = find_device()
    model = GPT2(GPT2Config(50_257, block_size=1024, n_layer=12, n_head=12, n_embd=768, bias=True)).to(device).eval()
    seconds: dict[str, list[float]] = {"kept": [], "anew": []}
    for _ in range(arguments.rounds):
        texts = []
        for name, write in (("kept", write_kept), ("anew", write_anew)):
            synchronize(device)
            started = time.perf_counter()
            texts.append(write(model, arguments.tokens))
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
        assert texts[0] == texts[1]
    print(
        f"GPT-2 124M on {device}, {arguments.tokens} tokens, torch {torch.__version__}, medians of {arguments.rounds}:"
    )
    for name, what in (("kept", "keys and values kept"), ("anew", "computed anew")):
        print(f"  {what:21s} {arguments.tokens / statistics.median(seconds[name]):7.1f} tokens/s")
    ratio = statistics.median(b / a for a, b in zip(seconds["kept"], seconds["anew"], strict=True))
    print(f"speed of the first over the second: {ratio:.1f}")


if __name__ == "__main__":
    main()
