"""Losses against plain cross-entropy in float64, document by document, and what an evaluation must leave alone."""

import copy
import math
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from encore.devices.distributed import Ranks
from encore.evaluation.losses import SplitLoss, evaluate_split, find_document_ends, sum_losses
from encore.models.gpt2 import GPT2, GPT2Config
from encore.tokens.batches import Windows
from encore.tokens.token_files import TokenSplit

CPU = torch.device("cpu")
DOCUMENT_ENDS = [0, 40, 41, 300, 517, 699]  # in the val split; the first document is its end-of-text token alone


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
    """The val split of 700 tokens, of which some are made the ends of documents."""
    tokens = np.fromfile(tokens_folder / "val_00000.bin", "<u2")
    tokens[tokens == 299] = 0
    tokens[DOCUMENT_ENDS] = 299
    tokens.tofile(tokens_folder / "val_00000.bin")
    return Windows(TokenSplit(tokens_folder, "val"), 16, "val")


@torch.no_grad()
def losses_by_hand(model, tokens):
    """The loss of each token but the first: window after window, in float64, without the model's own loss functions."""
    model, losses = copy.deepcopy(model).double().eval(), []
    for start in range(0, len(tokens) - 1, 16):
        window = torch.from_numpy(tokens[start : start + 17].astype(np.int64))
        losses += F.cross_entropy(model.logits(window[None, :-1])[0], window[1:], reduction="none").tolist()
    return losses


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_every_target_counts_once_whatever_the_batch_size(model, windows, batch_size):
    tokens = windows.split.read(0, 700)
    expected = losses_by_hand(model, tokens)
    nats, counts, at = [0.0] * 6, [0] * 6, [[] for _ in range(16)]
    document = 1  # token 0 ends the first
    for target, loss in enumerate(expected, start=1):
        nats[document] += loss
        counts[document] += 1
        at[(target - 1) % 16].append(loss)
        document += tokens[target] == 299
    result = evaluate_split(model, windows, batch_size, CPU, torch.float32)
    assert result.tokens.tolist() == counts == [0, 40, 1, 259, 217, 182]
    assert result.nats == pytest.approx(nats, rel=1e-6)
    assert result.loss == pytest.approx(sum(expected) / 699, rel=1e-6)
    assert result.loss_by_position == pytest.approx([sum(part) / len(part) for part in at], rel=1e-6)
    assert result.text_bytes == 3 * 700


@torch.no_grad()
def test_masked_documents_have_the_losses_that_they_have_alone(model, windows):
    """Each is cut out of its window, from the end-of-text token before it on, and computed without a mask."""
    plain, tokens = copy.deepcopy(model).double().eval(), windows.split.read(0, 700).astype(np.int64)
    nats = [0.0] * 6
    for start in range(0, 699, 16):
        end = min(start + 16, 699)
        cuts = sorted({start, end, *(place for place in DOCUMENT_ENDS if start < place < end)})
        for begin, stop in pairwise(cuts):
            idx, targets = torch.from_numpy(tokens[begin:stop]), torch.from_numpy(tokens[begin + 1 : stop + 1])
            document = np.searchsorted(DOCUMENT_ENDS, begin + 1)  # of the first target, and so of all
            nats[document] += F.cross_entropy(plain.logits(idx[None])[0], targets, reduction="sum").item()
    unmasked = evaluate_split(model, windows, 4, CPU, torch.float32)
    model.config = replace(model.config, document_masking=True)
    result = evaluate_split(model, windows, 4, CPU, torch.float32)
    assert result.nats == pytest.approx(nats, rel=1e-6)
    assert result.tokens.tolist() == unmasked.tokens.tolist()
    assert abs(result.loss - unmasked.loss) > 1e-3
    during_training = sum_losses(model, (batch for _, batch in windows.every_token(4)), CPU, torch.float32)
    assert during_training.nats == pytest.approx(sum(nats), rel=1e-6)


