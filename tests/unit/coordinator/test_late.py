"""A round with a quorum goes on without what is still out."""

from __future__ import annotations

import msgspec
import pytest

from bitnet_ext.wire.verdicts import LeaseState
from coordinator.domain.errors import RefusedError
from coordinator.service.returning import sweep_leases
from tests.unit.coordinator.fleets import PLAN, World

#: Rounds of 20 s, so 5 s of grace.
QUORUM = msgspec.structs.replace(PLAN, round_s=20.0, quorum=0.6)


def begun(world: World, plan=QUORUM):
    """Start a run, let w1 and w2 claim, and let w1 hand in after 15 s."""
    world.start_run(plan)
    for name, speed in (("w1", 16.0), ("w2", 8.0)):
        world.register(name)
        world.set_speed(name, speed)
    first, second = world.claimed("w1"), world.claimed("w2")
    world.clock.advance(15.0)
    world.heartbeat(second, "w2", tokens_done=48)
    world.submit(first, "w1")
    return second


def swept(world: World) -> int:
    return world.do(sweep_leases(world.fleet))


def speed_of(world: World, name: str) -> float:
    return world.worker(name).tokens_per_s


def test_it_waits_for_the_grace_period_and_not_longer(world: World):
    late = begun(world)

    world.clock.advance(4.9)
    assert swept(world) == 0
    assert world.live_round().state == "open"
    world.clock.advance(0.2)
    assert swept(world) == 1

    assert world.live_round().state == "closing"
    row = world.task(late.task_id)
    assert (row.state, row.attempt) == ("pending", 0)
    assert world.close_round()
    assert world.live_round().base_version == 2


def test_what_was_late_is_refused_and_its_stretch_goes_first(world: World):
    late = begun(world)
    world.clock.advance(6.0)
    swept(world)

    assert world.heartbeat(late, "w2").lease is LeaseState.LOST
    with pytest.raises(RefusedError, match="lease_id does not hold"):
        world.submit(late, "w2")
    world.close_round()

    again = world.claimed("w2")
    assert (again.task_id, again.byte_offset) == (late.task_id, late.byte_offset)
    assert again.base_version == 2


def test_what_a_late_worker_did_by_its_last_progress_counts_for_its_speed(world: World):
    begun(world)
    world.clock.advance(6.0)

    swept(world)

    assert speed_of(world, "w2") == pytest.approx(48 / 15)


def test_a_late_worker_without_a_token_keeps_its_speed(world: World):
    world.start_run(QUORUM)
    for name, speed in (("w1", 16.0), ("w2", 8.0)):
        world.register(name)
        world.set_speed(name, speed)
    first = world.claimed("w1")
    world.claimed("w2")
    world.submit(first, "w1")
    world.clock.advance(6.0)

    assert swept(world) == 1

    assert speed_of(world, "w2") == 8.0


def test_given_back_work_is_cut_to_size_where_a_round_does_not_wait(world: World):
    late = begun(world)
    world.clock.advance(6.0)
    swept(world)
    world.close_round()
    world.set_speed("w2", 4.0)

    again = world.claimed("w2")

    assert again.task_id == late.task_id
    assert again.byte_length // 4 == 80


def test_a_probe_is_waited_for(world: World):
    world.start_run(QUORUM)
    for name in ("w1", "w2"):
        world.register(name)
    world.set_speed("w1", 16.0)
    first = world.claimed("w1")
    world.claimed("w2")
    world.submit(first, "w1")
    world.clock.advance(20.0)

    assert swept(world) == 0


def test_without_a_quorum_it_waits_for_all(world: World):
    begun(world, msgspec.structs.replace(QUORUM, quorum=1.0))
    world.clock.advance(10.0)

    assert swept(world) == 0
    assert world.live_round().state == "open"
