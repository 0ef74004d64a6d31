"""Stretches that the corpus does not have: nobody gets them, and they block nobody."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from bitnet_ext.wire.verdicts import TaskKind
from coordinator.store import runs, tasks
from coordinator.store.tables import events
from tests.unit.coordinator.fleets import World

#: The corpus has train-00000 with 1000 tokens and train-00001 with 504.
NOWHERE = [("train-00007", 0), ("train-00001", 500), ("train-00000", 1000)]


def add_task(world, shard_id, start, name="t-bad"):
    """Add a task of 64 tokens that goes before everything else."""
    world.write(
        lambda c: tasks.add_task(
            c,
            task_id=name,
            run_id="r-1",
            kind=TaskKind.TRAIN,
            epoch=0,
            shard_id=shard_id,
            start_token=start,
            num_tokens=64,
            fixed_size=True,
            created_at=0.0,
        )
    )


def add_range(world, shard_id, start):
    """Add a range of 64 tokens that goes before everything else."""
    world.write(
        lambda c: runs.add_range(
            c,
            run_id="r-1",
            epoch=0,
            shard_id=shard_id,
            start_token=start,
            num_tokens=64,
        )
    )


def kinds(world):
    return [row.kind for row in world.read(lambda c: list(c.execute(select(events))))]


@pytest.mark.parametrize(("shard_id", "start"), NOWHERE)
def test_a_task_on_no_stretch_of_the_corpus_is_given_up(
    running: World, shard_id, start, caplog
):
    for number in range(3):
        add_task(running, shard_id, start, f"t-bad-{number}")

    task = running.claimed()

    assert (task.shard_id, task.byte_offset) == ("train-00000", 0)
    for number in range(3):
        row = running.task(f"t-bad-{number}")
        assert row.state == "failed"
        assert shard_id in row.reason
    assert kinds(running).count("stretches.dropped") == 1
    assert "given up 3 tasks and 0 ranges" in caplog.text


@pytest.mark.parametrize(("shard_id", "start"), NOWHERE)
def test_a_range_that_the_corpus_does_not_have_is_dropped(
    running: World, shard_id, start, caplog
):
    add_range(running, shard_id, start)

    task = running.claimed()

    assert (task.shard_id, task.byte_offset) == ("train-00000", 0)
    left = 1504 - task.byte_length // 4
    assert running.read(lambda c: runs.range_tokens(c, "r-1")) == left
    assert "given up 0 tasks and 1 ranges" in caplog.text


def test_a_stretch_up_to_the_very_end_of_a_shard_is_trained(running: World):
    add_task(running, "train-00001", 504 - 64)

    assert running.claimed().task_id == "t-bad"


def test_an_epoch_that_ends_with_such_a_stretch_is_followed_by_the_next(
    running: World,
):
    running.train_round(0.5)
    running.write(lambda c: runs.drop_ranges(c, "r-1"))
    add_task(running, "train-00007", 0)

    assert running.claim() is not None

    assert running.run_row().epoch == 2
