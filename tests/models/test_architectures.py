"""What is asked of every architecture: its losses, its padding, what a token may know of, and what it keeps."""

from dataclasses import replace

import pytest
import torch

from encore.models.architectures import make_model
from encore.models.gpt2 import GPT2Config
from encore.models.kv_cache import Cache
from encore.models.nanochat import NanoChatConfig
from tests.small_models import assert_near, make_tokens

SHAPE = {"vocab_size": 301, "block_size": 24, "n_layer": 3, "n_head": 4, "n_embd": 32}
CONFIGS = {
    "gpt2": GPT2Config(**SHAPE, bias=True),
    "gpt2 without biases": GPT2Config(**SHAPE, bias=False),
    "nanochat": NanoChatConfig(**SHAPE),
    "nanochat-plus": NanoChatConfig(**SHAPE, plus=True),
}


def random_model(config):
    """Every number is random, those too that start as zeros and ones."""
    torch.manual_seed(0)
    model = make_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def model(request):
    return random_model(request.param)


def test_token_losses_are_the_negative_log_probabilities_of_the_targets(model):
    tokens = make_tokens()
    idx, targets = tokens[:, :-1], tokens[:, 1:]
    expected = -model.logits(idx).double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    losses = model.token_losses(idx, targets)
    assert losses.dtype == torch.float32
    assert_near(losses.double(), expected, "token losses")
    assert_near(model(idx, targets).double(), expected.mean(), "mean loss")


def test_padding_is_not_in_the_logits_the_loss_or_the_gradient(model):
    tokens = make_tokens()
    padded = [parameter for parameter in model.parameters() if len(parameter) == 320]
    assert padded
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert model.logits(tokens).shape == (3, 21, 301)
    assert not any(parameter.grad[301:].any() for parameter in padded)
    with torch.no_grad():
        for parameter in padded:
            parameter[301:] = 1e4
    assert model(tokens[:, :-1], tokens[:, 1:]).item() == loss.item()


def test_a_token_changes_its_own_and_later_logits_and_none_before(model):
    tokens = make_tokens()
    before = model.logits(tokens)
    for position in (0, 7, 20):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 301
        difference = (model.logits(changed) - before).abs().amax(dim=(0, 2))
        assert not difference[:position].any()
        assert (difference[position:] > 1e-4).all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_position_matters(config):
    """Behind the same two tokens in another order, which one layer of attention does not see but by their positions."""
    model = random_model(replace(config, n_layer=1))
    there, back = (model.logits(torch.tensor([order]))[0, -1] for order in ([5, 6, 7], [6, 5, 7]))
    assert (there - back).abs().max() > 1e-3


@pytest.mark.parametrize("first", [1, 3, 20])
def test_scores_behind_kept_tokens_are_those_of_the_whole_text(model, first):
    idx, cache = make_tokens(), Cache(3, size=24)
    with torch.no_grad():
        whole = model.logits(idx)
        parts = [model.logits(idx[:, :first], cache)]
        for position in range(first, 21):
            assert cache.length == position
            parts.append(model.logits(idx[:, position : position + 1], cache))
    assert_near(torch.cat(parts, dim=1), whole, "scores")


@pytest.mark.parametrize("first", [1, 20])
def test_passes_of_one_shape_in_the_same_memory_give_these_scores_too(model, first):
    """What a recording of a pass needs (encore/models/cuda_graph.py): the position is a tensor, and nothing moves."""
    idx, cache = make_tokens(), Cache(3, size=24)
    with torch.no_grad():
        whole = model.logits(idx)
        model.logits(idx[:, :first], cache)
        cache.position = torch.tensor([cache.length])
        memory = [tensor.data_ptr() for layer in cache.layers for tensor in layer]
        for position in range(first, 21):
            scores = model.logits(idx[:, position : position + 1], cache)
            assert_near(scores, whole[:, position : position + 1], "scores")
            assert cache.position.tolist() == [position + 1]
    assert memory == [tensor.data_ptr() for layer in cache.layers for tensor in layer]
