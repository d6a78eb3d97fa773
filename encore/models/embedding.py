"""Rows of a matrix, looked up by ids, with a gradient that is quick and repeats to the bit on a GPU.

The gradient of a row is the sum over all places where its id stands. torch's own is either added up in the order in
which threads come, or, under deterministic algorithms, by one thread for each id, and some ids stand everywhere.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

LONGEST_RUN = 32  # places of an id that one thread adds up


class Occurrences(NamedTuple):
    """Where each id stands among N ids, for a matrix of P rows."""

    places: torch.Tensor  # (N,), in the order of their ids
    runs: torch.Tensor  # (P + N / LONGEST_RUN,), where in `places` a run begins: some places of one id, or none
    first_runs: torch.Tensor  # (P,), each id's first run


def look_up(weight: torch.Tensor, idx: torch.Tensor, occurrences: Occurrences | None) -> torch.Tensor:
    """weight[idx], (B, T, C), for a weight (P, C) and ids (B, T). occurrences: those of `idx`, or None."""
    return F.embedding(idx, weight) if occurrences is None else _look_up(weight, idx, *occurrences)


def find_occurrences(idx: torch.Tensor, rows: int) -> Occurrences | None:
    """Where each id below `rows` stands in `idx` (B, T), once for all matrices that are looked up by the same ids; None
    where torch's own gradient will do, which is anywhere but on a GPU, and where there will be none."""
    return sort_occurrences(idx, rows) if idx.is_cuda and torch.is_grad_enabled() else None


def sort_occurrences(idx: torch.Tensor, rows: int) -> Occurrences:
    """Where each id below `rows` stands in `idx`."""
    ids, places = idx.flatten().sort(stable=True)
    begins = torch.searchsorted(ids, torch.arange(rows, device=ids.device))
    cuts = torch.arange(0, len(ids), LONGEST_RUN, device=ids.device)
    runs = torch.cat([begins, cuts]).sort().values
    return Occurrences(places, runs, torch.searchsorted(runs, begins))


def sum_by_id(grad: torch.Tensor, occurrences: Occurrences) -> torch.Tensor:
    """The rows of `grad` (N, C) summed for each id, (rows, C): first those of a run, then the runs of an id, each sum
    in the order of the places."""
    places, runs, first_runs = occurrences
    sums = F.embedding_bag(places, grad, runs, mode="sum")
    return F.embedding_bag(torch.arange(len(runs), device=grad.device), sums, first_runs, mode="sum")


# An operation of its own, since torch keeps what it has compiled of these, and not of a torch.autograd.Function.
@torch.library.custom_op("encore::look_up", mutates_args=())
def _look_up(
    weight: torch.Tensor, idx: torch.Tensor, places: torch.Tensor, runs: torch.Tensor, first_runs: torch.Tensor
) -> torch.Tensor:
    return F.embedding(idx, weight)


@_look_up.register_fake
def _(weight, idx, places, runs, first_runs):  # type: ignore[no-untyped-def]
    return F.embedding(idx, weight)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return sum_by_id(grad.flatten(0, -2), Occurrences(*ctx.saved_tensors)), None, None, None, None


_look_up.register_autograd(_backward, setup_context=_keep)
