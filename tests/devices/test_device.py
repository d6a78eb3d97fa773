"""What the environment may say about the hardware, and what `auto` means on it."""

import subprocess
import sys

import pytest
import torch

from encore.devices import device as device_module
from encore.devices.device import (
    Hardware,
    autocast,
    find_device,
    find_dtype,
    find_hardware,
    naming_what_does_not_repeat,
    set_up_numerics,
    should_compile,
)
from encore.errors import EncoreError
from encore.models.flops import Peak

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def pretend(monkeypatch, cuda, mps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "best"),
    [(False, False, "cpu"), (False, True, "mps"), (True, False, "cuda:0"), (True, True, "cuda:0")],
)
def test_the_best_device_is_taken_unless_the_environment_names_one(cuda, mps, best, monkeypatch):
    pretend(monkeypatch, cuda, mps)
    assert find_device() == torch.device(best)
    monkeypatch.setenv("ENCORE_DEVICE", "cpu")
    assert find_device() == CPU


def test_torchruns_processes_take_a_gpu_each(monkeypatch):
    pretend(monkeypatch, True, False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert find_device() == torch.device("cuda:3")


def test_a_numbered_gpu_can_be_named(monkeypatch):
    pretend(monkeypatch, cuda=True, mps=False)
    monkeypatch.setenv("ENCORE_DEVICE", "cuda:1")
    assert find_device() == torch.device("cuda", 1)


@pytest.mark.parametrize("wish", ["cuda", "cuda:0", "mps", "tpu", "", "cpu:x"])
def test_a_device_that_is_not_there_is_an_error_that_says_what_is(wish, monkeypatch):
    pretend(monkeypatch, cuda=False, mps=False)
    monkeypatch.setenv("ENCORE_DEVICE", wish)
    with pytest.raises(EncoreError, match=f"^ENCORE_DEVICE is '{wish}', which this machine does not offer; it has cpu"):
        find_device()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_number_type_that_is_named_is_taken(name, device):
    assert find_dtype(name, device) == getattr(torch, name)


def test_the_automatic_number_type_is_what_the_device_computes_in_hardware(monkeypatch):
    assert find_dtype("auto", CPU) == torch.float32
    assert find_dtype("auto", torch.device("mps")) == torch.float32
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        answers = {True: True, False: native}  # emulated, slowly, on older ones
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, of=answers: of[including_emulation]
        )
        assert find_dtype("auto", CUDA) == expected


def with_programs(monkeypatch, folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)


def test_compiling_is_automatic_on_a_gpu_only(monkeypatch, tmp_path, capsys):
    with_programs(monkeypatch, tmp_path / "bin", "g++")
    assert should_compile("auto", CUDA) is True
    assert should_compile("auto", CPU) is False
    assert should_compile(True, CPU) is True
    assert should_compile(False, CUDA) is False
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="executables are recognised by their name there")
def test_without_a_compiler_there_is_a_note_and_no_compiling(monkeypatch, tmp_path, capsys):
    with_programs(monkeypatch, tmp_path / "bin")
    assert should_compile(True, CPU) is False
    assert should_compile("auto", CUDA) is False
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("encore: note: torch.compile needs a C++ compiler and none is found") == 2
    assert should_compile("auto", CPU) is False
    assert should_compile(False, CUDA) is False
    assert capsys.readouterr().err == ""


def test_cxx_can_name_the_compiler(monkeypatch, tmp_path):
    with_programs(monkeypatch, tmp_path / "bin", "my-compiler")
    assert should_compile(True, CPU) is False
    monkeypatch.setenv("CXX", "my-compiler")
    assert should_compile(True, CPU) is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_the_wanted_type(dtype):
    a = torch.ones(2, 2)
    with autocast(CPU, dtype):
        assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32


def test_find_hardware_puts_the_findings_together(monkeypatch):
    monkeypatch.setenv("ENCORE_DEVICE", "cpu")
    monkeypatch.setattr(device_module, "find_peak", lambda device, dtype: Peak(3e12, f"{device} {dtype}"))
    hardware = find_hardware("bfloat16", False)
    assert hardware == Hardware(CPU, torch.bfloat16, False, Peak(3e12, "cpu torch.bfloat16"))
    assert str(hardware) == "cpu, bfloat16"
    assert str(Hardware(CPU, torch.float32, True, hardware.peak)) == "cpu, float32, compiled"


NUMERICS = """
import os, sys, torch
from encore.devices import device
kind = torch.device(sys.argv[1])
device.find_device = lambda: kind
torch.cuda.set_device = lambda which: print(which, end=" ")
device.find_peak = lambda *_: print(
    torch.are_deterministic_algorithms_enabled(),
    torch.is_deterministic_algorithms_warn_only_enabled(),
    torch.utils.deterministic.fill_uninitialized_memory,
    torch.get_float32_matmul_precision(),
    os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
)
device.find_hardware("float32", False)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("forking")
@pytest.mark.parametrize(
    ("kind", "repeatable", "state"),
    [
        ("cuda", "1", "True False False high :4096:8"),
        ("cuda", "0", "False False True high None"),
        ("cuda:1", "1", "cuda:1 True False False high :4096:8"),
        ("cpu", "1", "True False False highest None"),
        ("cpu", "0", "False False True highest None"),
        ("mps", "1", "False False True highest None"),
    ],
)
def test_a_device_is_set_up_for_repeatable_arithmetic_before_its_peak_is_measured(kind, repeatable, state, monkeypatch):
    """In a process of its own, since the settings are torch's for the whole process."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("ENCORE_REPEATABLE", repeatable)
    done = subprocess.run([sys.executable, "-c", NUMERICS, kind], capture_output=True, text=True)
    assert done.stdout == state + "\n", done.stderr


def test_a_run_that_need_not_repeat_says_so_where_it_names_its_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    hardware = Hardware(CUDA, torch.bfloat16, True, Peak(3e12, "H100"))
    assert str(hardware) == "H100, bfloat16, compiled"
    monkeypatch.setenv("ENCORE_REPEATABLE", "0")
    assert str(hardware) == "H100, bfloat16, compiled, not repeatable"


def test_what_does_not_repeat_is_named_in_one_sentence_and_other_errors_stay():
    """torch's own refusal, of an operation that the CPU has it for as well."""
    torch.use_deterministic_algorithms(True)
    with (
        pytest.raises(EncoreError, match=r"^put_ does not repeat to the bit on this device; set ENCORE_REPEATABLE=0"),
        naming_what_does_not_repeat(),
    ):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1), accumulate=False)
    with pytest.raises(RuntimeError, match=r"size mismatch|shapes"), naming_what_does_not_repeat():
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_the_first_calls_of_vector_math_are_none_that_matter(monkeypatch):
    """Large enough for every thread, and each function that a model of ours may ask for."""
    called = {}
    for name in ("cos", "sin", "tanh", "exp", "log", "erf"):
        monkeypatch.setattr(torch, name, lambda numbers, name=name: called.update({name: numbers.numel()}))
    set_up_numerics(torch.device("cpu"))
    assert called == dict.fromkeys(called, 2**15 * torch.get_num_threads())
    assert len(called) == 6
