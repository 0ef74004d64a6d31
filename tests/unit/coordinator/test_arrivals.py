"""Where each submission makes a version, nobody waits, and nothing else changes."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from bitnet_ext.wire.verdicts import ErrorCode, TaskState
from coordinator.domain.errors import RefusedError
from coordinator.domain.plan import AUTO, Aggregation
from coordinator.service.closing import RoundCloser
from coordinator.service.exporting import parse_version
from coordinator.service.rolling_back import ask_for_rollback
from coordinator.service.starting import reconcile
from coordinator.service.sweeping import sweep
from coordinator.store import rounds, versions
from tests.unit.coordinator.fleets import PLAN, World, body, frame
from tests.unit.coordinator.test_accept_late import finish, upload
from tests.unit.coordinator.test_looking import looked

ARRIVALS = msgspec.structs.replace(
    PLAN,
    aggregation=Aggregation.PER_ARRIVAL,
    outer_momentum=0.0,
    outer_rate=0.5,
    evaluate_every=10**6,
)


@pytest.fixture
def two(world: World) -> World:
    """A run in which each submission makes a version, and two workers."""
    world.start_run(ARRIVALS)
    for name in ("w1", "w2"):
        world.register(name)
        world.set_speed(name, 2.0)
    return world


def arrive(world: World, task, name: str, value: float = 0.5) -> None:
    world.submit(task, name, value)
    assert world.close_round()


def test_each_submission_makes_a_version_while_others_are_out(two: World) -> None:
    first, second = two.claimed("w1"), two.claimed("w2")

    arrive(two, first, "w1")
    again = two.claimed("w1")

    assert (first.base_version, second.base_version, again.base_version) == (1, 1, 2)
    assert two.task(second.task_id).state == TaskState.LEASED
    assert np.array_equal(two.state(2).weights, two.state(1).weights - np.float32(0.25))


def test_what_was_made_for_an_older_version_counts_less(two: World) -> None:
    first, second = two.claimed("w1"), two.claimed("w2")
    arrive(two, first, "w1")
    arrive(two, two.claimed("w1"), "w1")

    arrive(two, second, "w2")

    moved = two.state(3).weights - two.state(4).weights
    assert np.allclose(moved, 0.25 * 3**-0.5, rtol=1e-5)


def test_what_comes_while_a_version_is_made_waits_for_the_next(two: World) -> None:
    first, second = two.claimed("w1"), two.claimed("w2")
    two.submit(first, "w1")
    before = two.run_row().tokens_accepted

    with pytest.raises(RefusedError) as refused:
        two.submit(second, "w2")

    assert refused.value.code is ErrorCode.BUSY
    assert two.run_row().tokens_accepted == before
    assert two.close_round()
    arrive(two, second, "w2")
    assert two.live_round().base_version == 3


def test_an_upload_that_begins_while_a_version_is_made_and_outlasts_it_is_taken(
    two: World,
) -> None:
    first, second = two.claimed("w1"), two.claimed("w2")
    two.submit(first, "w1")
    whole = body(two.meta(second, "w2"), frame(second, 0.5))

    intake = upload(two, whole[:-8])
    two.close_round()
    finish(two, intake, whole[-8:])

    assert two.close_round()
    assert two.live_round().base_version == 3


def test_a_lease_of_an_earlier_round_ends_without_touching_the_live_one(
    two: World,
) -> None:
    first, second = two.claimed("w1"), two.claimed("w2")
    arrive(two, first, "w1")
    third = two.claimed("w1")
    live = two.live_round()

    two.release(second, "w2")

    assert two.live_round() == live
    ended = two.read(lambda c: rounds.claims_of(c, live.round_id - 1))
    assert [claim.outcome for claim in ended] == ["back", "released"]
    assert not two.close_round()
    assert two.task(second.task_id).state == TaskState.PENDING
    assert two.claimed("w2").task_id == second.task_id
    arrive(two, third, "w1")


def test_who_gave_its_task_back_does_not_wait_for_another(two: World) -> None:
    first = two.claimed("w1")
    two.claimed("w2")

    two.release(first, "w1")

    assert two.claimed("w1").task_id != first.task_id


def test_a_step_that_is_not_finite_leaves_those_alone_who_are_out(
    world: World,
) -> None:
    world.start_run(msgspec.structs.replace(ARRIVALS, outer_rate=2.0))
    for name in ("w1", "w2"):
        world.register(name)
    first, second = world.claimed("w1"), world.claimed("w2")

    arrive(world, first, "w1", 3e38)

    live = world.live_round()
    assert (live.state, live.base_version) == ("open", 1)
    (out,) = world.read(lambda c: rounds.claims_of(c, live.round_id))
    assert (out.worker_id, out.outcome) == ("w2", None)
    arrive(world, second, "w2")
    assert world.live_round().base_version == 2


def test_a_task_is_cut_for_a_whole_round_whenever_it_is_claimed(two: World) -> None:
    two.set_speed("w1", 1.0)
    two.set_speed("w2", 1.0)
    first = two.claimed("w1")

    two.clock.advance(25.0)

    assert two.claimed("w2").byte_length == first.byte_length


def test_a_run_ends_once_the_last_lease_of_any_round_is_back(two: World) -> None:
    first, second = two.claimed("w1"), two.claimed("w2")
    arrive(two, first, "w1")
    two.change_run(stop_at=two.clock.now())

    two.do(sweep(two.fleet, None))
    assert two.read(lambda c: versions.newest_version(c, "r-1")).version == 2
    assert not scored_last(two)

    arrive(two, second, "w2")
    two.do(sweep(two.fleet, None))
    assert scored_last(two)


def scored_last(world: World) -> bool:
    """Whether the run waits for nothing but the score of its newest version."""
    task = world.claim("w1")
    return task is not None and task.kind == "evaluate"


def test_a_crash_before_the_version_gives_the_same_bytes(two: World) -> None:
    first, second = two.claimed("w1"), two.claimed("w2")
    arrive(two, first, "w1")
    two.submit(second, "w2", 0.125)
    expected = two.state(2).weights - np.float32(0.5) * (
        np.float32(0.125) * np.float32(2**-0.5)
    )

    reconcile(two.fleet)
    two.closer = RoundCloser(two.fleet)

    assert two.close_round()
    assert np.array_equal(two.state(3).weights, expected)


def test_the_page_shows_who_is_out_since_before_the_round(two: World) -> None:
    began = two.clock.now()
    first = two.claimed("w1")
    two.claimed("w2")
    two.clock.advance(20.0)
    arrive(two, first, "w1")
    two.claimed("w1")

    view = looked(two)

    assert view.training.aggregation == "per-arrival"
    assert view.round.first_claim_at == began
    assert [lane.worker_id for lane in view.round.lanes] == ["w2", "w1"]


def test_speed_and_eta_go_by_what_arrives_in_a_while(world: World) -> None:
    plan = msgspec.structs.replace(ARRIVALS, round_s=20.0)
    world.start_run(plan, token_budget=10_000)
    for name in ("w1", "w2"):
        world.register(name)
    for _ in range(7):
        # Tasks of 32 tokens.
        world.set_speed("w1", 1.6)
        world.set_speed("w2", 1.6)
        first, second = world.claimed("w1"), world.claimed("w2")
        world.clock.advance(19.0)
        arrive(world, first, "w1")
        world.clock.advance(1.0)
        arrive(world, second, "w2")

    view = looked(world)

    assert view.run.tokens_per_s == pytest.approx(64 / 20, rel=0.15)
    assert view.run.eta.at is not None


def test_a_run_goes_back_once_all_that_is_out_has_arrived(two: World) -> None:
    first, second = two.claimed("w1"), two.claimed("w2")
    arrive(two, first, "w1")
    two.do(ask_for_rollback(two.fleet, parse_version("1")))

    assert two.claim("w1") is None
    assert not two.close_round()  # a lease of the round before is out
    arrive(two, second, "w2")
    assert two.close_round()

    assert two.read(versions.highest_number) == 4
    assert np.array_equal(two.state(4).weights, two.state(1).weights)
    assert two.claimed("w1").base_version == 4


def test_what_comes_after_its_lease_is_taken_however_stale(two: World) -> None:
    first, late = two.claimed("w1"), two.claimed("w2")
    arrive(two, first, "w1")
    two.clock.advance(31.0)
    two.sweep()
    assert two.task(late.task_id).state == TaskState.PENDING

    arrive(two, late, "w2")

    assert two.task(late.task_id).state == TaskState.DONE


def test_no_round_time_is_measured_where_no_round_is_waited_for(world: World) -> None:
    world.start_run(msgspec.structs.replace(ARRIVALS, round_s=AUTO))
    world.register("w1")
    for _ in range(6):
        arrive(world, world.claimed("w1"), "w1")

    view = looked(world).round
    assert (view.round_s, view.overhead_s) == (60.0, None)
    assert view.round_reason.endswith("as each submission makes a version.")
