"""Whatever happens in whatever order: no token is lost, none is trained twice."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import Connection, func, select

from bitnet_ext.wire.verdicts import ErrorCode, LeaseState
from coordinator.domain.accounting import Fate
from coordinator.domain.errors import RefusedError
from coordinator.domain.plan import TrainingPlan
from coordinator.service.starting import reconcile
from coordinator.store.tables import (
    claims,
    events,
    ranges,
    rounds,
    runs,
    submissions,
    tallies,
    tasks,
)
from tests.unit.coordinator.fleets import World, open_world

NAMES = ["w1", "w2", "w3"]
#: Short rounds, so that leases, rounds and epochs end within a short story.
PLAN = TrainingPlan(batch_size=2, round_s=20.0, codec="fp32", evaluate_every=10**6)
NUM_EVENTS = 200


def pieces(connection: Connection) -> dict[tuple[int, str], list[tuple[int, int]]]:
    """Return who accounts for what: (start, end) by epoch and shard, sorted."""
    found = defaultdict(list)
    for row in connection.execute(select(ranges)):
        found[row.epoch, row.shard_id].append((row.start_token, row.num_tokens))
    for row in connection.execute(select(tasks).where(tasks.c.state != "done")):
        found[row.epoch, row.shard_id].append((row.start_token, row.num_tokens))
    for row in connection.execute(
        select(submissions).where(submissions.c.state != "filtered")
    ):
        found[row.epoch, row.shard_id].append((row.start_token, row.tokens))
    return {
        key: sorted((start, start + size) for start, size in stretches)
        for key, stretches in found.items()
    }


def check(world: World) -> None:
    """Every epoch that has begun is covered once, without gap or overlap."""
    found, run = world.read(pieces), world.run_row()
    shards = world.fleet.the_manifest().train_shards()
    assert len(found) == run.epoch * len(shards)
    for epoch in range(1, run.epoch + 1):
        for shard in shards:
            position = 0
            for start, end in found[epoch, shard.shard_id]:
                assert start == position
                position = end
            assert position == shard.num_tokens
    world.read(check_rows)


def check_rows(connection: Connection) -> None:
    leased = list(connection.execute(select(tasks).where(tasks.c.state == "leased")))
    live = connection.execute(select(rounds).where(rounds.c.state != "closed")).one()
    counted = connection.execute(
        select(submissions.c.tokens).where(submissions.c.state != "filtered")
    )
    accepted = connection.execute(select(runs.c.tokens_accepted)).scalar_one()
    assert len({row.lease_worker_id for row in leased}) == len(leased)
    assert {row.round_id for row in leased} <= {live.round_id}
    assert {row.base_version for row in leased} <= {live.base_version}
    assert sum(tokens for (tokens,) in counted) == accepted
    check_tallies(connection, accepted)


def check_tallies(connection: Connection, accepted: int) -> None:
    """Every trained token of a claim that has ended has one fate."""
    trained = connection.execute(select(func.sum(claims.c.tokens_done))).scalar_one()
    fates = {fate: 0 for fate in Fate}
    for row in connection.execute(select(tallies)):
        assert row.tokens >= 0
        fates[Fate(row.fate)] += row.tokens
    assert sum(fates.values()) == (trained or 0)
    assert fates[Fate.ACCEPTED] + fates[Fate.APPLIED] == accepted


class Story:
    """Random things that happen to a fleet."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self.world = world
        self.chance = chance
        self.held = {}
        self.happened = defaultdict(int)

    def go_on(self) -> None:
        """Let one thing happen."""
        act = self.chance.choices(
            [
                self.claim,
                self.submit,
                self.report,
                self.give_back,
                self.wait,
                self.close,
            ],
            [6, 6, 3, 1, 2, 3],
        )[0]
        act(self.chance.choice(NAMES))

    def claim(self, name: str) -> None:
        task = self.world.claim(name)
        if task is not None:
            self.held[name] = task
            self.happened["claimed"] += 1

    def submit(self, name: str) -> None:
        self.world.clock.advance(self.chance.choice([0.1, 5.0, 15.0]))
        # Now and then a gradient that no outer step survives.
        value = 3e38 if self.chance.random() < 0.1 else 1e-3
        num_steps = None
        if (task := self.held.get(name)) is not None and self.chance.random() < 0.3:
            num_steps = self.chance.randint(1, task.num_steps)
            self.happened["part"] += num_steps < task.num_steps
        self.try_to(
            "submitted",
            name,
            lambda t: self.world.submit(t, name, value, num_steps=num_steps),
        )

    def report(self, name: str) -> None:
        if (task := self.held.get(name)) is not None:
            done = self.chance.randint(1, task.byte_length // 4)
            lease = self.world.heartbeat(task, name, tokens_done=done).lease
            self.happened["reported"] += lease is LeaseState.HELD

    def give_back(self, name: str) -> None:
        act = self.chance.choice([self.world.release, self.world.fail])
        self.try_to("given back", name, lambda task: act(task, name))

    def try_to(self, what: str, name: str, act) -> None:
        if (task := self.held.pop(name, None)) is None:
            return
        try:
            act(task)
        except RefusedError as error:
            what = "lost" if error.code is ErrorCode.LEASE_LOST else error.code
        self.happened[what] += 1

    def wait(self, _name: str) -> None:
        self.world.clock.advance(self.chance.choice([1.0, 6.0, 31.0]))
        self.happened["expired"] += self.world.sweep()

    def close(self, _name: str) -> None:
        self.happened["expired"] += self.world.sweep()
        self.happened["closed"] += self.world.close_round()


def tell(folder: Path, seed: int, quorum: float) -> Story:
    with open_world(folder) as world:
        world.start_run(msgspec.structs.replace(PLAN, quorum=quorum))
        for name in NAMES:
            world.register(name)
        story = Story(world, random.Random(seed))
        for _ in range(NUM_EVENTS):
            story.go_on()
            check(world)
        reconcile(world.fleet)
        check(world)
        story.happened["epochs"] = world.run_row().epoch
        kinds = world.read(lambda c: list(c.execute(select(events.c.kind)).scalars()))
        story.happened["late"] = kinds.count("lease.late")
        return story


@pytest.mark.parametrize(
    ("seed", "quorum"),
    [
        (0, 1.0),
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (1, 0.3),
        (3, 0.3),
    ],
)
def test_every_token_of_an_epoch_is_accounted_for_once(tmp_path: Path, seed, quorum):
    story = tell(tmp_path, seed, quorum)

    # Guards the story: it would prove nothing if nothing happened in it.
    assert story.happened["claimed"] > 10
    for what in ("submitted", "part", "reported", "expired", "closed", "lost"):
        assert story.happened[what] > 0
    assert (story.happened["late"] > 0) == (quorum < 1)
