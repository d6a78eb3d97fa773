"""encore/tokens/batches.py: which tokens a step sees is a pure function of (seed, step)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from encore.errors import EncoreError
from encore.tokens.batches import Windows, shuffle
from encore.tokens.token_files import TokenSplit
from tests.conftest import write_tokens

SIZES = (1, 2, 3, 4, 5, 7, 16, 17, 64, 1000, 4096, 4097)


def open_windows(tmp_path: Path, tokens: int, block_size: int) -> tuple[Windows, np.ndarray]:
    """Windows over this many random tokens in shards of 50, and the tokens."""
    ids = np.random.default_rng(tokens).integers(0, 300, tokens)
    write_tokens(tmp_path / "tokens", ids, ids[:2], vocab_size=300, shard_tokens=50)
    return Windows(TokenSplit(tmp_path / "tokens", "train"), block_size, "train"), ids


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", [0, 1, 1337 * 2**32, (2**32 - 1) * 2**32 + 6])
def test_shuffle_is_a_permutation(size: int, key: int) -> None:
    assert sorted(shuffle(np.arange(size), size, key).tolist()) == list(range(size))


def test_an_index_goes_to_the_same_place_whoever_asks() -> None:
    """A step computes its own few places only, and they are those of the whole permutation."""
    whole = shuffle(np.arange(1000), 1000, 42)
    some = np.array([999, 0, 500, 0, 17])
    assert shuffle(some, 1000, 42).tolist() == whole[some].tolist()
    assert shuffle(np.empty(0, np.int64), 1000, 42).tolist() == []


def test_keys_give_unrelated_orders() -> None:
    """Two random permutations of n agree in one place on average; ten is far beyond chance."""
    orders = [shuffle(np.arange(1000), 1000, key) for key in (0, 6, 12, 2**32, 1337 * 2**32)]
    for number, one in enumerate(orders):
        for other in [*orders[:number], np.arange(1000)]:
            assert int((one == other).sum()) < 10


def test_the_order_never_changes() -> None:
    """Pinned: a run's data order is part of what its result depends on. Where this fails, every checkpoint would go
    on with other data than it began with, and no published number could be had again."""
    key = 1337 * 2**32
    assert shuffle(np.arange(7), 7, key).tolist() == [6, 5, 0, 4, 3, 1, 2]
    assert shuffle(np.arange(16), 16, key).tolist() == [6, 7, 8, 4, 11, 9, 10, 5, 13, 1, 2, 12, 15, 0, 14, 3]
    assert shuffle(np.array([0, 1, 10**9, 8_790_000]), 10**9 + 7, key).tolist() == [
        184802698,
        248110622,
        923286277,
        858521292,
    ]


def test_each_place_is_as_likely_as_any_other() -> None:
    """Chi-square over (index, place) of 64 for 2,000 keys: 63 * 63 degrees of freedom, five deviations allowed."""
    size, keys = 64, 2000
    counts = np.zeros((size, size))
    for key in range(0, 6 * keys, 6):
        counts[np.arange(size), shuffle(np.arange(size), size, key)] += 1
    expected = keys / size
    freedom = (size - 1) ** 2
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_neighbours_do_not_stay_together() -> None:
    """The mean distance between neighbours after the shuffle is a third of the size."""
    places = shuffle(np.arange(10_000), 10_000, 99)
    assert np.abs(np.diff(places)).mean() == pytest.approx(10_000 / 3, rel=0.03)


def test_a_batch_is_slices_of_the_tokens(tmp_path: Path) -> None:
    windows, ids = open_windows(tmp_path, 1000, 16)
    assert windows.count == 999 // 16
    inputs, targets = windows.batch(np.array([0, 61, 3, 3]))
    for row, index in enumerate([0, 61, 3, 3]):
        start = 16 * index
        assert inputs[row].tolist() == ids[start : start + 16].tolist()
        assert targets[row].tolist() == ids[start + 1 : start + 17].tolist()
    for tensor in (inputs, targets):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()


@pytest.mark.parametrize(("tokens", "count"), [(16 * 3, 2), (16 * 3 + 1, 3), (16 * 3 + 2, 3), (17, 1)])
def test_a_window_needs_one_token_more_than_its_size(tmp_path: Path, tokens: int, count: int) -> None:
    windows, ids = open_windows(tmp_path, tokens, 16)
    assert windows.count == count
    assert windows.batch(np.array([count - 1]))[1][0, -1] == ids[16 * count]


@pytest.mark.parametrize("windows_per_step", [1, 7, 31, 62, 100, 200])
def test_each_window_comes_once_an_epoch_and_no_step_skips_a_border(tmp_path: Path, windows_per_step: int) -> None:
    """62 windows; a step may take the end of one epoch and the start of the next."""
    windows, _ = open_windows(tmp_path, 1000, 16)
    steps = -(-62 * 4 // windows_per_step)
    sequence = np.concatenate([windows.for_step(step, windows_per_step, 5) for step in range(steps)])
    epochs = [sequence[62 * epoch : 62 * (epoch + 1)] for epoch in range(4)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(62))
    assert len({tuple(epoch) for epoch in epochs}) == 4, "each epoch has an order of its own"


def test_the_sequence_does_not_depend_on_how_it_is_cut_into_steps(tmp_path: Path) -> None:
    windows, _ = open_windows(tmp_path, 1000, 16)
    for seed in (0, 1337, 2**32 - 1):
        whole = windows.for_step(0, 240, seed)
        for per_step in (1, 8, 48, 80):
            parts = [windows.for_step(step, per_step, seed) for step in range(240 // per_step)]
            assert np.concatenate(parts).tolist() == whole.tolist()
    assert windows.for_step(0, 62, 1).tolist() != windows.for_step(0, 62, 2).tolist()


def test_the_windows_of_a_step_never_change(tmp_path: Path) -> None:
    """Pinned for the same reason as the shuffle: seed 1337, steps within the first epoch and over its end."""
    windows, _ = open_windows(tmp_path, 1000, 16)
    assert windows.for_step(0, 8, 1337).tolist() == [32, 37, 33, 25, 17, 31, 6, 30]
    assert windows.for_step(7, 8, 1337).tolist() == [8, 34, 3, 39, 42, 10, 43, 0]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 12, 100])
def test_micro_batches_cut_a_step_without_changing_it(tmp_path: Path, batch_size: int) -> None:
    windows, _ = open_windows(tmp_path, 1000, 16)
    indices = windows.for_step(2, 12, 1337)
    batches = list(windows.in_batches(indices, batch_size))
    assert [len(inputs) for inputs, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    inputs, targets = windows.batch(indices)
    torch.testing.assert_close(torch.cat([batch[0] for batch in batches]), inputs, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([batch[1] for batch in batches]), targets, rtol=0, atol=0)


def test_an_evaluation_is_spread_over_the_split(tmp_path: Path) -> None:
    windows, _ = open_windows(tmp_path, 1000, 16)
    for count in (1, 2, 5, 31, 61, 62):
        indices = windows.spread(count)
        assert indices.tolist() == [number * 62 // count for number in range(count)]
        assert len(set(indices.tolist())) == count
        gaps = np.diff([*indices, 62])
        assert gaps.max() - gaps.min() <= 1
    assert windows.spread(1000).tolist() == list(range(62))


@pytest.mark.parametrize("tokens", [17, 33, 48, 49, 1000, 1001])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 1000])
def test_every_token_but_the_first_is_a_target_once(tmp_path: Path, tokens: int, batch_size: int) -> None:
    windows, ids = open_windows(tmp_path, tokens, 16)
    starts, batches = zip(*windows.every_token(batch_size), strict=True)
    assert np.concatenate(starts).tolist() == list(range(0, tokens - 1, 16))
    assert torch.cat([targets.flatten() for _, targets in batches]).tolist() == ids[1:].tolist()
    assert torch.cat([inputs.flatten() for inputs, _ in batches]).tolist() == ids[:-1].tolist()
    assert all(inputs.shape == targets.shape and len(inputs) <= batch_size for inputs, targets in batches)


def test_ranks_share_every_token(tmp_path: Path) -> None:
    windows, ids = open_windows(tmp_path, 1000, 16)
    shares = [list(windows.every_token(4, rank, 3)) for rank in range(3)]
    targets = sorted(
        (int(start), row.tolist())
        for share in shares
        for starts, (_, rows) in share
        for start, row in zip(starts, rows, strict=True)
    )
    assert [token for _, row in targets for token in row] == ids[1:].tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_split_without_one_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoreError) as error:
        open_windows(tmp_path, 16, 16)
    assert str(error.value) == (
        "the train split has 16 tokens, too few for one window of block_size 16; "
        "lower block_size, change val_fraction, or use more text"
    )
