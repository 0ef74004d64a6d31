"""A task that was trained in part: that much counts, and the rest is a range again."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from sqlalchemy import select

from bitnet_ext.layout import segments
from bitnet_ext.wire.verdicts import ErrorCode, RoundKind, TaskState
from coordinator.domain.errors import RefusedError
from coordinator.domain.muon import OptimiserState, gradient_step
from coordinator.domain.plan import step_sizes
from coordinator.service.judging import give_tokens_back
from coordinator.service.steering import seed_epoch
from coordinator.store import rounds, tasks
from coordinator.store.tables import ranges
from tests.unit.coordinator.fleets import PLAN, SHAPE, World, body, frame

#: Two sequences of eight tokens; a probe has four of them.
STEP = 16


def all_ranges(world: World) -> list[tuple[str, int, int]]:
    """Return shard, start and length of every range, the oldest first."""
    rows = world.read(
        lambda c: list(c.execute(select(ranges).order_by(ranges.c.range_id)))
    )
    return [(row.shard_id, row.start_token, row.num_tokens) for row in rows]


def submission_of(world: World, task_id: str):
    row = world.live_round().round_id
    found = world.read(lambda c: rounds.accepted_in_round(c, row))
    return next(one for one in found if one.task_id == task_id)


def test_the_task_is_what_was_trained_and_the_rest_a_range(running: World):
    task = running.claimed()

    running.submit(task, num_steps=3)

    row, taken = running.task(task.task_id), submission_of(running, task.task_id)
    assert (row.state, row.num_tokens) == (TaskState.DONE, 3 * STEP)
    assert (taken.start_token, taken.tokens, taken.num_steps) == (0, 3 * STEP, 3)
    assert all_ranges(running) == [
        ("train-00000", 64, 936),
        ("train-00001", 0, 504),
        ("train-00000", 48, 16),
    ]


def test_run_worker_round_and_speed_count_what_was_trained(running: World):
    task = running.claimed()
    running.clock.advance(12.0)  # 4 tokens/s

    running.submit(task, num_steps=3)

    worker, round_id = running.worker("w1"), running.live_round().round_id
    (claim,) = running.read(lambda c: rounds.claims_of(c, round_id))
    assert running.run_row().tokens_accepted == 48
    assert (worker.tokens_accepted, claim.num_tokens) == (48, 48)
    assert worker.tokens_per_s == pytest.approx(4.0)
    assert running.close_round()
    assert running.claimed().hyper.lr_start == pytest.approx(
        PLAN.learning_rate * 48 / PLAN.warmup_tokens
    )


@pytest.mark.parametrize("kind", RoundKind)
def test_in_the_mean_a_part_weighs_as_much_as_it_has_tokens(world: World, kind):
    world.start_run(msgspec.structs.replace(PLAN, round_kind=kind))
    for name in ("w1", "w2"):
        world.register(name)
    whole, part = world.claimed("w1"), world.claimed("w2")
    world.clock.advance(10.0)

    world.submit(whole, "w1", 0.3)
    world.submit(part, "w2", 0.7, num_steps=1)
    assert world.close_round()

    mixed = msgspec.structs.replace(PLAN, round_kind=kind)
    mean = (64 * 0.3 + 16 * 0.7) / 80
    due = after_one(world, mixed, mean)
    np.testing.assert_allclose(world.state(2).weights, due, rtol=1e-5, atol=1e-6)


def after_one(world: World, plan, mean: float):
    """Return the weights after a round of one submission of `mean` and 80 tokens."""
    before = world.state(1)
    if plan.round_kind is RoundKind.DELTA:
        step = plan.outer_rate * (1 + plan.outer_momentum) * mean
        return before.weights - np.float32(step)
    sizes = step_sizes(plan, tokens_before=0, tokens=80, step=1)
    state = OptimiserState(
        weights=before.weights, momentum=before.momentum, square=before.square
    )
    gradient = np.full_like(before.weights, mean)
    return gradient_step(state, gradient, segments(SHAPE), sizes).weights


def test_the_rest_is_trained_by_the_next_who_comes_to_it(running: World):
    task = running.claimed()
    running.submit(task, num_steps=1)
    running.close_round()
    seen = []

    while running.run_row().epoch == 1:
        running.clock.advance(5.0)
        later = running.claimed()
        seen.append((later.shard_id, later.byte_offset // 4, later.byte_length // 4))
        assert later.seed == task.seed or later.shard_id != task.shard_id
        running.submit(later)
        running.close_round()

    assert seen[-1] == ("train-00000", 16, 48)
    assert running.run_row().tokens_accepted == 1504


def test_the_same_part_sent_again_gets_the_same_answer(running: World):
    task = running.claimed()
    meta = running.meta(task, num_steps=2, tokens=2 * STEP)
    sent = body(meta, frame(task, 0.5))
    first = running.send(sent)
    before = running.everything()

    assert running.send(sent) == first
    assert running.everything() == before


def test_after_a_part_the_rest_cannot_be_handed_in_too(running: World):
    task = running.claimed()
    running.submit(task, num_steps=2)
    before = running.everything()

    with pytest.raises(RefusedError) as caught:
        running.submit(task, num_steps=2)

    assert caught.value.code is ErrorCode.LEASE_LOST
    assert running.everything() == before


def test_a_part_of_a_whole_step_less_names_what_it_may_be(running: World):
    task = running.claimed()

    with pytest.raises(RefusedError) as caught:
        running.send(body(running.meta(task, tokens=24, num_steps=2), frame(task, 1.0)))

    assert caught.value.message == (
        "tokens must be 64, the stretch of the task, or fewer in whole steps of 16, "
        "got 24"
    )


def test_what_is_left_of_a_task_of_a_fixed_size_is_a_range_like_all(world: World):
    world.start_run(seeded=False)
    world.register()
    world.do(seed_epoch(world.fleet, 320))
    task = world.claimed()

    world.submit(task, num_steps=5)

    assert all_ranges(world) == [("train-00000", 80, 240)]
    assert world.read(lambda c: tasks.count_not_done(c, "r-1"))["pending"] == 5


def test_a_part_that_is_left_out_gives_back_what_it_had(running: World):
    task = running.claimed()
    running.submit(task, num_steps=3)

    taken = submission_of(running, task.task_id)
    running.write(
        lambda c: give_tokens_back(
            c, [taken], reason="zeros", now=running.clock.now(), rng=running.rng
        )
    )

    assert all_ranges(running)[2:] == [("train-00000", 48, 16), ("train-00000", 0, 48)]
    assert running.run_row().tokens_accepted == 0
