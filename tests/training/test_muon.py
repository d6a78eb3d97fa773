"""Muon on stacked matrices against torch.optim.Muon, which takes them one by one."""

import pytest
import torch

from encore.training import muon
from encore.training.muon import Muon, orthogonalize

# Some of a shape, its transpose, a square, a single row, and one that is alone.
SHAPES = [(24, 8), (8, 24), (16, 16), (24, 8), (1, 24), (16, 16), (16, 16), (5, 7)]


def make_matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("numbers_at_once", [2**26, 400, 1], ids=["all", "two at a time", "one by one"])
def test_ten_steps_are_those_of_torch(numbers_at_once, monkeypatch):
    """Both round to bfloat16 on the way: so much as 3 in 100 of a step."""
    monkeypatch.setattr(muon, "NUMBERS_AT_ONCE", numbers_at_once)
    ours, theirs = ([torch.nn.Parameter(matrix.clone()) for matrix in make_matrices(0)] for _ in range(2))
    mine = Muon(ours, 0.02, weight_decay=0.0)
    right = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, momentum=0.95)
    for step in range(10):
        for parameter, other, gradient in zip(ours, theirs, make_matrices(step + 1), strict=True):
            parameter.grad, other.grad = gradient, gradient.clone()
        if step == 7:
            ours[2].grad = theirs[2].grad = None  # has no part in this step
        before = [parameter.detach().clone() for parameter in ours]
        mine.step()
        right.step()
        for parameter, other, old in zip(ours, theirs, before, strict=True):
            assert torch.allclose(parameter, other, rtol=0, atol=0.03 * 0.02 * (step + 1) * parameter.shape[0] ** 0.5)
            assert (parameter is ours[2] and step == 7) == torch.equal(parameter, old)
    for parameter, other in zip(ours, theirs, strict=True):
        moments = (mine.state[parameter]["momentum_buffer"], right.state[other]["momentum_buffer"])
        assert torch.equal(*moments)


def test_what_a_step_moves_towards_zero_decays_with_the_schedule():
    """Against torch's steps without decay, which do not depend on the weights. The matrices are small, so that some
    numbers move towards zero and some away."""
    ours, theirs = ([torch.nn.Parameter(matrix / 10) for matrix in make_matrices(0)] for _ in range(2))
    mine = Muon(ours, 0.02, weight_decay=20.0)
    right = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, momentum=0.95)
    decayed = 0
    for step, rate in enumerate((0.02, 0.015, 0.005)):
        mine.param_groups[0]["lr"] = right.param_groups[0]["lr"] = rate
        for parameter, other, gradient in zip(ours, theirs, make_matrices(step + 1), strict=True):
            parameter.grad, other.grad = gradient, gradient.clone()
        before = [[parameter.detach().double() for parameter in group] for group in (ours, theirs)]
        mine.step()
        right.step()
        for parameter, other, old, old_other in zip(ours, theirs, *before, strict=True):
            move = other.detach().double() - old_other
            towards_zero = move * old < 0
            decayed += int(towards_zero.sum())
            expected = old * (1 - rate * 20.0 * (rate / 0.02) * towards_zero) + move
            clear = move.abs() > 0.01 * rate  # of the others rounding may turn the sign
            assert torch.allclose(parameter[clear].double(), expected[clear], rtol=0, atol=0.03 * rate * 24**0.5)
            assert clear.double().mean() > 0.8
    assert decayed > 100


def test_every_singular_value_comes_near_one():
    """Of matrices whose largest is a hundred times the smallest."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(3, 8, 8, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(3, 20, 8, generator=generator))
    values = torch.linalg.svdvals(orthogonalize(u @ torch.logspace(0, -2, 8).diag() @ v.mT).float())
    assert ((values > 0.6) & (values < 1.25)).all(), values
