"""What the compiler makes of each architecture, against the code as it is written and a float64 reference; and the
check that each process makes of it before its first step."""

import copy
import re
import shutil
from dataclasses import replace

import pytest
import torch

from encore.devices.device import autocast
from encore.devices.distributed import ALONE
from encore.errors import EncoreError
from encore.models import cross_entropy, nanochat
from encore.training.compiled_check import LARGEST_ERROR, check_compiled
from tests.conftest import MODERN
from tests.models.test_architectures import CONFIGS, random_model
from tests.small_models import make_tokens
from tests.small_runs import small_machine, trainer_in, weights_of

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
CASES = CONFIGS | {f"{name}, masked": replace(config, document_masking=True) for name, config in CONFIGS.items()}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs g++")


def compute(forward, model, idx, targets, dtype):
    """The loss and every gradient."""
    model.zero_grad()
    with autocast(CPU, dtype):
        loss = forward(idx, targets)
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad.clone() for name, parameter in model.named_parameters()}}


def errors(actual, expected):
    return {name: ((actual[name].double() - right).norm() / right.norm()).item() for name, right in expected.items()}


@needs_compiler
@pytest.mark.parametrize(
    ("name", "backend", "dtype", "loss"),
    [
        # Down to kernels, half a minute: the model that has all of ours. bench.gpu tries each, in each type, on a card.
        ("nanochat-plus", "inductor", torch.float32, "fused"),
        ("nanochat-plus, masked", "inductor", torch.float32, "whole"),
        *((name, "aot_eager", dtype, "fused") for name in CASES for dtype in (torch.float32, torch.bfloat16)),
        *((name, "aot_eager", dtype, "whole") for name in CONFIGS for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_loss_and_every_gradient_compiled_are_those_of_float64(name, backend, dtype, loss, compiler, monkeypatch):
    """In parts, so that their sum is compiled too. The loss is fused, as for a GPU, or left whole, as for a CPU. 16
    bits round by 4 in 1000; a tensor's error is at most 3 in 100 of its norm, compiled or not. A gradient that is lost
    is off by 100 in 100."""
    monkeypatch.setattr(cross_entropy, "SCORES_AT_ONCE", 40 * 320)
    monkeypatch.setattr(cross_entropy, "_is_fused", lambda x: loss == "fused" and torch.compiler.is_compiling())
    model, tokens = random_model(replace(CASES[name], n_layer=1)).train(), make_tokens(4, 17)
    tokens[:, [5, 11]] = 300  # end-of-text
    with torch.no_grad():  # as large as training makes them
        for parameter in model.parameters():
            parameter.mul_(0.3)
    idx, targets = tokens[:, :-1], tokens[:, 1:]
    exact = copy.deepcopy(model).double()
    expected = compute(exact, exact, idx, targets, torch.float32)
    torch.compiler.reset()
    for forward in (model, torch.compile(model, fullgraph=True, backend=backend)):
        found = errors(compute(forward, model, idx, targets, dtype), expected)
        assert max(found.values()) < (1e-5 if dtype == torch.float32 else 0.03), found
    torch.compiler.reset()


@pytest.fixture
def make_trainer(tmp_path, tokens_folder, tiny_params):
    with small_machine():
        yield lambda run, **changes: trainer_in(
            tmp_path / run, tokens_folder, tiny_params(**{"dtype": "float32", "compile": True, **changes})
        )


def test_a_norm_whose_gradient_is_lost_in_compiling_is_refused_before_any_step(make_trainer, traced, monkeypatch):
    right = nanochat.rms_norm

    def wrong(x):
        return right(x).detach() if torch.compiler.is_compiling() else right(x)

    monkeypatch.setattr(nanochat, "rms_norm", wrong)
    message = re.escape(
        f"compiled by torch {torch.__version__} for cpu in float32, the gradient of embed_tokens.weight is off by "
        "100%; no step was taken. Set compile: false or install another version of torch"
    )
    with pytest.raises(EncoreError, match=f"^{message}$"):
        make_trainer("wrong", **MODERN, n_layer=1)


def test_the_check_leaves_weights_and_gradients_as_they_were_and_compiles_nothing_twice(make_trainer, traced):
    from torch._dynamo.utils import counters

    plain = weights_of(make_trainer("plain", compile=False, n_layer=1))
    counters.clear()
    trainer = make_trainer("compiled", n_layer=1)
    assert counters["stats"]["unique_graphs"] == 1
    assert all(torch.equal(tensor, plain[name]) for name, tensor in weights_of(trainer).items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    trainer.step()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", LARGEST_ERROR)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_equal_but_for_rounding_passes(name, dtype):
    """The model beside itself with products of another order, which is what rounding changes."""
    model, tokens = random_model(CONFIGS[name]).train(), make_tokens(4, 17)

    def other_order(idx, targets):
        half = len(idx) // 2
        return (model(idx[half:], targets[half:]) + model(idx[:half], targets[:half])) / 2

    check_compiled(model, other_order, model, (tokens[:, :-1], tokens[:, 1:]), CPU, dtype, ALONE)


@pytest.mark.parametrize("share", [0.5, 2.0, float("nan")])
def test_a_gradient_of_another_size_is_refused(share):
    model, tokens = random_model(CONFIGS["gpt2"]).train(), make_tokens(4, 17)

    def other_size(idx, targets):
        loss = model(idx, targets)
        return loss.detach() + share * (loss - loss.detach())

    with pytest.raises(EncoreError, match=r"the gradient of wte\.weight is off by (50|100|nan)%; no step was taken"):
        check_compiled(model, other_size, model, (tokens[:, :-1], tokens[:, 1:]), CPU, torch.float32, ALONE)


def test_another_loss_is_refused():
    model, tokens = random_model(CONFIGS["nanochat"]).train(), make_tokens(4, 17)
    with pytest.raises(EncoreError, match=r"the loss is off by 1\d%; no step was taken"):
        check_compiled(
            model, lambda *batch: model(*batch) + 1, model, (tokens[:, :-1], tokens[:, 1:]), CPU, torch.float32, ALONE
        )
