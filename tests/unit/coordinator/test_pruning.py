"""Old versions lose their blobs, rows first; what somebody needs stays."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.service.pruning import prune_versions
from coordinator.service.starting import reconcile
from coordinator.store import runs, versions
from coordinator.store.blobs import BlobKind, version_blob
from tests.fakes import START, MadeToFailError
from tests.unit.coordinator.fleets import PLAN, World


@pytest.fixture
def short(running: World) -> World:
    """A fleet that keeps two versions; its epochs are endless enough."""
    running.fleet.keep_versions = 2
    return running


def kept(world):
    rows = world.read(versions.kept_versions)
    numbers = [row.version for row in rows]
    for kind in (BlobKind.PUBLISHED, BlobKind.STATE):
        assert world.fleet.blobs.names(kind) == [version_blob(n) for n in numbers]
    return numbers


def test_the_last_versions_stay_and_payloads_of_gone_ones_go(short: World):
    seen = []
    for _ in range(5):
        short.train_round(0.5)
        seen.append(kept(short))

    assert seen == [[1, 2], [2, 3], [3, 4], [4, 5], [5, 6]]
    # Versions 5 and 6 can still be made again: from 4, which is gone, by no one.
    assert len(short.fleet.blobs.names(BlobKind.PAYLOAD)) == 2


def test_nothing_to_prune_changes_nothing(short: World):
    short.train_round(0.5)
    before = short.everything()

    assert short.do(prune_versions(short.fleet)) == []

    assert short.everything() == before


def test_what_waits_for_its_score_or_is_the_best_stays(world: World):
    world.fleet.keep_versions = 1
    world.start_run(msgspec.structs.replace(PLAN, evaluate_every=3), scored=True)
    world.register("w1")
    world.register("w2")
    for _ in range(4):
        world.train_round(0.5)
    assert kept(world) == [1, 4, 5]

    world.submit(world.claimed("w1"))
    for nats in (100.0, 200.0):
        world.score(world.claimed("w2"), nats, worker_id="w2")
    world.close_round()

    assert kept(world) == [1, 6]
    assert world.read(lambda c: versions.best_version(c, "r-1")) == 1


def test_a_version_that_is_being_scored_stays(world: World):
    world.fleet.keep_versions = 1
    world.start_run(scored=True)
    world.register("w1")
    world.register("w2")
    world.clock.advance(100.0)
    world.claimed("w2")

    world.train_round(0.5)
    world.train_round(0.5)

    assert kept(world) == [1, 3]


def test_versions_of_an_earlier_run_stay(short: World):
    short.train_round(0.5)
    short.write(lambda c: runs.add_run(c, **another_run()))
    short.write(lambda c: versions.add_version(c, **root_of_another_run()))
    short.fleet.keep_versions = 1

    assert short.do(prune_versions(short.fleet)) == []


def another_run():
    return {
        "run_id": "r-2",
        "state": "running",
        "seed": 1,
        "preset": "tiny",
        "model_json": "{}",
        "layout_hash": "ab" * 32,
        "tokenizer_hash": "ab" * 32,
        "corpus_hash": "ab" * 32,
        "plan_json": "{}",
        "root_version": 99,
        "created_at": START + 1000.0,
    }


def root_of_another_run():
    return {
        "version": 99,
        "run_id": "r-2",
        "created_at": START,
        "tokens_total": 0,
        "num_submissions": 0,
        "plan_json": "{}",
        "published_sha256": "ab" * 32,
        "published_bytes": 1,
        "state_sha256": "ab" * 32,
        "state_bytes": 1,
    }


def test_a_crash_between_rows_and_files_leaves_orphans_for_the_next_start(
    short: World,
):
    short.fleet.keep_versions = 20
    for _ in range(3):
        short.train_round(0.5)
    short.fleet.keep_versions = 2
    with short.fs.crashing(2), pytest.raises(MadeToFailError):
        short.do(prune_versions(short.fleet))
    assert [row.version for row in short.read(versions.kept_versions)] == [3, 4]

    reconcile(short.fleet)

    assert kept(short) == [3, 4]
    assert len(short.fleet.blobs.names(BlobKind.PAYLOAD)) == 2


def test_a_fleet_without_a_run_has_nothing_to_prune(world: World):
    assert world.do(prune_versions(world.fleet)) == []
