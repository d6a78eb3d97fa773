"""Losses without gradients: the same windows each time, nothing drawn from training's randomness.

`sum_losses` is the quick look during training; `evaluate_split` goes through a whole split and keeps apart what each
document and each position in the context has.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from encore.devices.device import autocast
from encore.devices.distributed import ALONE, Ranks
from encore.models.architectures import Model
from encore.tokens.batches import Batch, Windows
from encore.tokens.token_files import SourceRange, TokenSplit

TOKENS_AT_ONCE = 2**24  # of a split that is searched for the ends of its documents


@dataclass(frozen=True)
class LossSum:
    """Nats summed over tokens; kept apart until the end, so that a short last batch weighs what it holds."""

    nats: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens


def sum_losses(model: Model, batches: Iterable[Batch], device: torch.device, dtype: torch.dtype) -> LossSum:
    """The loss summed over batches of inputs and targets, (B, T) each, of any shapes."""
    nats, tokens = 0.0, 0
    with _evaluating(model):
        for batch in batches:
            losses = _token_losses(model, batch, device, dtype)
            nats += losses.sum().item()
            tokens += losses.numel()
    return LossSum(nats, tokens)


@dataclass(frozen=True)
class SplitLoss:
    """The loss of a whole split, float64 sums. nats, tokens: by document, (D,). nats_at, tokens_at: by position in the
    context, (T,), where the first has seen one token. text_bytes: UTF-8 bytes of the split's text. sources: where each
    source of a mixture lies in it."""

    nats: np.ndarray
    tokens: np.ndarray
    nats_at: np.ndarray
    tokens_at: np.ndarray
    text_bytes: int
    sources: Sequence[SourceRange] = ()

    @property
    def by_source(self) -> dict[str, "SplitLoss"]:
        """Of each source of a mixture by its name, without the losses by position; empty where there is one source."""
        nowhere = np.zeros(0)
        return {
            source.name: SplitLoss(
                self.nats[source.documents.start : source.documents.stop],
                self.tokens[source.documents.start : source.documents.stop],
                nowhere,
                nowhere,
                source.text_bytes,
            )
            for source in self.sources
        }

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def standard_error(self) -> float | None:
        """Of `loss`, for other documents drawn from where these come from: that of a ratio of sums over documents of
        unequal length (Cochran 1977, Sampling Techniques, equation 2.46). Tokens of a document are alike, so counting
        each token as a draw would promise too much. None where there is one document, which cannot tell."""
        documents = len(self.tokens)
        if documents < 2:
            return None
        residuals = self.nats - self.loss * self.tokens
        return float(math.sqrt(documents / (documents - 1) * (residuals**2).sum()) / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity, which JSON cannot hold, is kept out by a limit, 1e304."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of the text that the tokens stand for: comparable across tokenizers."""
        return float(self.nats.sum()) / math.log(2) / self.text_bytes

    @property
    def loss_by_position(self) -> list[float]:
        """Nats a token at each position of the context at which the split has a target."""
        return (self.nats_at / np.maximum(self.tokens_at, 1))[self.tokens_at > 0].tolist()


def evaluate_split(
    model: Model,
    windows: Windows,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
    count_tokens: Callable[[int], object] = lambda tokens: None,
) -> SplitLoss:
    """Every token of the split but the first is a target once, behind what precedes it in its window.

    The ranks share the windows, and each gets the whole result. count_tokens: told of this rank's progress.
    """
    ends = find_document_ends(windows.split)
    nats, tokens = np.zeros(len(ends)), np.zeros(len(ends))
    nats_at, tokens_at = np.zeros(windows.block_size), np.zeros(windows.block_size)
    with _evaluating(model):
        for starts, batch in windows.every_token(batch_size, ranks.rank, ranks.count):
            losses = _token_losses(model, batch, device, dtype).numpy()
            offsets = np.arange(losses.shape[1])
            documents = np.searchsorted(ends, starts[:, None] + offsets + 1).ravel()  # of each target
            nats += np.bincount(documents, losses.ravel(), minlength=len(ends))
            tokens += np.bincount(documents, minlength=len(ends))
            nats_at[offsets] += losses.sum(axis=0)
            tokens_at[offsets] += len(losses)
            count_tokens(losses.size)
    for sums in (nats, tokens, nats_at, tokens_at):
        ranks.sum(torch.from_numpy(sums))  # the same memory
    return SplitLoss(nats, tokens, nats_at, tokens_at, windows.split.text_bytes, windows.split.sources)


def find_document_ends(split: TokenSplit) -> np.ndarray:
    """The index of each end-of-text token, the last id of the vocabulary, (D,)."""
    end_of_text = split.manifest["vocab_size"] - 1
    starts = range(0, split.tokens, TOKENS_AT_ONCE)
    parts = (split.read(start, min(TOKENS_AT_ONCE, split.tokens - start)) for start in starts)
    return np.concatenate(
        [np.flatnonzero(part == end_of_text) + start for start, part in zip(starts, parts, strict=True)]
    )


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Without gradients and without dropout; the model's mode comes back."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)


def _token_losses(model: Model, batch: Batch, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Nats of each target, (B, T) float64, on the CPU."""
    idx, targets = batch
    with autocast(device, dtype):
        losses = model.token_losses(idx.to(device), targets.to(device))
    return losses.cpu().double()
