"""Losses without gradients: the same windows each time, nothing drawn from training's randomness."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from encore.device import autocast
from encore.models.gpt2 import GPT2


@dataclass(frozen=True)
class LossSum:
    """Nats summed over tokens; kept apart until the end, so that a short last batch weighs what it holds."""

    nats: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity, which JSON cannot hold, is kept out by a limit, 1e304."""
        return math.exp(min(self.mean, 700.0))

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits that the model needs for a byte of the text that the tokens stand for: comparable across tokenizers."""
        return self.nats / math.log(2) / text_bytes


@torch.no_grad()
def sum_losses(
    model: GPT2,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    dtype: torch.dtype,
) -> LossSum:
    """The loss summed over batches of inputs and targets, (B, T) each, of any shapes."""
    was_training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    for idx, targets in batches:
        with autocast(device, dtype):
            losses = model.token_losses(idx.to(device), targets.to(device))
        nats += losses.cpu().double().sum().item()
        tokens += targets.numel()
    model.train(was_training)
    return LossSum(nats, tokens)
