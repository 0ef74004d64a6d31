"""What worker and coordinator share of Muon: blocks, and the length of a step."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bitnet_ext.newton_schulz import num_blocks, step_length


@pytest.mark.parametrize(
    ("short", "num"),
    [(1, 1), (2, 2), (5, 1), (64, 2), (128, 2), (192, 3), (256, 4), (768, 12)],
)
def test_a_short_side_is_cut_in_blocks_of_64_and_at_least_in_two(short, num) -> None:
    assert num_blocks(short) == num


@pytest.mark.parametrize(("short", "num"), [(200, 2), (199, 1)])
def test_what_can_not_be_cut_evenly_has_fewer_blocks(short, num) -> None:
    assert num_blocks(short) == num


@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
def test_a_step_has_the_size_of_one_of_adamw(shape) -> None:
    random = np.random.default_rng(0).standard_normal((8, 32))
    left, _, right = np.linalg.svd(random, full_matrices=False)

    step = step_length(0.5, shape) * (left @ right)

    assert math.sqrt((step**2).mean()) == pytest.approx(0.5 * 0.2)
