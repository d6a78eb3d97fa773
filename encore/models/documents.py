"""Documents that share a window, kept apart where `document_masking` says so: a token attends to its own alone.

A document begins AT the end-of-text token before it, as an empty prompt does, so each is computed as if it were alone:

    input         t6   t7   EOT  a1   a2   EOT  b1
    document      0    0    1    1    1    2    2
    target        t7   EOT  a1   a2   EOT  b1   b2

Shapes: B sequences in a batch, T tokens in a sequence.
"""

import torch


def find_visible(begins: torch.Tensor) -> torch.Tensor:
    """Whether a token (the second dimension) may attend to another (the third), (B, T, T) bool: to itself and to those
    before it in its document. begins: whether a token is the first of one, (B, T) bool."""
    documents = begins.cumsum(dim=1)
    return (documents[:, :, None] == documents[:, None, :]).tril()


def find_positions(visible: torch.Tensor) -> torch.Tensor:
    """How many tokens of its document, within the window, precede each, (B, T)."""
    return visible.sum(dim=2) - 1


def make_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores of attention, (B, 1, T, T): made once, in the type of the products, since torch would
    make and keep one in each layer of what is bool or of another type."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, -torch.inf)[:, None]
