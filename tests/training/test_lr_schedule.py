"""The learning rate against lists written by hand."""

import pytest

from encore.training.lr_schedule import get_lr


def rates(steps, *shape):
    return [get_lr(step, *shape) for step in range(steps)]


def test_the_whole_course_is_the_hand_written_one():
    warmup = [2.0, 4.0, 6.0, 8.0]
    # 1 + 9 (1 + cos(k pi / 8)) / 2 for k = 0 ... 8
    cosine = [10.0, 9.65745789, 8.68198052, 7.22207544, 5.5, 3.77792456, 2.31801948, 1.34254211, 1.0]
    after = [1.0, 1.0, 1.0]
    assert rates(16, 10.0, 1.0, 4, 12) == pytest.approx([*warmup, *cosine, *after], abs=1e-8)


def test_without_warmup_the_first_step_has_the_highest_rate():
    assert rates(4, 8.0, 0.0, 0, 4) == pytest.approx([8.0, 6.82842712, 4.0, 1.17157288], abs=1e-8)


def test_no_step_is_wasted_on_a_rate_of_zero():
    assert get_lr(0, 6e-4, 0.0, 2000, 600_000) == pytest.approx(6e-4 / 2001)


def test_the_end_is_min_lr_exactly():
    assert get_lr(6000, 6e-4, 6e-5, 200, 6000) == 6e-5
    assert get_lr(10**9, 6e-4, 6e-5, 200, 6000) == 6e-5


def test_warmup_may_last_until_the_end():
    assert rates(6, 5.0, 1.0, 4, 4) == [1.0, 2.0, 3.0, 4.0, 1.0, 1.0]


def test_a_trapezoid_is_the_hand_written_one():
    assert rates(12, 10.0, 2.0, 1, 10, 0.4) == [5.0, *[10.0] * 6, 8.0, 6.0, 4.0, 2.0, 2.0]
    assert rates(5, 8.0, 0.0, 0, 4, 1.0) == [8.0, 6.0, 4.0, 2.0, 0.0]
