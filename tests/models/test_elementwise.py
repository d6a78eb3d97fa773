"""Norm and squared ReLU against torch's own operations and their gradients."""

import pytest
import torch
from torch.nn import functional as F

from encore.models.elementwise import EPS, rms_norm, squared_relu
from tests.small_models import assert_near

REFERENCES = {
    rms_norm: lambda x: F.rms_norm(x, (x.shape[-1],), eps=EPS),
    squared_relu: lambda x: F.relu(x).square(),
}


def apply(function, x, grad):
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(grad)
    return y.detach(), x.grad


@pytest.mark.parametrize(("ours", "reference"), REFERENCES.items(), ids=["norm", "relu"])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_torch(ours, reference, dtype, relative):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 5, 7, 48, generator=generator, dtype=torch.float64).to(dtype)
    for actual, expected, what in zip(
        apply(ours, x, grad), apply(reference, x.double(), grad.double()), ("value", "gradient"), strict=True
    ):
        assert actual.dtype == dtype
        assert_near(actual.double(), expected, what, relative=relative)


@pytest.mark.parametrize("function", REFERENCES)
def test_numerical_gradients(function):
    x = torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))


def test_a_vector_of_zeros_stays_one():
    y, grad = apply(rms_norm, torch.zeros(2, 8), torch.ones(2, 8))
    assert not y.any()
    assert torch.allclose(grad, torch.full((2, 8), EPS**-0.5), rtol=1e-6)
