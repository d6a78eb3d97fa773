"""A step of nanochat's models by Muon against a step of GPT-2 by AdamW, of the same sizes, and what each is made of.
nanochat's have heads of 128, as in its presets.

    python -m bench.recipes [--model 4x128|6x384|gpt2] [--vocab-size N] [--rounds N] [--compile]

The recipes take turns, in one process, on the best device there is. Data and logging are left out: they are the same.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from bench.train import MODELS
from encore.devices.device import autocast, find_hardware
from encore.models.architectures import Model, make_config, make_model
from encore.models.flops import synchronize
from encore.params import StageParams
from encore.training.optim import make_optimizers

WARM_UP_ROUNDS = 2
SHARED = {"bias": False, "dropout": 0.0, "document_masking": False, "beta2": 0.95}
MUON = {
    "optimizer": "muon",
    "learning_rate": 0.02,
    "embedding_lr": 0.3,
    "head_lr": 0.004,
    "weight_decay": 1.0,
    "beta1": 0.8,
}
ADAMW = {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1, "beta1": 0.9}
RECIPES = {
    "GPT-2, AdamW": {**SHARED, **ADAMW, "architecture": "gpt2"},
    "nanochat, Muon": {**SHARED, **MUON, "architecture": "nanochat"},
    "nanochat-plus, Muon": {**SHARED, **MUON, "architecture": "nanochat-plus"},
}


class Recipe:
    """A model with its optimizers and a batch, whose step is clocked part by part."""

    def __init__(self, page: dict, vocab_size: int, compiles: bool) -> None:
        if page["architecture"] != "gpt2":
            page = {**page, "n_head": page["n_embd"] // 128}
        params = StageParams("train", page)
        self.hardware = find_hardware("auto", compiles)
        torch.manual_seed(0)
        self.model: Model = make_model(make_config(params, vocab_size)).to(self.hardware.device)
        self.forward = torch.compile(self.model) if self.hardware.compiles else self.model
        self.optimizers = make_optimizers(self.model, params)
        self.batch = torch.randint(
            vocab_size, (page["batch_size"], page["block_size"] + 1), device=self.hardware.device
        )

    def step(self) -> dict[str, float]:
        """Seconds of its parts."""
        seconds = {}

        def clock(name: str, work: Callable[[], object]) -> None:
            synchronize(self.hardware.device)
            started = time.perf_counter()
            work()
            synchronize(self.hardware.device)
            seconds[name] = time.perf_counter() - started

        clock("forward and backward", self.compute_gradients)
        for optimizer in self.optimizers:
            clock(type(optimizer).__name__, optimizer.step)
            optimizer.zero_grad(set_to_none=True)
        return {**seconds, "step": sum(seconds.values())}

    def compute_gradients(self) -> None:
        with autocast(self.hardware.device, self.hardware.dtype):
            loss = self.forward(self.batch[:, :-1], self.batch[:, 1:])
        loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.recipes", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="4x128")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    sizes = MODELS[arguments.model]
    recipes = {
        name: Recipe({**page, **sizes}, arguments.vocab_size, arguments.compile) for name, page in RECIPES.items()
    }
    rounds = [
        {name: recipe.step() for name, recipe in recipes.items()} for _ in range(WARM_UP_ROUNDS + arguments.rounds)
    ][WARM_UP_ROUNDS:]

    hardware = next(iter(recipes.values())).hardware
    print(
        f"{arguments.model}, {sizes['batch_size']} x {sizes['block_size']} tokens, {arguments.vocab_size:,} ids, "
        f"{hardware}, torch {torch.__version__}, medians of {arguments.rounds}:"
    )
    for name in recipes:
        medians = {part: statistics.median(each[name][part] for each in rounds) for part in rounds[0][name]}
        print(f"  {name:18s} " + ", ".join(f"{part} {1e3 * value:.1f} ms" for part, value in medians.items()))
    first, *others = recipes
    for name in others:
        ratio = statistics.median(each[name]["step"] / each[first]["step"] for each in rounds)
        print(f"step of {name} over that of {first}: {ratio:.2f}")


if __name__ == "__main__":
    main()
