"""Figures as people read them."""

from __future__ import annotations

import pytest

from coordinator.domain.figures import in_digits


@pytest.mark.parametrize(
    ("value", "digits", "due"),
    [
        (213.4, 2, "210"),
        (0.0371, 2, "0.037"),
        (3.0, 2, "3"),
        (1234.5, 3, "1230"),
        (98_765_432.1, 2, "99000000"),
        (0.0, 2, "0"),
    ],
)
def test_a_figure_has_few_digits_and_no_exponent(value, digits, due):
    assert in_digits(value, digits) == due
