"""The rows of a vocabulary's matrix."""

import torch

# Matrix products are fastest where the vocabulary is a multiple of this. The ids in between are never used:
# they take no part in the loss, cannot be sampled and are not exported.
VOCAB_MULTIPLE = 64


def pad_vocab(vocab_size: int) -> int:
    """The rows of a matrix with one for each id."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def pad_rows(matrix: torch.Tensor, vocab_size: int, rows: int) -> torch.Tensor:
    """A matrix (vocab_size, C) with zeros below, (rows, C). Raises RuntimeError where it has another shape."""
    if len(matrix) != vocab_size:
        raise RuntimeError(f"a matrix of the vocabulary has {len(matrix)} rows")
    return torch.cat([matrix, torch.zeros(rows - vocab_size, matrix.shape[1])])
