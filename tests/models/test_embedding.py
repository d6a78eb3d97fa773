"""Rows and their gradients against torch's own sums in float64."""

import shutil

import pytest
import torch
from torch.nn import functional as F

from encore.devices.device import set_up_numerics
from encore.models.embedding import LONGEST_RUN, find_occurrences, look_up, sort_occurrences

# Ids that stand once, as often as a run is long, once more, and very often; rows that have none.
CASES = {
    "each once": torch.arange(10).flip(0),
    "a run, and one more": torch.tensor([3] * LONGEST_RUN + [5] * (LONGEST_RUN + 1)),
    "one id everywhere": torch.full((7 * LONGEST_RUN + 3,), 4),
    "many": (torch.rand(2000, generator=torch.Generator().manual_seed(0)) ** 6 * 40).long(),
    "a single one": torch.tensor([9]),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("ids", CASES.values(), ids=CASES)
def test_rows_and_gradients_are_those_of_torch(ids, compiled):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 6, generator=generator, requires_grad=True)
    grad = torch.randn(1, len(ids), 6, generator=generator)

    def rows_of(weight, idx):
        return look_up(weight, idx, sort_occurrences(idx, 40))

    torch.compiler.reset()
    function = torch.compile(rows_of, backend="aot_eager", fullgraph=True) if compiled else rows_of
    rows = function(weight, ids[None])
    assert torch.equal(rows, F.embedding(ids[None], weight))
    (actual,) = torch.autograd.grad(rows, weight, grad)
    expected = torch.zeros(40, 6, dtype=torch.float64).index_add_(0, ids, grad[0].double())
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert not actual[torch.bincount(ids, minlength=40) == 0].any()
    torch.compiler.reset()


def test_a_long_sum_is_one_of_short_ones():
    """Each thread adds LONGEST_RUN rows at most, so the places are cut there."""
    places, runs, first_runs = sort_occurrences(torch.full((1, 100), 2), 4)
    assert places.tolist() == list(range(100))  # in their order: the same sum each time
    assert runs.tolist() == [0, 0, 0, 0, 32, 64, 96, 100]
    assert first_runs.tolist() == [0, 0, 0, 7]


def test_torchs_own_gradient_serves_where_there_is_no_gpu():
    assert find_occurrences(torch.zeros(1, 4, dtype=torch.int64), 4) is None


@pytest.fixture
def four_threads_that_repeat():
    """With the settings of a run on a CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    set_up_numerics(torch.device("cpu"))
    yield
    torch.set_num_threads(threads)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs g++")
def test_compiled_for_a_cpu_the_gradient_is_the_same_each_time(four_threads_that_repeat, compiler):
    """Each thread has places of all ids. By default the compiler lets them add in the order in which they come."""
    weight = torch.randn(16, 128, requires_grad=True)
    idx, grad = torch.arange(16).repeat(512).reshape(16, 512), torch.randn(16, 512, 128)
    compiled = torch.compile(lambda: (look_up(weight, idx, find_occurrences(idx, 16)) * grad).sum())
    assert len({torch.autograd.grad(compiled(), weight)[0].numpy().tobytes() for _ in range(50)}) == 1
