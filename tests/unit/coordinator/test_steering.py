"""What an operator asks for: more to train, a time to stop, a banner taken down."""

from __future__ import annotations

import pytest

from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError
from coordinator.service.steering import (
    MAX_TASKS,
    acknowledge_reset,
    seed_epoch,
    train_until,
)
from coordinator.service.tending import requeue_failed
from coordinator.store import runs, tasks
from tests.unit.coordinator.fleets import World


@pytest.fixture
def unseeded(world: World) -> World:
    world.start_run(seeded=False)
    world.register("w1")
    return world


def test_an_epoch_of_ranges_is_cut_when_it_is_claimed(unseeded: World):
    assert unseeded.claim() is None

    seeded = unseeded.do(seed_epoch(unseeded.fleet, None))

    assert (seeded.epoch, seeded.num_tasks, seeded.num_tokens) == (1, 0, 1504)
    assert unseeded.run_row().epoch == 1
    assert unseeded.read(lambda c: runs.range_tokens(c, "r-1")) == 1504
    assert unseeded.claim() is not None


def test_an_epoch_of_fixed_tasks_covers_every_token_in_order(unseeded: World):
    seeded = unseeded.do(seed_epoch(unseeded.fleet, 300))

    assert (seeded.epoch, seeded.num_tasks) == (1, 6)
    found = []
    while (task := unseeded.claim()) is not None:
        found.append((task.shard_id, task.byte_offset // 4, task.byte_length // 4))
        unseeded.submit(task)
        unseeded.close_round()
        if unseeded.run_row().epoch > 1:
            break
    assert found == [
        # 300, in whole sequences of 8.
        ("train-00000", 0, 304),
        ("train-00000", 304, 304),
        ("train-00000", 608, 304),
        ("train-00000", 912, 88),
        ("train-00001", 0, 304),
        ("train-00001", 304, 200),
    ]


def test_each_seeding_is_another_epoch(unseeded: World):
    epochs = [unseeded.do(seed_epoch(unseeded.fleet, None)).epoch for _ in range(3)]

    assert epochs == [1, 2, 3]
    assert unseeded.read(lambda c: runs.range_tokens(c, "r-1")) == 3 * 1504


@pytest.mark.parametrize("tokens", [0, -1])
def test_a_task_needs_a_token(unseeded: World, tokens):
    before = unseeded.everything()

    with pytest.raises(RefusedError) as caught:
        unseeded.do(seed_epoch(unseeded.fleet, tokens))

    assert (caught.value.code, caught.value.field) == (ErrorCode.BAD_REQUEST, "tokens")
    assert str(tokens) in caught.value.message
    assert str(MAX_TASKS) in caught.value.message
    assert unseeded.everything() == before


def test_a_time_to_stop_can_be_set_and_taken_back(unseeded: World):
    now = unseeded.clock.now()
    unseeded.do(seed_epoch(unseeded.fleet, None))

    unseeded.do(train_until(unseeded.fleet, now))
    assert unseeded.claim() is None
    unseeded.do(train_until(unseeded.fleet, None))
    assert unseeded.claim() is not None


def test_a_run_that_ended_for_want_of_time_goes_on(unseeded: World):
    unseeded.do(seed_epoch(unseeded.fleet, None))
    unseeded.change_run(state="finished", stop_at=unseeded.clock.now())

    unseeded.do(train_until(unseeded.fleet, unseeded.clock.now() + 60))

    assert unseeded.run_row().state == "running"
    assert unseeded.claim() is not None


@pytest.mark.parametrize(
    "ask",
    [
        lambda fleet: train_until(fleet, None),
        lambda fleet: seed_epoch(fleet, None),
        lambda fleet: requeue_failed(fleet, None),
    ],
)
def test_a_used_up_budget_is_not_a_matter_of_time(unseeded: World, ask):
    unseeded.do(seed_epoch(unseeded.fleet, None))
    unseeded.change_run(token_budget=64)
    unseeded.train_round(0.5)
    unseeded.change_run(state="finished")
    before = unseeded.everything()

    with pytest.raises(RefusedError) as caught:
        unseeded.do(ask(unseeded.fleet))

    assert caught.value.field == "token_budget"
    assert "(64 tokens) is used up: to train on" in caught.value.message
    assert "set-plan token_budget=" in caught.value.message
    assert "train-for" not in caught.value.message
    assert unseeded.everything() == before


def test_the_banner_of_a_reset_is_taken_down(unseeded: World):
    unseeded.change_run(reset_from_version=1, reset_acknowledged=False)

    unseeded.do(acknowledge_reset(unseeded.fleet))

    assert unseeded.run_row().reset_acknowledged is True


@pytest.mark.parametrize(
    "ask",
    [
        lambda fleet: seed_epoch(fleet, None),
        lambda fleet: train_until(fleet, None),
        acknowledge_reset,
    ],
)
def test_without_a_run_nothing_can_be_steered(world: World, ask):
    with pytest.raises(RefusedError) as caught:
        world.do(ask(world.fleet))

    assert caught.value.code is ErrorCode.NO_RUN


def test_fixed_tasks_are_all_pending_at_once(unseeded: World):
    unseeded.do(seed_epoch(unseeded.fleet, 300))

    assert unseeded.read(lambda c: tasks.count_not_done(c, "r-1"))["pending"] == 6
