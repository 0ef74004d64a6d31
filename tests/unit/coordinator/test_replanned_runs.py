"""What a change of plan meets: older tasks, rounds that start over, ends of runs."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from sqlalchemy import select

from bitnet_ext.wire.verdicts import ErrorCode, TaskKind
from coordinator.domain.errors import RefusedError
from coordinator.domain.plan_change import told
from coordinator.service.rolling_back import ask_for_rollback
from coordinator.service.roster import plan_of
from coordinator.service.starting import RunSettings, ensure_run
from coordinator.service.sweeping import sweep
from coordinator.store import runs
from coordinator.store.tables import submissions
from tests.unit.coordinator.fleets import PLAN, World
from tests.unit.coordinator.test_accept_late import STALE, next_round, out_of_touch
from tests.unit.coordinator.test_arrivals import ARRIVALS
from tests.unit.coordinator.test_replanning import (
    ask,
    hand_in,
    happened,
    plan,
    recorded,
)

SETTINGS = RunSettings(preset="tiny", seed=3, plan=PLAN)


@pytest.fixture
def held(running: World) -> World:
    """A fleet in whose first round w1 has claimed `held`."""
    running.set_speed("w1", 2.0)
    running.held = running.claimed("w1")
    return running


# -- what was claimed by the plan of before ---------------------------------------


def test_a_late_result_of_an_earlier_round_goes_by_its_own_plan(world: World):
    late, other = out_of_touch(world, STALE)
    ask(world, codec="int8", batch_size=4, learning_rate=2e-5)
    next_round(world, other)

    hand_in(world, late, "w1")
    task = world.claimed("w2")
    hand_in(world, task, "w2")
    assert world.close_round()

    assert (late.codec, late.num_steps, task.codec) == ("fp32", 4, "int8")
    size = dict(world.read(sizes))
    # Norms are alike. The peak rate is a hundredth, of which in the warm-up the second
    # task has thrice the share of the first; it has half as many steps.
    assert size["w2"] / size["w1"] == pytest.approx(100 / 3 * np.sqrt(2), rel=1e-3)


def sizes(connection):
    query = select(submissions.c.worker_id, submissions.c.size)
    return connection.execute(query.where(submissions.c.version == 3)).all()


def test_an_arrival_that_was_claimed_before_goes_by_its_own_plan(world: World):
    world.start_run(ARRIVALS)
    for name in ("w1", "w2"):
        world.register(name)
        world.set_speed(name, 2.0)
    first, second = world.claimed("w1"), world.claimed("w2")
    hand_in(world, first, "w1")
    ask(world, codec="int8", batch_size=4)  # while the version is made
    assert world.close_round()
    third = world.claimed("w1")

    hand_in(world, second, "w2")
    assert world.close_round()
    hand_in(world, third, "w1")
    assert world.close_round()

    assert (second.codec, third.codec) == ("fp32", "int8")
    assert [one.codec for one in recorded(world)] == ["fp32", "int8", "int8"]


def test_a_round_that_starts_over_has_the_new_plan(held: World):
    ask(held, codec="int8", batch_size=4, round_s=30.0)

    held.release(held.held)

    assert (plan(held).codec, held.live_round().round_s) == ("int8", 30.0)
    assert happened(held, "plan.adopted")[0]["version"] == 1
    task = held.claimed("w1")
    assert (task.base_version, task.codec, task.batch_size) == (1, "int8", 4)
    hand_in(held, task)
    assert held.close_round()
    assert [one.codec for one in recorded(held)] == ["int8"]


def test_a_run_that_makes_no_version_any_more_can_be_helped(running: World):
    running.change_run(plan_json=encoded(outer_rate=2.0))
    task = running.claimed()
    ask(running, outer_rate=0.9)
    hand_in(running, task, value=3e38)  # more than float32 has, at twice that

    assert running.close_round()

    assert running.live_round().state == "open"
    assert plan(running).outer_rate == 0.9
    assert recorded(running) == []


def encoded(**fields: object) -> str:
    return msgspec.json.encode(msgspec.structs.replace(PLAN, **fields)).decode()


@pytest.mark.parametrize("is_asked_first", [True, False])
def test_what_was_claimed_before_a_round_started_over_by_another_plan_is_too_late(
    running: World, is_asked_first
):
    task = running.claimed()
    if is_asked_first:
        ask(running, codec="int8")
    running.clock.advance(31.0)
    assert running.sweep() == 1
    if not is_asked_first:
        assert ask(running, codec="int8").at_once
    before = running.run_row().tokens_accepted

    with pytest.raises(RefusedError) as caught:
        hand_in(running, task)

    assert caught.value.code is ErrorCode.LEASE_LOST
    assert running.run_row().tokens_accepted == before


def test_where_no_plan_waits_a_late_result_counts_in_a_round_that_started_over(
    running: World,
):
    task = running.claimed()
    running.clock.advance(31.0)
    assert running.sweep() == 1
    ask(running, codec="fp32")

    hand_in(running, task)

    assert running.close_round()


def test_a_round_of_late_results_alone_that_is_closing_keeps_its_plan(world: World):
    late, other = out_of_touch(world, STALE)
    next_round(world, other)
    hand_in(world, late, "w1")
    world.change_run(stop_at=world.clock.now())
    world.do(sweep(world.fleet, SETTINGS))
    assert world.live_round().state == "closing"

    assert not ask(world, outer_rate=0.1).at_once

    assert world.close_round()
    assert [one.outer_rate for one in recorded(world)] == [0.9, 0.9]
    assert plan(world).outer_rate == 0.1


# -- rollbacks, resets, the end of a run -------------------------------------------


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_run_that_goes_back_has_the_new_plan_before(running: World, comes_back):
    running.train_round(0.5)
    task = running.claimed()
    ask(running, learning_rate=0.001, round_s=30.0)
    running.do(ask_for_rollback(running.fleet, 1))

    if comes_back:
        hand_in(running, task)
        assert running.close_round()
    else:
        running.release(task)
    assert running.close_round()

    newest = running.live_round().base_version
    assert np.array_equal(running.state(newest).weights, running.state(1).weights)
    *earlier, last = [one.learning_rate for one in recorded(running)]
    assert (set(earlier), last) == ({0.002}, 0.001)
    assert plan(running).learning_rate == 0.001
    assert running.live_round().round_s == 30.0


def test_a_run_that_is_replaced_takes_its_wishes_with_it(held: World):
    ask(held, codec="int8")

    assert ensure_run(held.fleet, held.fleet.manifest, SETTINGS)

    new, old = held.run_row(), held.read(lambda c: runs.find_run(c, "r-1"))
    assert new.run_id != "r-1"
    assert plan_of(new).codec == "fp32"
    assert (old.next_plan_json, old.next_token_budget) == (None, None)
    assert ask(held, codec="int8").at_once


def finish(world: World) -> None:
    world.do(sweep(world.fleet, SETTINGS))
    world.score(world.claimed())
    world.do(sweep(world.fleet, SETTINGS))
    assert world.run_row().state == "finished"


def test_a_run_whose_budget_is_used_up_goes_on_with_a_larger_one(running: World):
    running.change_run(token_budget=64)
    running.train_round(0.5)
    finish(running)

    assert ask(running, token_budget=128).at_once

    assert (running.run_row().state, running.run_row().token_budget) == ("running", 128)
    running.train_round(0.5)
    assert running.run_row().tokens_accepted == 128
    assert running.claim() is None


def test_where_its_epoch_was_over_too_the_next_one_begins(running: World):
    running.change_run(token_budget=1504)
    running.register("w2")
    for name in ("w1", "w2"):
        running.set_speed(name, 1000.0)
    running.train_round(0.5, 0.5)
    finish(running)

    ask(running, token_budget=0)

    assert (running.run_row().epoch, running.run_row().token_budget) == (2, None)
    assert running.claimed().kind == TaskKind.TRAIN


def test_a_larger_budget_does_not_undo_a_time_to_stop(running: World):
    running.change_run(token_budget=64)
    running.train_round(0.5)
    finish(running)
    running.change_run(stop_at=running.clock.now())

    ask(running, token_budget=128)

    assert running.run_row().state == "finished"


def test_a_budget_changes_with_its_schedule_when_the_round_is_over(world: World):
    schedule = msgspec.structs.replace(PLAN, warmup_tokens=16, schedule_tokens=128)
    world.start_run(schedule, token_budget=128)
    for name in ("w1", "w2"):
        world.register(name)
        world.set_speed(name, 128 / 60)
    task = world.claimed("w1")

    found = ask(world, token_budget=1000)

    assert (
        told(found.changes) == "schedule_tokens 128 -> 1000, token_budget 128 -> 1000"
    )
    # By the schedule in force, what is more would be trained at rate zero.
    assert world.claim("w2") is None
    hand_in(world, task)
    assert world.close_round()
    assert world.run_row().token_budget == 1000
    task = world.claimed("w2")
    assert task.hyper.lr_start > 0.7 * 0.002
    assert task.base_version == 2


def test_a_smaller_budget_ends_the_run(running: World):
    running.train_round(0.5)

    ask(running, token_budget=64)

    assert running.claim() is None
    finish(running)
