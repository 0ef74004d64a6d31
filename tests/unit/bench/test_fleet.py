"""What is counted of a real fleet, what of plain loops, and that nothing is left."""

from __future__ import annotations

import json
import sys
from subprocess import CalledProcessError, TimeoutExpired

import psutil
import pytest

from coordinator.store.rows import EvaluationRow, PointRow
from tests.bench.bench_fleet import KEYS, report
from tests.bench.fleet import Training, end
from tests.bench.loops import run_loops
from tests.bench.pace import Pace, gain, pace_of_rounds, pace_of_steps
from tests.bench.report import Figures


def versions(*rounds: tuple[float, int]) -> list[PointRow]:
    """Return the root and a version for each (moment, tokens so far)."""
    return [
        PointRow(
            version=number,
            created_at=at,
            tokens_total=tokens,
            num_submissions=1,
            train_loss=None,
            rolled_back_to=None,
            first_claim_at=None,
            tokens_before=None,
        )
        for number, (at, tokens) in enumerate([(0.0, 0), *rounds], start=1)
    ]


def training(points: list[PointRow], *, nats: float, **cpu_s: float) -> Training:
    score = EvaluationRow(
        submission_id="s",
        task_id="t",
        run_id="r",
        version=points[-1].version,
        worker_id="worker-1",
        nats=nats,
        tokens=100,
        bytes=400,
        compute_s=1.0,
        created_at=0.0,
        body_sha256="",
        answer_json="",
    )
    return Training(
        began_at=100.0, stop_at=160.0, versions=points, score=score, cpu_s=cpu_s
    )


