"""A file of our own that breaks holds work up, and costs no task an attempt."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sqlalchemy import select

from bitnet_ext.wire.verdicts import ErrorCode, FailCode
from coordinator.domain.errors import RefusedError
from coordinator.service.looking import look
from coordinator.service.own_files import look_again
from coordinator.service.serving import open_shard, open_weights
from coordinator.service.shard_check import check_shards
from coordinator.service.starting import RunSettings
from coordinator.service.sweeping import sweep
from coordinator.store.blobs import BlobKind, version_blob
from coordinator.store.tables import events
from tests.unit.coordinator.fleets import PLAN, World

SETTINGS = RunSettings(preset="tiny", seed=3, plan=PLAN)


@pytest.fixture
def held(running: World) -> World:
    """Return a fleet whose shards were hashed, as they are at the start."""
    fleet = running.fleet
    fleet.shard_stamps = check_shards(fleet.corpus, fleet.the_manifest())
    return running


def blob(world: World, kind: BlobKind, version: int = 1) -> Path:
    return world.fleet.blobs.path(kind, version_blob(version))


def shard(world: World, shard_id: str) -> Path:
    return world.fleet.corpus / "tokenized" / f"{shard_id}.bin"


def fetched(world: World, served: int | str) -> bytes:
    opening = open_weights if isinstance(served, int) else open_shard
    source = world.do(opening(world.fleet, served))
    try:
        return source.read(0, source.num_bytes)
    finally:
        source.close()


def refused(world: World, served: int | str) -> ErrorCode:
    with pytest.raises(RefusedError) as caught:
        fetched(world, served)
    return caught.value.code


def missing(world: World) -> str | None:
    now = world.clock.now()
    view = world.read(
        lambda c: look(
            c, world.fleet, now=now, loop_lag_ms=0, insecure_http=False, history=False
        )
    )
    return view.missing


def kinds(world: World) -> list[str]:
    found = world.read(lambda c: [row.kind for row in c.execute(select(events))])
    return [kind for kind in found if kind.startswith("file.")]


def sweep_later(world: World, seconds: float) -> None:
    world.clock.advance(seconds)
    world.do(sweep(world.fleet, SETTINGS))
    world.do(look_again(world.fleet))


def flip(path: Path) -> None:
    """Damage a file; neither its length nor its time tells."""
    content, before = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(b"half")]
)
def test_a_published_frame_is_made_anew_while_somebody_asks_for_it(held, damage):
    path = blob(held, BlobKind.PUBLISHED)
    whole = path.read_bytes()
    damage(path)

    assert fetched(held, 1) == whole

    assert path.read_bytes() == whole
    assert missing(held) is None
    assert held.claim() is not None


def test_a_frame_whose_content_rotted_is_made_anew_once_a_worker_says_so(held):
    path = blob(held, BlobKind.PUBLISHED)
    whole = path.read_bytes()
    flip(path)
    task = held.claimed()

    assert held.fail(task, code=FailCode.BAD_WEIGHTS).state == "pending"

    assert path.read_bytes() == whole
    assert held.task(task.task_id).attempt == 0
    assert held.worker("w1").tasks_failed == 0


def test_a_version_that_is_lost_holds_work_up_until_it_is_back(held, caplog):
    published, state = blob(held, BlobKind.PUBLISHED), blob(held, BlobKind.STATE)
    whole = published.read_bytes()
    task = held.claimed()
    published.unlink()
    flip(state)

    assert [refused(held, 1) for _ in range(3)] == [ErrorCode.UNKNOWN_VERSION] * 3
    held.fail(task, code=FailCode.BAD_WEIGHTS)
    for _ in range(5):
        assert held.claim() is None
        sweep_later(held, 60.0)

    assert str(published) in missing(held)
    assert held.task(task.task_id).attempt == 0
    assert kinds(held) == ["file.broken"]
    assert caplog.text.count("no work is given out") == 1
    published.write_bytes(whole)
    sweep_later(held, 60.0)
    assert missing(held) is None
    assert kinds(held) == ["file.broken", "file.mended"]
    assert held.claimed().task_id == task.task_id
    assert fetched(held, 1) == whole


@pytest.mark.parametrize("damage", [Path.unlink, flip, lambda p: p.write_bytes(b"")])
def test_a_broken_shard_holds_work_up_until_it_is_back(held, damage):
    task = held.claimed()
    path = shard(held, task.shard_id)
    whole = path.read_bytes()
    damage(path)

    assert held.fail(task, code=FailCode.BAD_SHARD).state == "pending"

    assert refused(held, task.shard_id) is ErrorCode.UNKNOWN_SHARD
    assert held.task(task.task_id).attempt == 0
    assert held.claim() is None
    assert task.shard_id in missing(held)
    path.write_bytes(whole)
    sweep_later(held, 2.0)
    assert missing(held) is None
    assert held.claimed().task_id == task.task_id
    assert fetched(held, task.shard_id) == whole


def test_a_shard_that_was_only_touched_is_served_on(held):
    path = shard(held, "train-00000")
    os.utime(path, ns=(1, 1))

    assert fetched(held, "train-00000") == path.read_bytes()
    assert missing(held) is None


def test_what_is_broken_is_looked_at_less_and_less_often(held):
    path = shard(held, "train-00000")
    whole = path.read_bytes()
    path.unlink()
    refused(held, "train-00000")
    for seconds in (2.0, 4.0, 8.0):
        sweep_later(held, seconds)

    path.write_bytes(whole)
    sweep_later(held, 15.0)
    assert missing(held) is not None
    sweep_later(held, 1.0)

    assert missing(held) is None


def test_a_lease_whose_answer_was_lost_is_told_again_all_the_same(held):
    task = held.claimed(claim_id="c")
    shard(held, task.shard_id).unlink()
    refused(held, task.shard_id)

    assert held.claimed(claim_id="c").task_id == task.task_id


def test_what_a_worker_makes_up_costs_an_attempt(held):
    task = held.claimed()

    held.fail(task, code=FailCode.BAD_WEIGHTS)
    held.clock.advance(60.0)
    held.fail(held.claimed(), code=FailCode.BAD_SHARD)

    assert held.task(task.task_id).attempt == 2
    assert kinds(held) == []


def test_a_lost_version_that_no_round_starts_from_holds_nobody_up(held):
    held.train_round(0.5)
    for kind in (BlobKind.PUBLISHED, BlobKind.STATE):
        blob(held, kind).unlink()

    assert refused(held, 1) is ErrorCode.UNKNOWN_VERSION

    assert missing(held) is None
    assert held.claim() is not None
