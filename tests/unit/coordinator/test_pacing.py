"""The round time in a fleet: measured, chosen, and kept for the whole of a round."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bitnet_ext.wire.verdicts import TaskKind
from coordinator.domain.plan import AUTO, TrainingPlan
from coordinator.service.replanning import Replanned, set_plan
from coordinator.service.returning import end_late
from coordinator.service.steering import seed_epoch
from coordinator.store import rounds, versions
from tests.unit.coordinator.fleets import PLAN, World, body, frame, open_world
from tests.unit.coordinator.test_accept_late import STALE, next_round, out_of_touch
from tests.unit.coordinator.test_looking import looked
from tests.unit.coordinator.test_pauses import killed, stopped, submit

CHOSEN = msgspec.structs.replace(PLAN, round_s=AUTO)


@pytest.fixture
def chosen(world: World) -> World:
    """A fleet whose coordinator chooses the round time; w1 is in it."""
    world.start_run(CHOSEN)
    world.register("w1")
    return world


def train(world: World, *, overhead_s=0.0, compute_s=1.0, merge_s=0.0, name="w1"):
    """Let one worker train a round; none of it takes longer than is said."""
    task = world.claimed(name)
    world.clock.advance(compute_s + overhead_s)
    world.send(body(world.meta(task, name, compute_s=compute_s), frame(task, 0.5)))
    world.clock.advance(merge_s)
    assert world.close_round()


def closed(world: World):
    """Return the rounds that are closed, oldest first."""
    found = world.read(lambda c: rounds.newest_rounds(c, "r-1", 100))
    return [row for row in found if row.state == "closed"]


def choose(world: World, round_s: float | str) -> Replanned:
    return world.do(set_plan(world.fleet, {"round_s": str(round_s)}))


def test_a_round_is_measured_when_it_becomes_a_version(chosen: World):
    train(chosen, overhead_s=2.0, compute_s=8.0, merge_s=0.5)

    (row,) = closed(chosen)
    assert row.overhead_s == pytest.approx(2.5)
    # A probe of 4 local steps: 16 steps at its pace.
    assert row.shortest_s == pytest.approx(2.0 + 32.0)


def test_what_is_still_open_has_not_been_measured(chosen: World):
    chosen.submit(chosen.claimed())

    live = chosen.live_round()

    assert (live.round_s, live.overhead_s, live.shortest_s) == (60.0, None, None)


def test_a_pause_of_the_coordinator_is_no_overhead(chosen: World):
    task = chosen.claimed()
    chosen.clock.advance(10.0)
    stopped(chosen, 600.0)
    submit(chosen, task, compute_s=8.0)
    chosen.close_round()

    (row,) = closed(chosen)
    assert row.overhead_s == pytest.approx(2.0)


@pytest.mark.parametrize("pause", [killed, stopped])
def test_a_pause_before_the_version_is_made_is_no_overhead_either(chosen: World, pause):
    submit(chosen, chosen.claimed(), compute_s=0.0)
    pause(chosen, 600.0)
    chosen.clock.advance(0.5)

    chosen.close_round()

    (row,) = closed(chosen)
    assert row.overhead_s == pytest.approx(0.5)


def test_a_version_after_a_sleep_that_nobody_has_noticed_is_measured_too(chosen: World):
    submit(chosen, chosen.claimed(), compute_s=0.0)
    chosen.fleet.swept_at = chosen.clock.monotonic()
    chosen.clock.advance(600.0)

    chosen.close_round()

    assert closed(chosen)[0].overhead_s == pytest.approx(0.0)


def test_an_evaluation_counts_for_the_rounds_until_the_next(world: World):
    world.start_run(CHOSEN, scored=True)
    world.register("w1")
    world.clock.advance(61.0)
    world.score(world.claimed(), compute_s=30.0)

    train(world, overhead_s=2.0)

    (row,) = closed(world)
    assert row.overhead_s == pytest.approx(2.0 + 30.0 / CHOSEN.evaluate_every)


def test_what_is_stale_tells_nothing_of_the_round_that_takes_it(world: World):
    late, other = out_of_touch(world, STALE)
    next_round(world, other)  # claimed 40 s ago, trained for 1
    world.submit(late, "w1")

    train(world, overhead_s=3.0, name="w2")

    assert [row.overhead_s for row in closed(world)] == pytest.approx([39.0, 3.0])
    assert world.read(lambda c: versions.newest_version(c, "r-1")).num_submissions == 2


def test_tasks_of_a_fixed_size_make_the_round_time(world: World):
    world.start_run(CHOSEN, seeded=False)
    world.register("w1")
    world.do(seed_epoch(world.fleet, 100))

    for _ in range(4):
        train(world, overhead_s=1.0, compute_s=150.0)

    assert closed(world)[0].shortest_s == pytest.approx(151.0)
    assert world.live_round().round_s == 200.0


def test_after_three_rounds_the_round_time_follows_the_overhead(chosen: World):
    for _ in range(6):
        train(chosen, overhead_s=1.1)

    found = [row.round_s for row in closed(chosen)]
    assert [*found, chosen.live_round().round_s] == [60.0] * 3 + [30.0] * 4


def test_tasks_are_cut_to_the_round_time_of_their_round(chosen: World):
    for _ in range(3):
        train(chosen, overhead_s=1.1)
    chosen.set_speed("w1", 4.0)

    task = chosen.claimed()

    assert task.byte_length // 4 == 4 * 30
    assert task.stop_after_s == pytest.approx(1.25 * 30.0)


def test_a_round_keeps_its_round_time_and_the_next_takes_the_new_one(running: World):
    running.register("w2")
    for name in ("w1", "w2"):
        running.set_speed(name, 4.0)
    before = running.claimed("w1")

    choose(running, 20.0)

    after = running.claimed("w2")
    assert after.byte_length == before.byte_length == 4 * 240
    assert after.stop_after_s == before.stop_after_s
    for task, name in ((before, "w1"), (after, "w2")):
        running.submit(task, name)
    running.close_round()
    running.set_speed("w1", 4.0)
    assert running.live_round().round_s == 20.0
    assert running.claimed("w1").byte_length == 4 * 80


def test_a_round_that_nobody_has_claimed_in_takes_a_new_round_time_at_once(
    running: World,
):
    running.set_speed("w1", 4.0)

    choose(running, 20.0)

    assert running.live_round().round_s == 20.0
    assert running.claimed().byte_length == 4 * 80


def test_bounds_of_a_chosen_round_time_hold_at_once_too(chosen: World):
    chosen.do(set_plan(chosen.fleet, {"round_max_s": "40", "codec": "int8"}))
    assert chosen.live_round().round_s == 40.0

    chosen.do(set_plan(chosen.fleet, {"codec": "fp32"}))
    assert chosen.live_round().round_s == 40.0


def test_the_grace_of_a_round_is_that_of_its_own_round_time(world: World):
    world.start_run(msgspec.structs.replace(PLAN, round_s=40.0, quorum=0.5))
    for name in ("w1", "w2"):
        world.register(name)
        world.set_speed(name, 1.0)
    held = world.claimed("w1"), world.claimed("w2")
    world.submit(held[0], "w1")
    choose(world, 4.0)

    world.clock.advance(9.0)
    assert world.write(lambda c: end_late(c, world.fleet, world.clock.now())) == 0
    world.clock.advance(1.0)
    assert world.write(lambda c: end_late(c, world.fleet, world.clock.now())) == 1


def test_an_evaluation_waits_for_the_round_time_of_the_open_round(world: World):
    world.start_run(scored=True)
    for name in ("w1", "w2", "w3"):
        world.register(name)
    begun = world.claimed("w3")
    choose(world, 5.0)

    for done in (1, 2, 3):
        world.clock.advance(20.0)
        world.heartbeat(begun, "w3", tokens_done=done)
    assert world.claimed("w1").kind == TaskKind.TRAIN
    world.clock.advance(1.0)
    assert world.claimed("w2").kind == TaskKind.EVALUATE


def test_a_restart_keeps_the_round_time_and_the_choice(tmp_path: Path):
    with open_world(tmp_path) as world:
        world.start_run(CHOSEN)
        world.register("w1")
        for _ in range(4):
            train(world, overhead_s=1.1)
        task = world.claimed()
        choose(world, 90.0)
        world.submit(task)

    with open_world(tmp_path) as again:
        assert again.live_round().round_s == 30.0
        again.close_round()
        assert again.live_round().round_s == 90.0


def test_each_version_records_the_choice_that_it_was_made_under(running: World):
    choose(running, AUTO)
    train(running)
    task = running.claimed()
    choose(running, 25.0)
    running.submit(task)
    running.close_round()
    train(running)

    made = running.read(lambda c: versions.versions_of(c, "r-1"))[1:]
    plans = [msgspec.json.decode(row.plan_json, type=TrainingPlan) for row in made]
    assert [plan.round_s for plan in plans] == [AUTO, AUTO, 25.0]


def test_the_view_says_the_round_time_and_why(chosen: World):
    first = looked(chosen).round
    for _ in range(4):
        train(chosen, overhead_s=1.1)
    later = looked(chosen).round
    choose(chosen, 90.0)

    assert (first.round_s, first.overhead_s) == (60.0, None)
    assert first.round_reason.startswith("Overhead not measured yet.")
    assert (later.round_s, later.overhead_s) == (30.0, pytest.approx(1.1))
    assert later.round_reason == (
        "Overhead 1.1 s of 30 s = 3.7 %. Chosen between 10 and 600 s."
    )
    assert looked(chosen).round.round_reason == (
        "Overhead 1.1 s of 90 s = 1.2 %. Fixed."
    )


def test_a_long_round_after_short_ones_does_not_hide_the_end(world: World):
    world.start_run(msgspec.structs.replace(PLAN, round_s=10.0), token_budget=100_000)
    world.register("w1")
    choose(world, 500.0)
    for _ in range(12):
        train(world)

    world.clock.advance(400.0)

    assert looked(world).run.eta.at is not None
