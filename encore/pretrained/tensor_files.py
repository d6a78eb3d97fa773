"""Tensors on the disk, as safetensors: no code in them, and failures that say what the disk said."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from encore.errors import EncoreError
from encore.files import where_able


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file, with the mark that transformers asks for. Raises OSError, as writing a file does."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # it tells a full disk in words only
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    with where_able():
        path.chmod(0o644)  # safetensors makes it readable for its owner alone


def check_finite(tensors: Mapping[str, torch.Tensor], where: str, way_out: str) -> None:
    """Raises EncoreError, with `way_out`, where a tensor of `where` holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise EncoreError(f"{where}: {name} holds numbers that are not finite; {way_out}")