def test_ranks_add_up_to_the_whole(model, windows):
    """What each of three ranks has before they sum, which is tests/stages/test_evaluate.py's."""
    whole = evaluate_split(model, windows, 4, CPU, torch.float32)
    shares = [evaluate_split(model, windows, 4, CPU, torch.float32, Mute(rank, 3)) for rank in range(3)]
    for name in ("nats", "tokens", "nats_at", "tokens_at"):
        assert sum(getattr(share, name) for share in shares) == pytest.approx(getattr(whole, name), rel=1e-6)


class Mute(Ranks):
    """A rank that hears nobody."""

    def sum(self, tensor):
        return tensor


@pytest.mark.slow
def test_a_compiled_evaluation_is_the_plain_one(windows, traced):
    """Three windows and no rest, which would be another shape to compile."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=300, block_size=233, n_layer=1, n_head=2, n_embd=32, bias=False))
    long_windows = Windows(windows.split, 233, "val")
    plain = evaluate_split(model, long_windows, 3, CPU, torch.float32)
    model.token_losses = torch.compile(model.token_losses)
    compiled = evaluate_split(model, long_windows, 3, CPU, torch.float32)
    assert compiled.nats == pytest.approx(plain.nats, rel=1e-6)
    assert compiled.loss_by_position == pytest.approx(plain.loss_by_position, rel=1e-5)


def test_the_standard_error_is_that_of_drawing_documents():
    """Against the spread of the loss over 4,000 draws of whole documents."""
    random = np.random.default_rng(0)
    tokens = random.integers(5, 500, 300).astype(float)
    nats = tokens * (3 + random.normal(0, 0.5, 300))
    result = SplitLoss(nats, tokens, np.zeros(1), np.zeros(1), 1)
    drawn = random.integers(0, 300, (4000, 300))
    losses = nats[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    assert result.standard_error == pytest.approx(losses.std(), rel=0.05)
    assert result.standard_error > 5 * losses.std() / math.sqrt(tokens.mean())  # what counting tokens would promise


def test_documents_of_equal_length_have_the_textbooks_standard_error():
    nats = np.array([10.0, 12.0, 17.0])
    result = SplitLoss(nats, np.full(3, 4.0), np.zeros(1), np.zeros(1), 1)
    assert result.standard_error == pytest.approx((nats / 4).std(ddof=1) / math.sqrt(3))
    assert SplitLoss(nats[:1], np.full(1, 4.0), np.zeros(1), np.zeros(1), 1).standard_error is None


def test_document_ends_are_found_across_the_pieces(windows, monkeypatch):
    monkeypatch.setattr("encore.evaluation.losses.TOKENS_AT_ONCE", 41)
    assert find_document_ends(windows.split).tolist() == DOCUMENT_ENDS


def test_a_sixteen_bit_evaluation_is_near(model, windows):
    exact = evaluate_split(model, windows, 16, CPU, torch.float32)
    rounded = evaluate_split(model, windows, 16, CPU, torch.bfloat16)
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=0.01)


def test_the_quick_look_is_the_mean_of_its_windows(model, windows):
    expected = losses_by_hand(model, windows.split.read(0, 700))
    summed = sum_losses(model, windows.in_batches(np.array([0, 1, 2, 7]), 3), CPU, torch.float32)
    assert summed.tokens == 64
    assert summed.mean == pytest.approx((sum(expected[:48]) + sum(expected[112:128])) / 64, rel=1e-6)


def test_perplexity_and_bits_per_byte():
    total = SplitLoss(np.array([12 * math.log(2)]), np.array([4]), np.zeros(1), np.zeros(1), text_bytes=48)
    assert total.loss == pytest.approx(3 * math.log(2))
    assert total.perplexity == pytest.approx(8)
    assert total.bits_per_byte == pytest.approx(0.25)
    assert math.isfinite(SplitLoss(np.array([1e6]), np.ones(1), np.zeros(1), np.zeros(1), 1).perplexity)


@pytest.mark.parametrize("training", [True, False])
def test_mode_weights_gradients_and_randomness_are_left_as_they_were(model, windows, training):
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    evaluate_split(model, windows, 4, CPU, torch.float32)
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
    sum_losses(model, windows.in_batches(np.arange(4), 4), CPU, torch.float32)
    assert seen
    assert not any(seen)
    assert torch.is_grad_enabled()
