"""Sums of losses against plain cross-entropy in float64, and what an evaluation must leave alone."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from encore.batches import Windows
from encore.evaluation import LossSum, sum_losses
from encore.models.gpt2 import GPT2, GPT2Config
from encore.token_files import TokenSplit

CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32, bias=False, dropout=0.3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model


@pytest.fixture
def windows(tokens_folder):
    return Windows(TokenSplit(tokens_folder, "val"), 16, "val")


def nats_by_hand(model, tokens):
    """Window after window, in float64, without the model's own loss functions."""
    model, nats = copy.deepcopy(model).double().eval(), 0.0
    for start in range(0, len(tokens) - 1, 16):
        window = torch.from_numpy(tokens[start : start + 17].astype(np.int64))
        with torch.no_grad():
            nats += F.cross_entropy(model.logits(window[None, :-1])[0], window[1:], reduction="sum").item()
    return nats


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_every_target_counts_once_whatever_the_batch_size(model, windows, batch_size):
    tokens = windows.split.read(0, 700)
    total = sum_losses(model, windows.every_token(batch_size), CPU, torch.float32)
    assert total.tokens == 699
    assert total.nats == pytest.approx(nats_by_hand(model, tokens), rel=1e-6)
    assert total.mean == total.nats / 699


def test_a_sixteen_bit_evaluation_is_near(model, windows):
    exact = sum_losses(model, windows.every_token(16), CPU, torch.float32)
    rounded = sum_losses(model, windows.every_token(16), CPU, torch.bfloat16)
    assert rounded.nats != exact.nats
    assert rounded.mean == pytest.approx(exact.mean, rel=0.01)


def test_perplexity_and_bits_per_byte():
    total = LossSum(nats=12 * math.log(2), tokens=4)
    assert total.mean == pytest.approx(3 * math.log(2))
    assert total.perplexity == pytest.approx(8)
    assert total.bits_per_byte(48) == pytest.approx(0.25)
    assert math.isfinite(LossSum(nats=1e6, tokens=1).perplexity)


@pytest.mark.parametrize("training", [True, False])
def test_mode_weights_gradients_and_randomness_are_left_as_they_were(model, windows, training):
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    sum_losses(model, windows.every_token(4), CPU, torch.float32)
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert str(np.random.get_state()) == str(states[1])
    assert random.getstate() == states[2]


def test_no_graph_is_built(model, windows):
    assert torch.is_grad_enabled()
    seen = []
    model.ln_f.register_forward_hook(lambda _, inputs, output: seen.append(output.requires_grad))
    sum_losses(model, windows.every_token(16), CPU, torch.float32)
    assert seen
    assert not any(seen)
    assert torch.is_grad_enabled()
