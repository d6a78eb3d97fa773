"""ENCORE_SAMPLE_INTERVAL=500: every so many iterations the model goes on with ENCORE_SAMPLE_PROMPT, for the log, wandb
and TensorBoard.

A sample depends on the weights, the seed and the iteration alone. It takes nothing from training's generators and
leaves the model as it was, so no number of the run changes.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from encore.devices.distributed import Ranks
from encore.errors import EncoreError
from encore.models.architectures import Model

INTERVAL, PROMPT = "ENCORE_SAMPLE_INTERVAL", "ENCORE_SAMPLE_PROMPT"
NEW_TOKENS = 64
TEMPERATURE = 0.8  # as in `encore generate`


@dataclass(frozen=True)
class Sampler:
    """interval: in iterations. prompt: its text; an empty one begins a document. ranks_file: the tokenizer's."""

    interval: int
    prompt: str
    seed: int
    ranks_file: Path

    def is_due(self, iteration: int) -> bool:
        """Whether this iteration has a sample."""
        return iteration % self.interval == 0

    def write(self, model: Model, iteration: int) -> str:
        """The prompt and what follows it, at most NEW_TOKENS tokens. The model's mode comes back."""
        # Only where samples are asked for: an edit of these makes no training run again.
        from encore.evaluation.generate import encode_prompt, generate
        from encore.tokens.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.ranks_file)
        prompt, end_of_text = encode_prompt(tokenizer, self.prompt), tokenizer.eot_token
        generator = torch.Generator().manual_seed(self.seed * 2**31 + iteration)
        was_training = model.training
        model.eval()
        ids = generate(model, prompt, NEW_TOKENS, TEMPERATURE, None, 1.0, end_of_text, generator, records_graph=False)
        text = tokenizer.decode(list(ids))
        model.train(was_training)
        return self.prompt + text


def make_sampler(ranks_file: Path, seed: int, ranks: Ranks) -> Sampler | None:
    """What rank 0's environment asks for; None where it asks for no samples. Raises EncoreError on all ranks where the
    interval is no number of iterations."""
    wish, prompt = ranks.from_first((os.environ.get(INTERVAL), os.environ.get(PROMPT, "")))
    if not wish:
        return None
    if not (wish.isascii() and wish.isdigit() and int(wish) > 0):
        raise EncoreError(f"{INTERVAL} is {wish!r}; set a number of iterations, from 1 on, or unset it")
    return Sampler(int(wish), prompt, seed, ranks_file)
