"""Calibration counts the tokens of real steps on the clock that it is given."""

from __future__ import annotations

import itertools

import pytest

from tests.unit.worker.shapes import SMALL, loaded_model, seeded_weights
from worker.calibrate import calibrate


@pytest.mark.parametrize(
    ("seconds_a_step", "num_steps"),
    [(10.0, 2), (0.25, 4), (0.3, 4)],
)
def test_it_runs_for_a_second_and_for_two_steps(seconds_a_step, num_steps) -> None:
    looks = []
    ticks = itertools.count(100.0, seconds_a_step)

    def clock() -> float:
        looks.append(next(ticks))
        return looks[-1]

    speed = calibrate(loaded_model(), 4, clock)

    assert len(looks) == num_steps + 1
    assert speed == pytest.approx(4 * SMALL.seq_len / seconds_a_step)


def test_its_steps_really_train() -> None:
    model = loaded_model()
    before = seeded_weights(SMALL)

    calibrate(model, 2, itertools.count().__next__)

    assert (model.flat.values.numpy() != before).all()
