"""The loss in parts against torch's own over all scores at once, in float64."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from encore.models import cross_entropy
from encore.models.cross_entropy import cross_entropies, mean_cross_entropy

N, C, V = 50, 8, 301
PARTS = {"one part": 50, "just one part more": 49, "a shorter last part": 8, "parts alike": 10, "a token each": 1}


def make_inputs(rows=V):
    """x, a weight of so many rows, and targets, among them the first and the last id."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, C, generator=generator).requires_grad_()
    weight = torch.randn(rows, C, generator=generator).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[:3] = torch.tensor([0, V - 1, V - 1])
    return x, weight, targets


def reference(x, weight, targets, reduction="mean"):
    scores = F.linear(x.double(), weight[:V].double())
    return F.cross_entropy(scores, targets, reduction=reduction)


def gradients(value, *tensors):
    return torch.autograd.grad(value, tensors)


def assert_near(actual, expected, relative=1e-5):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


@pytest.fixture(params=PARTS.values(), ids=PARTS)
def tokens_at_once(request, monkeypatch):
    """How many tokens have their scores at the same time, where the weight has 19 rows of padding."""
    monkeypatch.setattr(cross_entropy, "SCORES_AT_ONCE", request.param * (V + 19))
    return request.param


@pytest.mark.parametrize("rows", [V, V + 19], ids=["no padding", "padding"])
def test_loss_and_gradients_are_those_of_all_scores_at_once(tokens_at_once, rows):
    x, weight, targets = make_inputs(rows)
    value, expected = mean_cross_entropy(x, weight, targets, V), reference(x, weight, targets)
    assert value.dtype == torch.float32
    assert_near(value, expected)
    for mine, right in zip(gradients(value, x, weight), gradients(expected, x, weight), strict=True):
        assert mine.dtype == torch.float32
        assert_near(mine, right)


@pytest.mark.parametrize("rows", [V, V + 19], ids=["no padding", "padding"])
def test_capped_scores_too(tokens_at_once, rows):
    """At a cap that bends all of them: 2, where the scores' deviation is 2.8."""
    x, weight, targets = make_inputs(rows)
    scores = 2 * torch.tanh(F.linear(x.double(), weight[:V].double()) / 2)
    expected = F.cross_entropy(scores, targets, reduction="none")
    value = mean_cross_entropy(x, weight, targets, V, cap=2.0)
    assert_near(value, expected.mean())
    assert ((cross_entropies(x, weight, targets, V, cap=2.0) - expected).abs() <= 1e-5 * expected).all()
    pairs = zip(gradients(value, x, weight), gradients(expected.mean(), x, weight), strict=True)
    for mine, right in pairs:
        assert_near(mine, right)


def test_each_loss_is_that_of_its_target(tokens_at_once):
    x, weight, targets = make_inputs(V + 19)
    losses = cross_entropies(x, weight, targets, V)
    assert losses.dtype == torch.float32
    assert not losses.requires_grad
    expected = reference(x, weight, targets, "none")
    assert ((losses - expected).abs() <= 1e-5 * expected).all()


