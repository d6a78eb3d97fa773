"""Checkpoints: a folder each, whole or absent, in scratch (DVC removes its outputs before it runs a stage).

SCRATCH/checkpoints/FINGERPRINT/           one run (encore/training/run_folder.py)
    lock                                   held while a trainer lives
    run.json                               what its fingerprint is of
    iter-0000100/                          after 100 optimizer steps
        model.safetensors  optimizer.safetensors
        state.json                         the rest, with the sha256 of the two and of itself
"""

import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from encore.code import code_sha256
from encore.devices.distributed import ALONE, Ranks
from encore.devices.sharding import gather
from encore.errors import EncoreError
from encore.files import sha256_of, whole_folder
from encore.json_files import read_sealed, write_sealed
from encore.pretrained.tensor_files import check_finite, save_tensors
from encore.schemas import CheckpointState

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
TRAINING = "stages.train"  # whose code makes the checkpoints
OTHER_CODE = "ENCORE_RESUME_OTHER_CODE"
Tensors = dict[str, torch.Tensor]
Optimizers = list[torch.optim.Optimizer]


class Saver:
    """Writes checkpoints into `folder` in a thread of its own, one at a time, and keeps the newest `kept`.

    Training waits for a copy of the tensors in memory, not for the disk; and for the checkpoint before, should the disk
    be so slow.
    """

    def __init__(self, folder: Path, kept: int, ranks: Ranks = ALONE) -> None:
        self.folder, self.kept, self.ranks = folder, kept, ranks
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, iteration: int, model: nn.Module, optimizers: Optimizers, state: dict[str, Any]) -> None:
        """Begins to write the checkpoint of `iteration`. state: anything that JSON holds.

        All ranks must come, the first one writes. Raises what writing the one before has raised.
        """
        self.finish()
        tensors = (_copies(model.state_dict(), self.ranks), _copies(_optimizer_tensors(model, optimizers), self.ranks))
        if not self.ranks.is_first:
            return
        # JSON at once: the state's lists grow while the thread writes.
        contents = (*tensors, json.loads(json.dumps({"iter": iteration, **state}, allow_nan=False)))
        self._thread = threading.Thread(target=self._try_to_write, args=(iteration, *contents), name="saver")
        self._thread.start()

    def finish(self) -> None:
        """Waits until the last checkpoint is on the disk. Raises what writing it has raised."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error

    def _try_to_write(self, *contents: Any) -> None:
        try:
            self._write(*contents)
        except BaseException as error:  # for the thread that trains
            self._error = error

    def _write(self, iteration: int, model: Tensors, optimizer: Tensors, state: dict[str, Any]) -> None:
        """Writes beside, renames into place and drops what is too old. A crash leaves the earlier ones whole.

        Raises EncoreError where a tensor is not finite: who resumed from it could only fail.
        """
        path = self.folder / f"iter-{iteration:07d}"
        way_out = "it is not saved, and the checkpoint before is whole. Lower learning_rate or set dtype: float32"
        for tensors in (model, optimizer):
            check_finite(tensors, f"iteration {iteration}", way_out)
        with whole_folder(path) as partial:
            save_tensors(partial / MODEL, model)
            save_tensors(partial / OPTIMIZER, optimizer)
            state["sha256"] = {name: sha256_of(partial / name) for name in (MODEL, OPTIMIZER)}
            write_sealed(partial / STATE, state)
        # A later one is damaged, or of a finished run that this one does anew.
        paths = list_checkpoints(self.folder)
        kept = [each for each in paths if _iteration(each) <= iteration][: self.kept]
        for old in set(paths) - set(kept):
            shutil.rmtree(old)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder and what its state.json holds."""

    path: Path
    state: CheckpointState


