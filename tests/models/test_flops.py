"""The work of a token counted by hand, peaks by device name, and a timed matrix product under a clock of ours."""

from types import SimpleNamespace

import pytest
import torch

from encore.models import flops
from encore.models.flops import Peak, find_peak, flops_per_token, listed_tflops, measure_matmul
from encore.models.gpt2 import GPT2, GPT2Config


def test_a_token_of_gpt2_124m_costs_what_nanogpt_counts():
    layer = 768 + 768 * 2304 + 768 * 768 + 768 + 768 * 3072 + 3072 * 768  # norm, attention, norm, MLP
    parameters = 50304 * 768 + 12 * layer + 768
    assert parameters == 123_587_328
    attention = 12 * 12 * 12 * 64 * 1024
    with torch.device("meta"):
        model = GPT2(GPT2Config(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, bias=False))
    assert flops_per_token(model) == 6 * parameters + attention == 854_770_176


def test_the_record_run_comes_out_at_its_published_utilisation():
    """42.7 TFLOP/s are 13.70 % of an A100's peak."""
    assert 42.74 / listed_tflops("NVIDIA A100-SXM4-40GB", torch.bfloat16) == pytest.approx(0.137, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "bfloat16", "float16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 312),
        ("NVIDIA A100 80GB PCIe", 312, 312),
        ("NVIDIA A10", 125, 125),
        ("NVIDIA A10G", 70, 70),
        ("NVIDIA L4", 121, 121),
        ("NVIDIA L40S", 362, 362),
        ("NVIDIA L40", None, None),
        ("NVIDIA H100 80GB HBM3", 989, 989),
        ("NVIDIA H100 PCIe", 756, 756),
        ("NVIDIA H100 NVL", 835, 835),
        ("NVIDIA H200", 989, 989),
        ("NVIDIA B200", 2250, 2250),
        ("NVIDIA GB200", 2500, 2500),
        ("NVIDIA GeForce RTX 3090", 71, 71),
        ("NVIDIA GeForce RTX 4090", 165.2, 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5, 209.5),
        ("NVIDIA H200 NVL", 835, 835),
        ("NVIDIA GeForce RTX 3090 Ti", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("Tesla T4", None, 65),
        ("Tesla V100-SXM2-16GB", None, 125),
        ("Tesla V100-PCIE-16GB", None, None),
        ("NVIDIA GeForce GTX 1080 Ti", None, None),
        ("NVIDIA A1000", None, None),
        ("NVIDIA GH200 480GB", None, None),
    ],
)
def test_device_names_find_their_own_peak_and_no_others(name, bfloat16, float16):
    assert listed_tflops(name, torch.bfloat16) == bfloat16
    assert listed_tflops(name, torch.float16) == float16
    assert listed_tflops(name, torch.float32) is None


def test_a_listed_gpu_is_looked_up_and_an_unlisted_one_measured(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(flops, "measure_matmul", lambda device, dtype: 5e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    assert find_peak(device, torch.bfloat16) == Peak(312e12, "data sheet")
    assert find_peak(device, torch.float32) == Peak(5e12, "measured")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Unheard-of 9000")
    assert find_peak(device, torch.bfloat16) == Peak(5e12, "measured")


def test_a_cpu_has_no_peak(monkeypatch):
    monkeypatch.setattr(flops, "measure_matmul", lambda device, dtype: pytest.fail("it was timed"))
    assert find_peak(torch.device("cpu"), torch.float32) is None


def test_the_measured_peak_is_the_best_time_after_a_warm_up(monkeypatch):
    """Durations 1 (warm-up, the fastest), 8, 2, 4 seconds: a product of two 32 x 32 matrices in 2 seconds."""
    readings = iter([0, 1, 10, 18, 20, 22, 30, 34])
    monkeypatch.setattr(flops, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    assert measure_matmul(torch.device("cpu"), torch.float32, size=32, repeats=3) == 2 * 32**3 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_measurement_is_of_this_worlds_order(dtype):
    assert 1e7 < measure_matmul(torch.device("cpu"), dtype, size=256) < 1e14