def test_padding_never_matters(tokens_at_once):
    x, weight, targets = make_inputs(V + 19)

    def compute():
        value = mean_cross_entropy(x, weight, targets, V)
        return [value, *gradients(value, x, weight), cross_entropies(x, weight, targets, V)]

    before = compute()
    assert not before[2][V:].any()
    with torch.no_grad():
        weight[V:] = 1e4
    for mine, right in zip(compute(), before, strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("factor", [0.25, -3.0, 65536.0])
def test_gradients_follow_what_is_made_of_the_loss(tokens_at_once, factor):
    """A share of an accumulated step, or the scale that float16 trains with; and x and weight come from elsewhere."""
    x, weight, targets = make_inputs()
    value = mean_cross_entropy(x.sin(), 2 * weight, targets, V) * factor
    expected = reference(x.sin(), 2 * weight, targets) * factor
    for mine, right in zip(gradients(value, x, weight), gradients(expected, x, weight), strict=True):
        assert_near(mine, right)


def test_scores_far_from_zero_stay_finite():
    x, weight, targets = make_inputs()
    with torch.no_grad():
        weight *= 1e4
    value, expected = mean_cross_entropy(x, weight, targets, V), reference(x, weight, targets)
    assert expected > 1e4
    assert_near(value, expected)
    for gradient in gradients(value, x, weight):
        assert gradient.isfinite().all()


def test_under_autocast_products_alone_are_rounded(tokens_at_once):
    """bfloat16 has 8 bits: what is computed of the rounded scores agrees as in float32, and gradients to 2 in 100."""
    x, weight, targets = make_inputs(V + 19)
    with torch.autocast("cpu", torch.bfloat16):
        value = mean_cross_entropy(x, weight, targets, V)
        losses = cross_entropies(x, weight, targets, V)
        scores = F.linear(x, weight[:V])
    assert scores.dtype == torch.bfloat16
    expected = F.cross_entropy(scores.double(), targets, reduction="none")
    assert ((losses - expected).abs() <= 1e-5 * expected).all()
    assert_near(value, expected.mean())
    assert (losses.dtype, value.dtype) == (torch.float32, torch.float32)
    exact = reference(x, weight, targets)
    for mine, right in zip(gradients(value, x, weight), gradients(exact, x, weight), strict=True):
        assert mine.dtype == torch.float32
        assert_near(mine, right, relative=0.02)


class Largest(TorchDispatchMode):
    """Notes the numbers of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_the_scores_of_all_tokens_are_never_held_at_once(monkeypatch):
    x, weight, targets = make_inputs()
    with Largest() as plain:
        gradients(reference(x, weight, targets), x, weight)
    assert plain.numbers == N * V
    for tokens in (9, 10):  # the last of 9 times 301, and one more than fit
        monkeypatch.setattr(cross_entropy, "SCORES_AT_ONCE", tokens * V + V - 1)
        with Largest() as mine:
            gradients(mean_cross_entropy(x, weight, targets, V), x, weight)
            cross_entropies(x, weight, targets, V)
        assert mine.numbers == tokens * V


def test_the_compiler_takes_the_size_of_the_parts_as_torch_s_own_mark_would_have_it():
    def marked():
        pass

    torch.compiler.assume_constant_result(marked)
    assert vars(cross_entropy.scores_at_once).items() >= vars(marked).items() != set()


IMPORTS = """
import sys, torch
from encore.models.cross_entropy import mean_cross_entropy
x, weight = (torch.ones(count, 4, requires_grad=True) for count in (3, 7))
mean_cross_entropy(x, weight, torch.tensor([0, 1, 2]), 7).backward()
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.slow
def test_as_it_is_written_it_does_not_load_the_compiler():
    """In a process of its own, and not by a fork of one that has it."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True], ids=["for a CPU", "for a GPU"])
def test_traced_for_the_compiler_it_is_the_same(fused, monkeypatch):
    """As one graph, in several parts; test_trainer.py goes on to machine code."""
    monkeypatch.setattr(cross_entropy, "_is_fused", lambda x: fused and torch.compiler.is_compiling())
    monkeypatch.setattr(cross_entropy, "SCORES_AT_ONCE", 20 * (V + 19))
    x, weight, targets = make_inputs(V + 19)

    def compute(x, weight, targets):
        return 2 * mean_cross_entropy(x.sin(), weight, targets, V)

    torch.compiler.reset()
    value = torch.compile(compute, backend="aot_eager", fullgraph=True)(x, weight, targets)
    expected = compute(x, weight, targets)
    assert_near(value, expected)
    for mine, right in zip(gradients(value, x, weight), gradients(expected, x, weight), strict=True):
        assert_near(mine, right)
    torch.compiler.reset()