def find_resumable(folder: Path, max_iters: int) -> Checkpoint | None:
    """The newest whole checkpoint up to `max_iters`, if today's code made it or the environment says to go on under
    other code.

    None where there is none, or where other code has finished the run: then it starts anew. Raises EncoreError for a
    run that other code left unfinished: going on and starting anew are both the user's to choose.
    """
    found = find_newest(folder, max_iters)
    if found is None or found.state["code"][-1]["sha256"] == code_sha256(TRAINING) or os.environ.get(OTHER_CODE) == "1":
        return found
    if found.state["iter"] >= max_iters:
        return None
    raise EncoreError(
        f"{folder} holds iteration {found.state['iter']} of {max_iters}, made by other code than today's; set "
        f"{OTHER_CODE}=1 to go on with today's code (model/encore.json will say so), or delete the folder"
    )


def find_newest(folder: Path, max_iters: int) -> Checkpoint | None:
    """The newest whole checkpoint of at most `max_iters` iterations. Damaged ones are named and passed over."""
    for path in list_checkpoints(folder):
        if _iteration(path) > max_iters:
            continue
        try:
            return Checkpoint(path, _read_whole(path))
        except (EncoreError, OSError) as damage:
            print(f"encore: note: {path} is damaged ({damage}); going back to the one before", file=sys.stderr)
    return None


def restore(path: Path | None, model: nn.Module, optimizers: Optimizers, ranks: Ranks = ALONE) -> None:
    """Puts the weights and moments of rank 0's checkpoint into `model` and `optimizers` on every rank, on its device.

    path: None on the other ranks. Raises EncoreError where other code has made other tensors, or one is not finite.
    """
    weights = load_file(path / MODEL) if path else {}
    if path and _shapes(weights) != _shapes(dict(model.named_parameters())):
        raise EncoreError(f"{path} holds other tensors than today's code makes; delete {path.parent} to start anew")
    moments = load_file(path / OPTIMIZER) if path else {}
    for tensors in (weights, moments):
        check_finite(tensors, str(path), "delete this folder to go on from the checkpoint before")
    layouts = {name: (list(tensor.shape), str(tensor.dtype).split(".")[1]) for name, tensor in moments.items()}
    layouts = ranks.from_first(layouts)
    for name, parameter in model.named_parameters():
        layout = (list(parameter.shape), "float32")
        with torch.no_grad():
            parameter.copy_(ranks.spread(weights.get(name), layout, parameter))
        _owner(parameter, optimizers).state[parameter] = {
            key.removeprefix(f"{name}/"): ranks.spread(moments.get(key), layout, parameter)
            for key, layout in layouts.items()
            if key.startswith(f"{name}/")
        }


def list_checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    paths = [path for path in folder.glob("iter-*") if re.fullmatch(r"iter-\d+", path.name)]
    return sorted(paths, key=_iteration, reverse=True)


def _iteration(path: Path) -> int:
    return int(path.name.removeprefix("iter-"))


def _optimizer_tensors(model: nn.Module, optimizers: Optimizers) -> Tensors:
    return {
        f"{name}/{key}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in _owner(parameter, optimizers).state[parameter].items()
    }


def _owner(parameter: nn.Parameter, optimizers: Optimizers) -> torch.optim.Optimizer:
    """The one of the optimizers that steps this parameter."""
    return next(
        optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        if any(each is parameter for each in group["params"])
    )


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _copies(tensors: Tensors, ranks: Ranks) -> Tensors:
    """The tensors as they are now, in the CPU's memory of the first rank. They are gathered one after another."""
    copies = {}
    for name, tensor in tensors.items():
        whole = gather(tensor.detach())
        if ranks.is_first:
            copies[name] = whole.to("cpu", copy=True)
    return copies


def _read_whole(path: Path) -> CheckpointState:
    """A checkpoint's state. Raises EncoreError where it, or a file beside it, has other bytes than were written."""
    state = read_sealed(path / STATE, CheckpointState)
    for name, sha256 in state["sha256"].items():
        if sha256_of(path / name) != sha256:
            raise EncoreError(f"{name} has other bytes")
    return state
