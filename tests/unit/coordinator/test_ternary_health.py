"""Ternary health: of the values that the forward pass uses, for each scored version."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from bitnet_ext import reference
from bitnet_ext.layout import segments
from coordinator.domain.ternary_health import examine
from coordinator.service.feed import Feed
from coordinator.service.lag import LoopLag
from coordinator.service.pruning import prune_versions
from coordinator.service.ternary_health import examine_due
from coordinator.service.version_blobs import read_published
from coordinator.store import versions
from coordinator.store.blobs import BlobKind, version_blob
from tests.unit.coordinator.fleets import NUM_PARAMS, PLAN, SHAPE, World
from tests.unit.coordinator.test_looking import looked

MATRICES = [f"layers.0.{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")]
(Q,) = (part for part in segments(SHAPE) if part.name == "layers.0.q")


@pytest.fixture
def scored(world: World) -> World:
    """A run of which every version is scored; version 1 has its score."""
    world.start_run(msgspec.structs.replace(PLAN, evaluate_every=1), scored=True)
    world.register("w1")
    score(world)
    return world


def score(world: World) -> None:
    world.clock.advance(100.0)  # a score that has waited goes first
    world.score(world.claimed())


def train(world: World, seed: int) -> None:
    noise = np.random.default_rng(seed).standard_normal(NUM_PARAMS, dtype=np.float32)
    world.set_speed("w1", 64 / 60)
    world.submit(world.claimed(), value=noise)
    assert world.close_round()
    score(world)


def look_at_all(world: World) -> int:
    return world.do(examine_due(world.fleet))


def matrix(flat, part=Q):
    return flat[part.offset : part.offset + part.size].reshape(part.shape)


def test_the_figures_are_those_of_the_slow_twin_of_the_quantiser():
    rng = np.random.default_rng(1)
    before, after = (rng.standard_normal(NUM_PARAMS, dtype=np.float32) for _ in "ab")

    found = examine(SHAPE, after, before)

    assert [each.name for each in found] == MATRICES
    for each in found:
        (part,) = (part for part in segments(SHAPE) if part.name == each.name)
        new, old = matrix(after, part), matrix(before, part)
        values = reference.ternary_values(new)
        assert each.zeros == np.mean(values == 0)
        assert each.flips == np.mean(values != reference.ternary_values(old))
        assert each.scale == reference.absmean_scale(new)
        assert each.drift == each.scale / reference.absmean_scale(old) - 1.0


def test_one_flipped_value_is_one_and_the_rest_is_left_alone():
    before = np.ones(NUM_PARAMS, dtype=np.float32)
    after = before.copy()
    matrix(after)[0, 0] = -1.0  # its size, and so the scale, is the same

    first, *rest = examine(SHAPE, after, before)

    assert (first.flips, first.drift, first.zeros) == (1 / Q.size, 0.0, 0.0)
    assert {(each.flips, each.drift) for each in rest} == {(0.0, 0.0)}


def test_a_version_alone_has_zeros_and_a_scale():
    after = np.zeros(NUM_PARAMS, dtype=np.float32)
    matrix(after)[0] = 8.0

    first, second, *_ = examine(SHAPE, after, None)

    assert (first.flips, first.drift) == (None, None)
    assert (first.zeros, first.scale) == (7 / 8, 1.0)
    assert second.zeros == 1.0


def test_each_scored_version_is_looked_at_once_and_compared_with_the_one_before(
    scored: World,
):
    train(scored, 1)
    train(scored, 2)

    assert look_at_all(scored) == 3
    assert look_at_all(scored) == 0

    seen = looked(scored).ternary
    assert (seen.version, seen.before) == (3, 2)
    weights = [read_published(scored.fleet.blobs, number) for number in (3, 2)]
    assert seen.matrices == examine(SHAPE, *weights)
    # As nothing would be that is compared with itself.
    assert all(0.0 < each.flips < 1.0 for each in seen.matrices)


def test_what_is_not_scored_is_not_looked_at(running: World):
    running.train_round(0.5)

    assert look_at_all(running) == 0
    assert looked(running).ternary is None


def test_the_dump_has_the_last_versions_and_the_page_hears_of_the_newest(
    scored: World,
):
    feed = Feed(
        scored.fleet,
        LoopLag(scored.clock),
        insecure_http=False,
        is_watched=lambda: True,
    )
    train(scored, 1)
    scored.do(feed.update())
    look_at_all(scored)

    dump = scored.do(feed.telemetry())
    scored.do(feed.update())

    assert [(each.version, each.before) for each in dump.ternary] == [(2, 1), (1, None)]
    assert dump.fleet.ternary == dump.ternary[0]
    kind, update = scored.told[-1]
    assert (kind, update.ternary) == ("fleet.updated", dump.ternary[0])


def test_the_version_to_compare_with_is_kept(scored: World):
    scored.fleet.keep_versions = 1
    train(scored, 1)
    look_at_all(scored)
    scored.submit(scored.claimed(), value=0.5)
    scored.close_round()
    scored.do(prune_versions(scored.fleet))

    score(scored)
    look_at_all(scored)

    seen = looked(scored).ternary
    assert (seen.version, seen.before) == (3, 2)


def test_where_the_version_before_is_gone_nothing_is_compared(scored: World):
    train(scored, 1)
    scored.write(lambda c: versions.mark_pruned(c, [1]))

    assert look_at_all(scored) == 1

    seen = looked(scored).ternary
    assert (seen.version, seen.before) == (2, None)
    assert {each.flips for each in seen.matrices} == {None}


@pytest.mark.parametrize(("broken", "shown"), [(2, (1, None)), (1, (2, None))])
def test_a_broken_frame_is_told_once_and_holds_nothing_up(
    scored: World, caplog, broken, shown
):
    train(scored, 1)
    path = scored.fleet.blobs.path(BlobKind.PUBLISHED, version_blob(broken))
    path.write_bytes(b"noise")

    assert look_at_all(scored) == 2

    seen = looked(scored).ternary
    assert (seen.version, seen.before) == shown
    told = [r for r in caplog.records if r.event == "health.unknown"]
    assert {r.version for r in told} == {broken}
