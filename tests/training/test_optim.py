"""What decays, and AdamW against its formula."""

import numpy as np
import pytest
import torch

from encore.models.gpt2 import GPT2, GPT2Config
from encore.models.nanochat import NanoChat, NanoChatConfig
from encore.training.muon import Muon
from encore.training.optim import decay_groups, describe_groups, make_adamw, make_muon

MODEL = GPT2Config(vocab_size=70, block_size=8, n_layer=2, n_head=2, n_embd=16, bias=True)


def test_matrices_and_embeddings_decay_and_vectors_do_not():
    model = GPT2(MODEL)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    linear = [f"{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    expected = {"wte.weight", "wpe.weight"} | {f"h.{layer}.{name}" for layer in range(2) for name in linear}
    assert {names[id(parameter)] for parameter in decayed["params"]} == expected
    assert {names[id(parameter)] for parameter in plain["params"]} == set(names.values()) - expected


def test_every_parameter_is_in_exactly_one_group():
    model = GPT2(MODEL)
    optimizer = make_adamw(model, 1e-3, (0.9, 0.95), 0.1)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


def test_frozen_parameters_are_left_out():
    model = GPT2(MODEL)
    model.wpe.weight.requires_grad_(False)
    assert all(parameter is not model.wpe.weight for group in decay_groups(model, 0.1) for parameter in group["params"])


def adamw_by_hand(weights, gradients, lr, beta1, beta2, decay):
    """Algorithm 2 of Loshchilov and Hutter 2019, with eps 1e-8 outside the root."""
    m, v = np.zeros_like(weights), np.zeros_like(weights)
    for step, gradient in enumerate(gradients, 1):
        weights = weights - lr * decay * weights
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        weights = weights - lr * (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + 1e-8)
    return weights


@pytest.mark.parametrize("steps", [1, 4])
def test_steps_follow_the_formula(steps):
    random = np.random.default_rng(0)
    layer = torch.nn.Linear(5, 3).double()
    optimizer = make_adamw(layer, 0.03, (0.8, 0.95), 0.4)
    start = {name: parameter.detach().numpy().copy() for name, parameter in layer.named_parameters()}
    gradients = {name: [random.normal(size=value.shape) for _ in range(steps)] for name, value in start.items()}
    for step in range(steps):
        for name, parameter in layer.named_parameters():
            parameter.grad = torch.from_numpy(gradients[name][step])
        optimizer.step()
    for name, parameter in layer.named_parameters():
        decay = 0.4 if name == "weight" else 0.0
        expected = adamw_by_hand(start[name], gradients[name], 0.03, 0.8, 0.95, decay)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, err_msg=name)


def test_the_description_counts_tensors_and_numbers():
    assert describe_groups([make_adamw(torch.nn.Linear(50, 30), 0.1, (0.9, 0.95), 0.1)]) == (
        "1 tensor (1,500 numbers) by AdamW at 0.1 with weight decay 0.1, "
        "1 tensor (30 numbers) by AdamW at 0.1 with weight decay 0.0"
    )


RATES = {"learning_rate": 0.02, "embedding_lr": 0.3, "head_lr": 0.004, "betas": (0.8, 0.95), "weight_decay": 0.1}


def test_muon_has_the_matrices_of_the_layers_and_adamw_the_rest():
    nanochat = NanoChat(NanoChatConfig(vocab_size=70, block_size=8, n_layer=2, n_head=2, n_embd=16))
    gpt2 = GPT2(MODEL)
    head, embedding = nanochat.lm_head.weight, nanochat.embed_tokens.weight
    muon, adamw = make_muon(nanochat, **RATES)
    assert type(muon) is Muon
    assert sorted(map(id, muon.param_groups[0]["params"])) == sorted(map(id, nanochat.layers.parameters()))
    assert muon.param_groups[0]["weight_decay"] == 0.1
    assert [(group["params"], group["initial_lr"]) for group in adamw.param_groups] == [
        ([embedding], 0.3),
        ([head], 0.004),
    ]
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.0, 0.0]

    muon, adamw = make_muon(gpt2, **RATES)
    names = {id(parameter): name for name, parameter in gpt2.named_parameters()}
    by_muon = {names[id(parameter)] for parameter in muon.param_groups[0]["params"]}
    assert by_muon == {
        name for name in names.values() if name.startswith("h.") and "ln_" not in name and "bias" not in name
    }
    (group,) = adamw.param_groups
    assert {names[id(parameter)] for parameter in group["params"]} == set(names.values()) - by_muon


def test_what_nanochat_plus_adds_learns_as_embeddings():
    config = NanoChatConfig(vocab_size=70, block_size=8, n_layer=3, n_head=2, n_embd=16, plus=True)
    model = NanoChat(config)
    _, adamw = make_muon(model, **RATES)
    group = adamw.param_groups[0]
    assert group["initial_lr"] == 0.3
    wanted = [model.smear, model.embed_tokens.weight, model.value_embeds["0"].weight, model.value_embeds["2"].weight]
    assert sorted(map(id, group["params"])) == sorted(map(id, wanted))


def test_a_step_of_muon_is_of_the_size_of_its_learning_rate_in_every_direction():
    """The gradient's singular vectors, each with a singular value of about 1: five Newton-Schulz steps with these
    coefficients leave them between 0.68 and 1.14 (Jordan et al. 2024)."""
    torch.manual_seed(0)
    model = NanoChat(NanoChatConfig(vocab_size=70, block_size=8, n_layer=1, n_head=2, n_embd=16))
    muon, _ = make_muon(model, **{**RATES, "weight_decay": 0.0})
    before = {name: parameter.detach().clone() for name, parameter in model.layers.named_parameters()}
    for parameter in model.layers.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    muon.step()
    for name, parameter in model.layers.named_parameters():
        rows, columns = parameter.shape
        step = (before[name] - parameter.detach()) / (0.02 * max(1, rows / columns) ** 0.5)
        left, _, right = torch.linalg.svd(parameter.grad, full_matrices=False)
        values = (left.T @ step @ right.T).diagonal()
        assert values.min() > 0.6, name
        assert values.max() < 1.25, name


def test_muon_without_a_gradient_changes_nothing():
    model = NanoChat(NanoChatConfig(vocab_size=70, block_size=8, n_layer=1, n_head=2, n_embd=16))
    muon, _ = make_muon(model, **RATES)
    weight = model.layers[0].mlp.fc1.weight
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    muon.step()
    assert torch.equal(weight, before)
