"""Tensors in pieces over the ranks, by torch's FSDP2.

torch's own modules for it are imported where they are used: they take half a second to a second, which every
`encore generate` and every evaluation on one device would wait for.
"""

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch

from encore.models.architectures import Model

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: torch.Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is in pieces over the ranks."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, which may be in pieces over the ranks; all of them must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def spread_like(whole: torch.Tensor, like: torch.Tensor, from_rank: int | None = None) -> torch.Tensor:
    """The tensor in pieces over the ranks, where `like` is, else as it is. from_rank: the one whose numbers count; None
    where all have the same."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=from_rank)


def shard(model: Model, ranks: int) -> None:
    """Spreads the weights over the ranks, each layer by itself: a layer is whole only while it is computed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "token_losses")
