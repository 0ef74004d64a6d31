"""Every trained token has one fate, whatever happens to its lease or its round."""

from __future__ import annotations

import msgspec
import pytest

from bitnet_ext.wire.verdicts import FailCode
from coordinator.domain.accounting import Fate, fate_of_expired, tally
from coordinator.service.starting import _end_run
from coordinator.store import rounds, tallies
from tests.unit.coordinator.fleets import PLAN, World


def tokens(world: World, worker_id: str = "w1") -> dict[str, int]:
    """Return what became of the tokens of a worker, without what is zero."""
    by_worker = world.read(lambda c: tallies.tokens_by_worker(c, "r-1"))
    return {fate: n for fate, n in by_worker.get(worker_id, {}).items() if n}


def half_done(world: World):
    """Claim, and report half of the task after 10 s."""
    task = world.claimed()
    world.clock.advance(10.0)
    world.heartbeat(task, tokens_done=32, cpu_s=1.0)
    return task


def test_accepted_tokens_become_applied_ones(running: World):
    running.submit(running.claimed())
    assert tokens(running) == {"accepted": 64}

    running.close_round()

    assert tokens(running) == {"applied": 64}


def test_a_worker_that_is_silent_loses_what_it_had_by_its_last_heartbeat(
    running: World,
):
    half_done(running)
    running.clock.advance(31.0)

    running.sweep()

    assert tokens(running) == {"silent": 32}


def test_heartbeats_without_progress_lose_it_as_stuck(running: World):
    running.set_speed("w1", 64.0)
    task = half_done(running)
    for _ in range(4):
        running.clock.advance(9.0)
        running.heartbeat(task, tokens_done=32, cpu_s=1.0)

    running.sweep()

    assert tokens(running) == {"stuck": 32}


def test_past_the_hard_limit_it_is_overdue(running: World):
    running.set_speed("w1", 50.0)  # 1000 tokens in 20 s, so the limit is 120 s
    task = running.claimed()
    for number in range(1, 15):
        running.clock.advance(9.0)
        running.heartbeat(task, tokens_done=number)

    running.sweep()

    assert tokens(running) == {"overdue": 13}


def test_a_part_counts_as_far_as_it_was_trained_and_predicted(running: World):
    running.set_speed("w1", 1.0)
    task = running.claimed()  # 56 tokens, 60 s in whole sequences
    running.clock.advance(16.0)

    running.submit(task, num_steps=1)

    assert tokens(running) == {"accepted": 16}
    (claim,) = running.read(lambda c: rounds.claims_of(c, 1))
    assert (claim.num_tokens, claim.tokens_done) == (16, 16)
    assert claim.predicted_s == pytest.approx(16.0)
    assert running.worker("w1").tokens_per_s == pytest.approx(1.0)


def test_what_is_given_back_or_failed_is_told_apart(running: World):
    running.release(half_done(running))
    assert tokens(running) == {"released": 32}

    running.fail(half_done(running), code=FailCode.WORKER_ERROR)

    assert tokens(running) == {"released": 32, "failed": 32}


def test_a_filtered_submission_counts_as_waste(running: World):
    running.submit(running.claimed(), value=3e38)

    assert running.close_round()

    assert tokens(running) == {"filtered": 64}


def test_what_a_guard_leaves_out_is_filtered_and_the_rest_applied(world: World):
    world.start_run()
    for name in ("w1", "w2", "w3"):
        world.register(name)
        world.set_speed(name, 1.0)

    world.train_round(0.5, 0.5, 50.0)

    assert tokens(world, "w1") == tokens(world, "w2") == {"applied": 64}
    assert tokens(world, "w3") == {"filtered": 64}


def test_what_a_round_went_on_without_is_late(world: World):
    world.start_run(msgspec.structs.replace(PLAN, round_s=20.0, quorum=0.6))
    for name, speed in (("w1", 16.0), ("w2", 8.0)):
        world.register(name)
        world.set_speed(name, speed)
    first, second = world.claimed("w1"), world.claimed("w2")
    world.heartbeat(second, "w2", tokens_done=48)
    world.submit(first, "w1")
    world.clock.advance(6.0)

    world.sweep()

    assert tokens(world, "w2") == {"late": 48}


def test_a_hard_reset_leaves_nothing_accepted(running: World):
    running.register("w2")
    first, second = running.claimed("w1"), running.claimed("w2")
    running.submit(first, "w1")
    running.heartbeat(second, "w2", tokens_done=16)

    running.write(lambda c: _end_run(c, running.run_row(), running.clock.now()))

    assert tokens(running) == {"filtered": 64}
    assert tokens(running, "w2") == {"reset": 16}
    assert running.worker("w1").tokens_per_s is None


def test_an_evaluation_trains_nothing(world: World):
    world.start_run(scored=True, seeded=False)
    world.register()
    task = world.claimed()
    world.heartbeat(task, tokens_done=50)

    world.release(task)

    assert tokens(world) == {}


def test_the_tally_adds_up_and_leaves_out_what_is_zero():
    found = tally({"accepted": 1, "applied": 2, "stuck": 4, "late": 0, "filtered": 8})

    assert (found.trained, found.accepted, found.applied) == (15, 1, 2)
    assert found.wasted == {Fate.FILTERED: 8, Fate.STUCK: 4}


@pytest.mark.parametrize(
    ("hard_at", "heartbeat_at", "due"),
    [
        (99.9, 99.0, Fate.OVERDUE),
        (None, 70.1, Fate.STUCK),
        (200.0, 70.0, Fate.SILENT),
    ],
)
def test_why_a_lease_ran_out(hard_at, heartbeat_at, due):
    found = fate_of_expired(
        expires_at=100.0,
        hard_at=hard_at,
        heartbeat_at=heartbeat_at,
        ttl_s=30.0,
        now=100.0,
    )

    assert found is due
