"""ENCORE_RECOMPUTE=1: a layer keeps its input alone, and is computed once more in the backward pass.

A larger model or batch then fits, for about a third more work (Chen et al. 2016, "Training Deep Nets with Sublinear
Memory Cost"). No number changes: dropout draws the same again.
"""

import os
from functools import partial

from torch.utils.checkpoint import checkpoint

from encore.errors import EncoreError
from encore.models.architectures import Model

SETTING = "ENCORE_RECOMPUTE"


def wants_recompute() -> bool:
    """Whether the environment asks for it. Raises EncoreError for another value than 0 and 1."""
    wish = os.environ.get(SETTING, "0")
    if wish not in ("0", "1"):
        raise EncoreError(f"{SETTING} is {wish!r}; set 1 to save memory, or unset it")
    return wish == "1"


def recompute_layers(model: Model) -> None:
    """Has each layer of the model compute its activations again where the backward pass needs them."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
