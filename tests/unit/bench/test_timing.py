"""Turns, minima and medians, and the last line of a benchmark."""

from __future__ import annotations

import json

import pytest

from tests.bench.report import Figures
from tests.bench.timing import Times, interleave, repeated, timed


def test_contenders_have_their_turns_round_by_round_and_begin_in_turn():
    turns = []
    contenders = {
        name: lambda name=name: float(turns.append(name) or len(turns))
        for name in "abc"
    }

    times = interleave(contenders, rounds=4)

    assert "".join(turns) == "abc" + "bca" + "cab" + "abc"
    assert times["a"].rounds == (1.0, 6.0, 8.0, 10.0)


def test_times_know_their_minimum_and_median():
    times = Times((3.0, 1.0, 8.0))

    assert (times.best, times.median) == (1.0, 3.0)


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        interleave({}, rounds=0)


@pytest.mark.parametrize(
    ("least_s", "repeats"), [(2.0, [1, 1, 8]), (0.1, [1, 1, 1]), (0.0, [1, 1])]
)
def test_what_is_short_is_repeated_until_its_turn_is_long_enough(least_s, repeats):
    done = []

    def run(repeats: int) -> float:
        done.append(repeats)
        return 0.25 * repeats

    assert repeated(run, least_s=least_s)() == 0.25
    assert done == repeats


def test_a_call_that_is_long_enough_is_made_once_a_turn():
    calls = []
    run = timed(lambda: calls.append(1))
    before = len(calls)

    assert run() > 0.0

    assert len(calls) - before == 1


def test_the_last_line_has_exactly_the_announced_figures(capsys):
    figures = Figures(("one", "two", "three"))
    figures.put("one", 1.23456)
    figures.leave_out("no such CPU", "two")

    figures.finish()

    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {"one": 1.2346, "two": None, "three": None}
    assert "not measured: two: no such CPU" in lines
    with pytest.raises(KeyError):
        figures.put("four", 1.0)
