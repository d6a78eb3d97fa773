"""The memory that training a page of parameters takes on a GPU: counted, not measured, so no GPU is needed.

    python -m bench.memory presets/gpt2-medium.yaml ...

For each page: GB of weights, gradients and optimizer in float32, of the weights' 16-bit copies, and of what a
micro-batch keeps for its backward pass. The last is what autograd holds on to under bfloat16 autocast, counted on the
CPU in models of one layer and of two, and multiplied by layers and sequences. What an allocator loses and libraries
take for themselves is not in it, nor what torch.compile spares.
"""

import sys
from pathlib import Path

import torch

from encore.loss import SCORES_AT_ONCE
from encore.models.architectures import Model, make_config, make_model
from encore.muon import Muon
from encore.optim import make_optimizers
from encore.params import Params, StageParams, check_page


def kept_bytes(model: Model, sequences: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once and no parameter."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in owned:
            kept[storage] = tensor
        return tensor

    idx = torch.randint(model.config.vocab_size, (sequences, model.config.block_size))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(idx, idx)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def sequence_bytes(params: Params, n_layer: int) -> int:
    """What one more sequence keeps in a model of so many layers: two of them share the weights' copies."""
    page = StageParams("train", {**params.model_dump(), "n_layer": n_layer})
    model = make_model(make_config(page, vocab_size=257))
    return kept_bytes(model, 2) - kept_bytes(model, 1)


def count(page: Path) -> dict[str, float]:
    """GB by what they are for."""
    params = check_page(page)
    stage = StageParams("train", params.model_dump())
    with torch.device("meta"):
        model = make_model(make_config(stage, params.vocab_size))
    weights = sum(parameter.numel() for parameter in model.parameters())
    moments = sum(numbers for optimizer in make_optimizers(model, stage) for numbers in _moments(optimizer))
    one, two = (sequence_bytes(params, n_layer) for n_layer in (1, 2))
    # The loss works in float32 on a part of the scores: they, their log-softmax, a temporary; and the matrix's
    # gradient.
    loss = 3 * 4 * SCORES_AT_ONCE + 4 * params.vocab_size * params.n_embd
    return {
        "weights and gradients": 8 * weights / 1e9,
        "optimizer": 4 * moments / 1e9,
        "16-bit copies": 2 * weights / 1e9,
        "a micro-batch": (params.batch_size * (one + (params.n_layer - 1) * (two - one)) + loss) / 1e9,
    }


def _moments(optimizer: torch.optim.Optimizer) -> list[int]:
    """Numbers that the optimizer keeps for each parameter."""
    moments = 1 if isinstance(optimizer, Muon) else 2
    return [moments * parameter.numel() for group in optimizer.param_groups for parameter in group["params"]]


def main() -> None:
    for page in map(Path, sys.argv[1:]):
        parts = count(page)
        print(f"{page}: {sum(parts.values()):.1f} GB: " + ", ".join(f"{name} {gb:.1f}" for name, gb in parts.items()))


if __name__ == "__main__":
    main()
