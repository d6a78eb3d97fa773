"""Which tokens a step sees: a pure function of (seed, step), with no generator and so no state to save.

The split is a row of windows of `block_size` tokens; window w is tokens w*T to w*T + T, its targets one further.
Position p of the endless sequence of samples is window `shuffle(p mod windows)` of epoch `p div windows`, and step i
takes positions i*B to (i+1)*B, B being batch_size * gradient_accumulation_steps. So each window comes once an epoch,
and the micro-batch and the number of ranks only decide who computes which part of a step.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from encore.errors import EncoreError
from encore.tokens.token_files import TokenSplit

ROUNDS = 6
Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, each (B, T) int64


def shuffle(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a permutation of range(size), chosen by `key`, sends each of `indices` (n,); O(1) memory in `size`.

    A Feistel network on the next even number of bits, walked along its cycle until it is back inside the range
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    half_bits = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    half_mask = np.uint64((1 << int(half_bits)) - 1)
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half_bits, values[outside] & half_mask
        for round_number in range(ROUNDS):
            left, right = right, left ^ (_mix(right, key + round_number) & half_mask)
        values[outside] = (left << half_bits) | right
        outside = values >= size
    return values.astype(np.int64)


def _mix(values: np.ndarray, key: int) -> np.ndarray:
    """A 64-bit hash of (value, key): two rounds of the finalizer of splitmix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        mixed = values ^ np.uint64(key * 0x9E3779B97F4A7C15 % 2**64)
        for _ in range(2):
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


class Windows:
    """The windows of one split. Raises EncoreError where the split does not hold a single one."""

    def __init__(self, split: TokenSplit, block_size: int, name: str) -> None:
        self.split = split
        self.block_size = block_size
        self.count = (split.tokens - 1) // block_size
        if self.count < 1:
            raise EncoreError(
                f"the {name} split has {split.tokens:,} tokens, too few for one window of block_size {block_size}; "
                "lower block_size, change val_fraction, or use more text"
            )

    def batch(self, indices: np.ndarray) -> Batch:
        """Inputs and targets of these windows, each (len(indices), block_size) int64."""
        return self.at(indices * self.block_size, self.block_size)

    def for_step(self, step: int, windows_per_step: int, seed: int) -> np.ndarray:
        """The windows of one optimizer step, (windows_per_step,) indices."""
        positions = np.arange(step * windows_per_step, (step + 1) * windows_per_step, dtype=np.int64)
        epochs = positions // self.count
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            key = seed * 2**32 + int(epoch) * ROUNDS
            indices[of_epoch] = shuffle(positions[of_epoch] % self.count, self.count, key)
        return indices

    def spread(self, count: int) -> np.ndarray:
        """At most `count` windows, evenly spread over the split: the same ones at every evaluation."""
        count = min(count, self.count)
        return np.arange(count, dtype=np.int64) * self.count // count

    def spread_by_source(self, count: int) -> dict[str | None, np.ndarray]:
        """`spread`, for each source of a mixture by its share of the split: of the windows that are wholly its own, at
        least one. A source that has none is left out. Without a mixture, all by the name None."""
        spread: dict[str | None, np.ndarray] = {}
        for source in self.split.sources:
            first = -(-source.tokens.start // self.block_size)
            its_own = (source.tokens.stop - 1) // self.block_size - first
            its_count = min(its_own, max(1, round(count * len(source.tokens) / self.split.tokens)))
            if its_count > 0:
                spread[source.name] = first + np.arange(its_count, dtype=np.int64) * its_own // its_count
        return spread or {None: self.spread(count)}

    def in_batches(self, indices: np.ndarray, batch_size: int) -> Iterator[Batch]:
        """`batch` of `batch_size` windows at a time, the last one what is left."""
        for start in range(0, len(indices), batch_size):
            yield self.batch(indices[start : start + batch_size])

    def every_token(self, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[np.ndarray, Batch]]:
        """All windows and then the shorter rest, so that every token but the first is a target exactly once; of several
        ranks each gets other batches. With each batch where its windows start in the split, (B,)."""
        starts = np.arange(self.count) * self.block_size
        parts = [(starts[i : i + batch_size], self.block_size) for i in range(0, self.count, batch_size)]
        rest = self.split.tokens - 1 - self.count * self.block_size
        if rest:
            parts.append((np.array([self.count * self.block_size]), rest))
        for places, length in parts[rank::ranks]:
            yield places, self.at(places, length)

    def at(self, starts: np.ndarray, length: int) -> Batch:
        """Inputs and targets of `length` tokens from each of `starts` on, each (len(starts), length) int64."""
        rows = np.stack([self.split.read(int(start), length + 1) for start in starts])
        tokens = torch.from_numpy(rows.astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Ahead:
    """The batches of each step, read one step ahead in a thread, so that training does not wait for the disk.

    windows_of: the windows of a step. pinned: whether in memory from which a GPU copies while it computes.
    """

    def __init__(
        self, windows: Windows, windows_of: Callable[[int], np.ndarray], batch_size: int, pinned: bool
    ) -> None:
        self.windows, self.windows_of, self.batch_size, self.pinned = windows, windows_of, batch_size, pinned
        self._pool = ThreadPoolExecutor(1, "read-ahead")
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def take(self, step: int) -> list[Batch]:
        """Inputs and targets of a step, in batches; reading the next step begins."""
        ready = self._next
        batches = ready[1].result() if ready and ready[0] == step else self._read(step)
        self._next = step + 1, self._pool.submit(self._read, step + 1)
        return batches

    def _read(self, step: int) -> list[Batch]:
        batches = list(self.windows.in_batches(self.windows_of(step), self.batch_size))
        if not self.pinned:
            return batches
        return [(idx.pin_memory(), targets.pin_memory()) for idx, targets in batches]