class FakeChild:
    """A process that takes long to stop, while somebody presses Ctrl-C again."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def ask_to_stop(self) -> None:
        self.said.append("asked")

    def wait(self) -> None:
        raise KeyboardInterrupt

    def kill(self) -> None:
        self.said.append("killed")


def test_rounds_count_from_the_end_of_the_warm_up_until_time_is_up():
    points = versions(
        (105.0, 70), (120.0, 1000), (130.0, 3000), (150.0, 5000), (161.0, 9000)
    )

    pace = pace_of_rounds(points, until=160.0)

    assert pace == Pace(count=2, tokens=4000, seconds=30.0)
    assert pace.tokens_per_s == pytest.approx(4000 / 30)


def test_too_few_rounds_are_refused_with_their_number():
    points = versions((105.0, 70), (120.0, 1000), (161.0, 3000))

    with pytest.raises(ValueError, match="at least 3 rounds must end in time, got 2"):
        pace_of_rounds(points, until=160.0)


def test_steps_count_while_all_loops_train_and_in_part_at_the_ends():
    # The second is warm at 4 and the first ends at 10: 3 steps of one, 4 of the other.
    first = [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    second = [2.5, 4.0, 5.5, 7.0, 8.5, 10.0, 11.5]

    pace = pace_of_steps([first, second], tokens=10)

    assert pace == Pace(count=7.0, tokens=70.0, seconds=6.0)
    shifted = pace_of_steps([[0.0, 3.0, 5.0, 7.0, 9.0, 10.0], second], tokens=10)
    assert shifted.count == pytest.approx(4 + 3.5)


@pytest.mark.parametrize(
    ("moments", "reason"),
    [
        ([[1.0, 2.0, 3.0], [1.0, 2.0]], "at least 3 steps, got 3, 2"),
        ([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]], "at the same time"),
    ],
)
def test_loops_that_never_ran_warm_together_are_refused(moments, reason):
    with pytest.raises(ValueError, match=reason):
        pace_of_steps(moments, tokens=10)


def test_two_turns_are_one_pace_and_two_paces_a_gain():
    slow = Pace(count=1, tokens=100, seconds=1.0)
    fast = Pace(count=3, tokens=400, seconds=1.0)

    assert slow + fast == Pace(count=4, tokens=500, seconds=2.0)
    assert gain({1: slow, 2: fast}) == 4.0


def one_and_two() -> dict[int, Training]:
    """Return fleets of 100 and 180 tokens a second."""
    rounds = [(110.0, 10), (120.0, 20), (140.0, 2020)]
    more = [(110.0, 10), (120.0, 20), (140.0, 3620)]
    one = training(versions(*rounds), nats=500.0, coordinator=1.0, first=59.0)
    two = training(
        versions(*more), nats=450.0, coordinator=2.0, first=38.0, second=40.0
    )
    return {1: one, 2: two}


def test_the_figures_are_ratios_of_gains_and_of_cpu_seconds(capsys):
    figures = Figures(KEYS)
    steps = [float(number) for number in range(12)]
    slow = [2.0 * step for step in steps]
    # One loop: 10 steps in 10 s, then 10 in 20 s. Two: 4.5 and 9 in 9 s, both turns.
    turns = {1: [[steps], [slow]], 2: [[slow, steps], [slow, steps]]}

    report(figures, one_and_two(), turns, tokens_a_step=10)
    figures.finish()

    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert list(found) == list(KEYS)
    assert found["fleet_scaling_vs_plain"] == pytest.approx(1.8 / 2.25)
    assert (found["loss_one"], found["loss_two"]) == (5.0, 4.5)
    assert found["loss_margin"] == pytest.approx(0.5)
    assert found["coordinator_cpu_share"] == 2.0 / 80.0
    (row,) = [line.split() for line in lines if line.startswith("fleet of 2")]
    assert row == ["fleet", "of", "2", "1", "rounds", "3600", "20.0", "180", "1.800"]


def test_what_could_not_be_counted_costs_only_its_own_figure(capsys):
    figures = Figures(KEYS)
    turns = {1: [[[1.0]]], 2: [[[1.0], [1.0]]]}

    report(figures, one_and_two(), turns, tokens_a_step=10)
    figures.finish()

    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["fleet_scaling_vs_plain"] is None
    assert any("fleet_scaling_vs_plain: each loop must make" in line for line in lines)
    assert None not in (found["loss_margin"], found["coordinator_cpu_share"])


def test_loops_run_at_the_same_time_and_say_when_steps_ended(tmp_path):
    # Each waits for the other before it prints.
    code = (
        "import os, pathlib, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / str(os.getpid())).touch()\n"
        "while len(list(folder.iterdir())) < 2: time.sleep(0.01)\n"
        "print(1.5); print(2.25)\n"
    )

    moments = run_loops([sys.executable, "-c", code], 2, patience_s=60.0)

    assert moments == [[1.5, 2.25], [1.5, 2.25]]


ENDLESS = "import time; time.sleep(1000)"
#: Only one of them presses Ctrl-C; a second one would be a test of its own. And only
#: when both are there: one that is just being started nobody could end yet.
PRESSING = """
import os, pathlib, signal, sys, time
pressed = pathlib.Path(sys.argv[1])
pressed.with_name(f"there-{os.getpid()}").touch()
while len(list(pressed.parent.glob("there-*"))) < 2: time.sleep(0.01)
try:
    pressed.touch(exist_ok=False)
    os.kill(os.getppid(), signal.SIGINT)
except FileExistsError:
    pass
time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("code", "patience_s", "error"),
    [
        ("raise SystemExit(3)", 60.0, CalledProcessError),
        (ENDLESS, 1e-3, TimeoutExpired),
        (PRESSING, 60.0, KeyboardInterrupt),
    ],
    ids=["failing", "endless", "ctrl-c"],
)
def test_no_loop_is_left_whatever_ends_them(tmp_path, code, patience_s, error):
    before = set(psutil.Process().children())
    command = [sys.executable, "-c", code, str(tmp_path / "pressed")]

    with pytest.raises(error):
        run_loops(command, 2, patience_s=patience_s)

    assert set(psutil.Process().children()) == before


def test_a_second_ctrl_c_kills_what_will_not_stop():
    child = FakeChild()

    with pytest.raises(KeyboardInterrupt):
        end(child)  # type: ignore[arg-type]

    assert child.said == ["asked", "killed"]
