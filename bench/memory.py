"""The memory that training a page of parameters takes on a GPU: counted, not measured, so no GPU is needed.

    python -m bench.memory [--gpu GB] [--recompute] presets/gpt2-medium.yaml ...

For each page: GB of weights, gradients and optimizer in float32, of the weights' 16-bit copies, of what a micro-batch
keeps for its backward pass, and of the loss, compiled. What a micro-batch keeps is what autograd holds on to under
bfloat16 autocast, counted on the CPU in models of one layer and of two, and multiplied by layers and sequences. What an
allocator loses and libraries take for themselves is not in it. --gpu: the card's memory, 24 where nothing is said;
the loss works on more scores at once where there is more. --recompute: with ENCORE_RECOMPUTE=1.
"""

import argparse
from pathlib import Path

import torch

from encore.models.architectures import Model, make_config, make_model
from encore.models.cross_entropy import scores_on_gpu
from encore.models.recompute import recompute_layers
from encore.models.vocabulary import pad_vocab
from encore.params import Params, StageParams, check_page
from encore.training.muon import Muon
from encore.training.optim import make_optimizers


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


def sequence_bytes(params: Params, n_layer: int, recompute: bool = False) -> int:
    """What one more sequence keeps in a model of so many layers: two of them share the weights' copies."""
    page = StageParams("train", {**params.model_dump(), "n_layer": n_layer})
    model = make_model(make_config(page, vocab_size=257))
    if recompute:
        recompute_layers(model)
    return kept_bytes(model, 2) - kept_bytes(model, 1)


def loss_bytes(tokens: int, rows: int, width: int, at_once: int) -> int:
    """What the loss of a micro-batch takes, with an output matrix of `rows` and `at_once` scores at a time: a part's
    scores and their gradient in 16 bits, the matrix's gradient, and each part's share of that in 16 bits, since the
    compiler adds them up in the end."""
    parts = -(-tokens * rows // at_once)
    return 2 * 2 * min(at_once, tokens * rows) + 4 * rows * width + 2 * rows * width * parts


def count(page: Path, scores_at_once: int, recompute: bool = False) -> dict[str, float]:
    """GB by what they are for."""
    params = check_page(page)
    stage = StageParams("train", params.model_dump())
    with torch.device("meta"):
        model = make_model(make_config(stage, params.vocab_size))
    weights = sum(parameter.numel() for parameter in model.parameters())
    moments = sum(numbers for optimizer in make_optimizers(model, stage) for numbers in _moments(optimizer))
    one, two = (sequence_bytes(params, n_layer) for n_layer in (1, 2))
    sequence = one + (params.n_layer - 1) * (two - one)
    if recompute:  # what each layer keeps, and all of the one that is at work
        first, second = (sequence_bytes(params, n_layer, recompute) for n_layer in (1, 2))
        sequence = first + (params.n_layer - 1) * (second - first) + two - one
    rows = pad_vocab(params.vocab_size)
    loss = loss_bytes(params.batch_size * params.block_size, rows, params.n_embd, scores_at_once)
    return {
        "weights and gradients": 8 * weights / 1e9,
        "optimizer": 4 * moments / 1e9,
        "16-bit copies": 2 * weights / 1e9,
        "a micro-batch": params.batch_size * sequence / 1e9,
        "the loss": loss / 1e9,
    }


def _moments(optimizer: torch.optim.Optimizer) -> list[int]:
    """Numbers that the optimizer keeps for each parameter."""
    moments = 1 if isinstance(optimizer, Muon) else 2
    return [moments * parameter.numel() for group in optimizer.param_groups for parameter in group["params"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", type=float, default=24, metavar="GB")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE")
    arguments = parser.parse_args()
    for page in arguments.pages:
        parts = count(page, scores_on_gpu(arguments.gpu * 1e9), arguments.recompute)
        print(f"{page}: {sum(parts.values()):.1f} GB: " + ", ".join(f"{name} {gb:.1f}" for name, gb in parts.items()))


if __name__ == "__main__":
    main()
