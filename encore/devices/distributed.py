"""Training on several devices: torchrun starts a process for each, and here they find and hear each other.

Which devices and how many is no parameter: every visible GPU is used, and the environment says what else. The windows
of a step are shared out among the ranks, gradients and losses are averaged, rank 0 alone writes. A run on one device
is the case of one rank, which needs none of it.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from encore.devices.sharding import is_sharded, shard, spread_like
from encore.errors import EncoreError
from encore.models.architectures import Model

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

# How long a rank waits for the others: the first step compiles, and rank 0 may write a large checkpoint.
TIMEOUT = timedelta(minutes=15)
SHARD = "ENCORE_SHARD"
Layout = tuple[list[int], str]  # a tensor's shape, and its dtype by name


@dataclass(frozen=True)
class Ranks:
    """This process among all that train together. rank: from 0 to count - 1. local_rank: on this machine.

    shards: whether weights, gradients and moments are spread over the ranks instead of held by each.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    shards: bool = False

    @property
    def is_first(self) -> bool:
        """Whether it is this process that writes."""
        return self.rank == 0

    def share(self, items: Any) -> Any:
        """This rank's part of a row of items whose number is a multiple of `count`."""
        size = len(items) // self.count
        return items[self.rank * size : (self.rank + 1) * size]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, value: int) -> int:
        """The largest value that any rank has. Goes from CPU to CPU, so that no GPU is waited for."""
        if self.count == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor.item())

    def from_first(self, value: Any) -> Any:
        """What rank 0 has, plain Python data."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def find(self, problem: str | None) -> str | None:
        """The first rank's problem that has one, with its machine's name where there are several ranks."""
        if self.count == 1:
            return problem
        problems = [None] * self.count
        dist.all_gather_object(problems, f"on {socket.gethostname()}: {problem}" if problem else None)
        return next(filter(None, problems), None)

    def check_same(self, values: dict[str, Any]) -> None:
        """Raises EncoreError where this rank has other values, or another ENCORE_SHARD, than rank 0."""
        values = {**values, SHARD: self.shards}
        first = self.from_first(values)
        others = [name for name in values if values[name] != first.get(name)]
        if others:
            raise EncoreError(
                f"rank {self.rank}, on {socket.gethostname()}, differs from rank 0 in {', '.join(others)}; give every "
                "machine the same code, params.yaml and data/tokens"
            )

    def wrap(self, model: Model) -> nn.Module:
        """The model as it is called in training. Gradients are averaged over the ranks in the backward pass."""
        if self.count == 1:
            return model
        if self.shards:
            shard(model, self.count)
            return model
        device = next(model.parameters()).device
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,  # tables of constants, the same everywhere
        )

    def without_sync(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Keeps gradients to this rank until the `last` micro-batch of a step, so that they travel once a step."""
        if self.shards and self.count > 1:
            cast("FSDPModule", model).set_requires_gradient_sync(last)
        if isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    def spread(self, tensor: torch.Tensor | None, layout: Layout, like: torch.Tensor) -> torch.Tensor:
        """Rank 0's `tensor`, None elsewhere, on the device of `like`, and in pieces over the ranks where `like` is."""
        shape, dtype = layout
        whole = torch.empty(shape, dtype=getattr(torch, dtype)) if tensor is None else tensor
        whole = whole.to(like.device)
        if is_sharded(like) and shape:
            return spread_like(whole, like, from_rank=0)
        if self.count > 1:
            dist.broadcast(whole, src=0)
        return whole


ALONE = Ranks()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """This process's place among the ranks that torchrun has started; alone where it has started none.

    Raises EncoreError where the ranks do not find each other or another one is lost. What several ranks of a machine
    have to say is said once: the others exit with 1 and in silence.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    store = None
    try:
        ranks, store = _meet(device)
        yield ranks
    except EncoreError as error:
        _say_once(store, str(error))
        raise
    except RuntimeError as error:
        if not _tells_of_a_lost_rank(error):
            raise
        lost = (
            "a rank is lost, and its own message or torchrun's says why; the last checkpoint is whole, and the same "
            "command goes on from it"
        )
        _say_once(store, lost)
        raise EncoreError(lost) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(device: torch.device) -> tuple[Ranks, dist.Store]:
    """Waits for all ranks, at the place that torchrun names. Returns this one's place, and what all can read and write.

    After a restart the agents' own store still holds the addresses of the processes before (seen with torch 2.13:
    "connection refused" in every other restart), so each attempt has a corner of its own there.
    """
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    except ValueError as error:
        raise EncoreError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {error}; let torchrun set them") from None
    ranks = Ranks(rank, count, int(os.environ.get("LOCAL_RANK", "0")), os.environ.get(SHARD) == "1")
    backend = "gloo"
    if device.type == "cuda":
        _take_gpu(device, ranks)
        backend = "cpu:gloo,cuda:nccl"  # sums of evaluations and plain Python data travel from the CPU
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    return ranks, store


def _take_gpu(device: torch.device, ranks: Ranks) -> None:
    """Makes the rank's own GPU the one that "cuda" means in this process."""
    index = ranks.local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise EncoreError(
            f"rank {ranks.rank} has no GPU: this machine has {torch.cuda.device_count()}; start as many processes"
        )
    torch.cuda.set_device(index)


def _say_once(store: dist.Store | None, message: str) -> None:
    """Raises SystemExit where another rank of this machine has said this already. Who can reach nobody says it."""
    machine = os.environ.get("GROUP_RANK", "0")
    with suppress(RuntimeError):
        if store is not None and store.add(f"{machine}/{message}", 1) > 1:
            raise SystemExit(1)


def _tells_of_a_lost_rank(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
