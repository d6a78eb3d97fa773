"""The fit of bench.loss_by_size finds a law that losses were made from."""

import pytest

from bench.loss_by_size import count_in_layers, fit


def test_the_law_is_found_again():
    parameters = [count_in_layers(layers, 32 * layers) for layers in (2, 3, 4, 6)]
    assert parameters[2] == 4 * (4 * 128**2 + 2 * 128 * 512)
    law = fit(parameters, [1.7 + 40 * count**-0.35 for count in parameters])
    assert law == pytest.approx((1.7, 40, 0.35), rel=1e-6)
    assert law.loss(10**7) == pytest.approx(1.7 + 40 * 10**-2.45, rel=1e-9)
