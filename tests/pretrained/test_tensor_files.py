"""Tensors come back from the disk as they were, and a disk that refuses says why."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from encore.pretrained import tensor_files
from encore.pretrained.tensor_files import save_tensors


def test_the_same_bits_come_back_under_the_mark_that_transformers_asks_for(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4, dtype=torch.int64), "c": torch.tensor(float("nan"))}
    save_tensors(tmp_path / "t.safetensors", tensors)
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert file.get_tensor(name).numpy().tobytes() == tensor.numpy().tobytes()
    assert (tmp_path / "t.safetensors").stat().st_mode & 0o777 == 0o644


REFUSED = """
import resource, signal, sys, torch
from pathlib import Path
from encore.pretrained.tensor_files import save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save_tensors(Path(sys.argv[1]), {"a": torch.zeros(10_000)})
except OSError as error:
    print(error.errno, error.filename)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("forking")
def test_a_disk_that_refuses_is_an_oserror_with_its_number(tmp_path):
    """A limit on the size of files stands in for a full disk: the same path through safetensors, another number."""
    path = str(tmp_path / "t.safetensors")
    done = subprocess.run([sys.executable, "-c", REFUSED, path], capture_output=True, text=True)
    assert done.stdout == f"27 {path}\n", done.stderr


def test_a_file_system_without_permissions(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    save_tensors(tmp_path / "t.safetensors", {"a": torch.arange(3)})
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert file.get_tensor("a").tolist() == [0, 1, 2]


def test_other_failures_stay_what_they_are(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise SafetensorError("not contiguous")

    monkeypatch.setattr(tensor_files, "save_file", fail)
    with pytest.raises(SafetensorError, match="not contiguous"):
        save_tensors(tmp_path / "t.safetensors", {})
