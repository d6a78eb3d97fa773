"""What a step costs with `document_masking`, against the same model without it, in turn.

    python -m bench.document_masking [--model 4x128|6x384|gpt2] [--vocab-size N] [--document-tokens N]
        [--rounds N] [--compile]

Forward and backward pass of a GPT-2 on a micro-batch of documents of equal length, and the bytes that it keeps for the
backward pass. Works on any device; ENCORE_DEVICE chooses one.
"""

import argparse
import time
from collections.abc import Callable

import torch

from bench.memory import kept_bytes
from bench.train import MODELS, VOCAB_SIZE, WARM_UP_STEPS
from encore.devices.device import autocast, find_hardware
from encore.models.architectures import Model, make_model
from encore.models.flops import synchronize
from encore.models.gpt2 import GPT2Config


def make_models(name: str, vocab_size: int) -> list[Model]:
    """The model of this name in bench.train, with the setting and without, and the same weights."""
    sizes = {key: value for key, value in MODELS[name].items() if key != "batch_size"}
    models = []
    for masked in (True, False):
        torch.manual_seed(0)
        models.append(make_model(GPT2Config(vocab_size, bias=False, document_masking=masked, **sizes)))
    return models


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.document_masking")
    parser.add_argument("--model", choices=MODELS, default="4x128")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--document-tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    hardware = find_hardware("auto", arguments.compile)
    batch, length = MODELS[arguments.model]["batch_size"], MODELS[arguments.model]["block_size"]
    end_of_text = arguments.vocab_size - 1
    tokens = torch.randint(end_of_text, (batch, length + 1), device=hardware.device)
    tokens[:, arguments.document_tokens - 1 :: arguments.document_tokens] = end_of_text
    idx, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    models = make_models(arguments.model, arguments.vocab_size)
    kept = [batch * (kept_bytes(model, 2) - kept_bytes(model, 1)) for model in models]
    models = [model.to(hardware.device) for model in models]
    forwards = [torch.compile(model) if hardware.compiles else model for model in models]

    def seconds(model: torch.nn.Module, forward: Callable[..., torch.Tensor]) -> float:
        started = time.perf_counter()
        with autocast(hardware.device, hardware.dtype):
            loss = forward(idx, targets)
        loss.backward()
        synchronize(hardware.device)
        model.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    rounds = [
        [seconds(model, forward) for model, forward in zip(models, forwards, strict=True)]
        for _ in range(arguments.rounds + WARM_UP_STEPS)
    ]
    best = [min(times) for times in zip(*rounds[WARM_UP_STEPS:], strict=True)]  # what else runs only slows them down
    print(f"{arguments.model} on {hardware}, torch {torch.__version__}, best of {arguments.rounds} rounds:")
    for name, least, size in zip(("with", "without"), best, kept, strict=True):
        print(f"  {name:8s} {least * 1e3:9.1f} ms, keeps {size / 1e6:,.1f} MB for the backward pass")
    print(f"  with over without: {best[0] / best[1]:.3f}")


if __name__ == "__main__":
    main()
