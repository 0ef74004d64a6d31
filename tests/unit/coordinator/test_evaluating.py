"""The score of a version: accepted once, for what was leased and for no more."""

from __future__ import annotations

import math

import msgspec
import pytest
from sqlalchemy import select

from bitnet_ext.wire.verdicts import ErrorCode, TaskKind
from coordinator.domain.errors import RefusedError
from coordinator.service.view import EvaluationPoint
from coordinator.store import tasks, versions
from coordinator.store.tables import events
from tests.unit.coordinator.fleets import PLAN, World

PLAN_OF_EVERY_VERSION = msgspec.structs.replace(PLAN, evaluate_every=1)


@pytest.fixture
def scoring(world: World) -> World:
    """A run whose root waits for its score, and nothing to train."""
    world.start_run(scored=True, seeded=False)
    for name in ("w1", "w2"):
        world.register(name)
    return world


def test_a_score_is_kept_and_published(scoring: World):
    task = scoring.claimed()

    answer = scoring.score(task, nats=186.0)

    row = scoring.read(lambda c: versions.find_evaluation(c, answer.submission_id))
    assert (answer.task_id, answer.version) == (task.task_id, 1)
    assert (row.version, row.nats, row.tokens, row.bytes) == (1, 186.0, 93, 300)
    assert scoring.task(task.task_id).state == "done"
    assert scoring.told[-1] == (
        "version.evaluated",
        EvaluationPoint(
            version=1,
            tokens_total=0,
            loss=2.0,
            bits_per_byte=186.0 / math.log(2.0) / 300,
        ),
    )


def test_three_scores_above_the_best_raise_an_alarm_once(world: World):
    world.start_run(PLAN_OF_EVERY_VERSION, scored=True)
    world.register("w1")
    for nats in (190.0, 186.0, 192.0, 195.0, 193.0, 194.0):
        while (task := world.claimed()).kind != TaskKind.EVALUATE:
            world.clock.advance(1.0)
            world.submit(task)
            world.close_round()
            world.clock.advance(100.0)
        world.score(task, nats=nats)

    (alarm,) = world.read(
        lambda c: list(c.execute(select(events).where(events.c.kind == "loss.risen")))
    )
    reason = "The last 3 evaluations are 3.2 % or more above version 2, the best."
    assert msgspec.json.decode(alarm.body_json) == {"version": 5, "reason": reason}


def test_the_same_score_gets_the_same_answer_and_is_told_once(scoring: World):
    task = scoring.claimed()
    first = scoring.score(task, submission_id="s-same")
    before, told = scoring.everything(), len(scoring.told)
    scoring.clock.advance(1000.0)

    again = scoring.score(task, submission_id="s-same")

    assert msgspec.json.encode(again) == msgspec.json.encode(first)
    assert scoring.everything() == before
    assert len(scoring.told) == told


def test_the_same_id_with_another_score_is_a_conflict(scoring: World):
    task = scoring.claimed()
    scoring.score(task, submission_id="s-same")
    before = scoring.everything()

    with pytest.raises(RefusedError) as caught:
        scoring.score(task, nats=1.0, submission_id="s-same")

    assert caught.value.code is ErrorCode.SUBMISSION_CONFLICT
    assert scoring.everything() == before


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"version": 2}, ErrorCode.STALE_BASE, "version"),
        ({"tokens": 94}, ErrorCode.WRONG_LENGTH, "tokens"),
        ({"bytes": 299}, ErrorCode.WRONG_LENGTH, "bytes"),
        ({"lease_id": "0" * 32}, ErrorCode.LEASE_LOST, "lease_id"),
    ],
)
def test_a_score_of_something_else_is_refused(scoring: World, fields, code, field):
    task = scoring.claimed()
    before = scoring.everything()

    with pytest.raises(RefusedError) as caught:
        scoring.score(task, **fields)

    assert (caught.value.code, caught.value.field) == (code, field)
    assert scoring.everything() == before


def test_a_late_score_is_refused(scoring: World):
    task = scoring.claimed()
    scoring.clock.advance(30.0)

    with pytest.raises(RefusedError) as caught:
        scoring.score(task)

    assert caught.value.code is ErrorCode.LEASE_LOST


def test_a_version_is_scored_once(scoring: World):
    task = scoring.claimed()
    scoring.score(task)
    before = scoring.everything()

    with pytest.raises(RefusedError) as caught:
        scoring.score(task)  # under a new id

    assert caught.value.code is ErrorCode.LEASE_LOST
    assert scoring.everything() == before


def test_the_lease_of_a_training_task_takes_no_score(running: World):
    task = running.claimed()

    with pytest.raises(RefusedError) as caught:
        running.score(task)

    assert caught.value.code is ErrorCode.LEASE_LOST


def test_the_best_version_has_the_lowest_loss(world: World):
    world.start_run(msgspec.structs.replace(PLAN, evaluate_every=1))
    world.register("w1")
    world.register("w2")
    for nats in (300.0, 100.0, 200.0):
        world.train_round(0.1)
        world.submit(world.claimed("w1"))  # until the round closes, nothing to train
        world.score(world.claimed("w2"), nats, worker_id="w2")
        world.close_round()

    assert world.read(lambda c: versions.best_version(c, "r-1")) == 3
    assert world.read(lambda c: tasks.evaluations_open(c, "r-1")) == {5, 6, 7}
