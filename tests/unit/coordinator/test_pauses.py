"""Time in which the coordinator stood still makes no worker slow."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.domain.errors import RefusedError
from coordinator.domain.plan import AcceptLate
from coordinator.domain.throughput import waited_s
from coordinator.service.grace import awake, extend_leases
from coordinator.service.sweeping import keep_clock
from coordinator.store import rounds
from tests.unit.coordinator.fleets import PLAN, World, body, frame


def submit(world: World, task, compute_s: float) -> None:
    meta = world.meta(task, compute_s=compute_s)
    world.send(body(meta, frame(task, 0.5)))


def killed(world: World, away_s: float) -> None:
    """Stop the coordinator at once, and start it again after `away_s`."""
    world.do(keep_clock(world.fleet))
    world.clock.advance(away_s)
    extend_leases(world.fleet)


def stopped(world: World, away_s: float) -> None:
    """Let the process stand still for `away_s`, as SIGSTOP does."""
    world.fleet.swept_at = world.clock.monotonic()
    world.clock.advance(away_s)
    world.do(awake(world.fleet))


@pytest.mark.parametrize("pause", [killed, stopped])
def test_a_pause_of_the_coordinator_is_no_slowness_of_a_worker(running: World, pause):
    running.set_speed("w1", 4.0)
    task = running.claimed()  # 240 tokens
    running.clock.advance(10.0)
    pause(running, 600.0)
    running.clock.advance(2.0)

    submit(running, task, compute_s=8.0)

    tokens = task.byte_length // 4
    assert running.worker("w1").tokens_per_s == pytest.approx(tokens / 12.0)
    (claim,) = running.read(lambda c: rounds.claims_of(c, 1))
    assert claim.paused_s == pytest.approx(600.0)


def test_who_computed_on_in_the_pause_is_not_taken_for_faster(running: World):
    running.set_speed("w1", 4.0)
    task = running.claimed()
    running.clock.advance(10.0)
    killed(running, 50.0)

    submit(running, task, compute_s=48.0)

    tokens = task.byte_length // 4
    assert running.worker("w1").tokens_per_s == pytest.approx(tokens / 48.0)


def test_pauses_ring_no_alarm(running: World):
    running.set_speed("w1", 4.0)
    for _ in range(3):
        task = running.claimed()
        predicted_s = running.task(task.task_id).predicted_s
        running.clock.advance(10.0)
        killed(running, 600.0)
        running.clock.advance(predicted_s - 10.0)
        submit(running, task, compute_s=predicted_s - 1.0)
        running.close_round()

    assert running.worker("w1").duration_ratio == pytest.approx(1.0)


def test_a_lost_lease_that_was_mostly_a_pause_tells_nothing(running: World):
    running.set_speed("w1", 4.0)
    task = running.claimed()
    running.clock.advance(1.0)
    killed(running, 600.0)
    running.clock.advance(1.0)
    running.heartbeat(task, tokens_done=200)

    running.release(task)

    assert running.worker("w1").tokens_per_s == 4.0


def test_a_lost_lease_with_a_short_pause_tells_its_speed(running: World):
    running.set_speed("w1", 4.0)
    task = running.claimed()
    running.clock.advance(15.0)
    killed(running, 10.0)
    running.clock.advance(5.0)
    running.heartbeat(task, tokens_done=200)

    running.release(task)

    assert running.worker("w1").tokens_per_s == pytest.approx(10.0)


def test_a_late_result_that_is_refused_was_not_waiting_while_it_computed(world: World):
    world.start_run(msgspec.structs.replace(PLAN, accept_late=AcceptLate.NEVER))
    world.register("w1")
    world.set_speed("w1", 4.0)
    task = world.claimed()
    killed(world, 20.0)
    world.clock.advance(110.0)
    world.sweep()

    with pytest.raises(RefusedError):
        submit(world, task, compute_s=120.0)

    tokens = task.byte_length // 4
    assert world.worker("w1").tokens_per_s == pytest.approx(tokens / 120.0)


@pytest.mark.parametrize(
    ("compute_s", "waited"), [(0.0, 60.0), (12.0, 60.0), (40.0, 32.0), (99.0, 0.0)]
)
def test_what_a_worker_says_it_computed_was_no_waiting(compute_s, waited):
    found = waited_s(elapsed_s=72.0, paused_s=60.0, compute_s=compute_s)

    assert found == waited
