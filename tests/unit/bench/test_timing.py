"""Turns, minima and medians, and the last line of a benchmark."""

from __future__ import annotations

import json

import pytest

from tests.bench.report import Figures
from tests.bench.timing import Times, interleave, timed


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


def test_a_short_call_is_repeated_until_its_turn_is_long_enough():
    calls = []
    run = timed(lambda: calls.append(sum(range(1000))), least_s=2e-3)
    before = len(calls)

    seconds = run()

    assert len(calls) - before > 10
    assert 0.0 < seconds < 1e-3


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
