"""Gradient rounds: from mean gradients to the next version, once, and to the bit."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from sqlalchemy import select

from bitnet_ext.codecs import Codec, decode
from bitnet_ext.frames import FrameKind, decode_frame
from bitnet_ext.layout import segments
from bitnet_ext.wire.verdicts import ErrorCode, RoundKind
from coordinator.domain.errors import RefusedError
from coordinator.domain.muon import OptimiserState, gradient_step
from coordinator.domain.plan import step_sizes
from coordinator.service.closing import RoundCloser
from coordinator.service.version_blobs import remake_published
from coordinator.store import versions
from coordinator.store.blobs import BlobKind, version_blob
from coordinator.store.tables import submissions
from tests.unit.coordinator.fleets import (
    NUM_PARAMS,
    PLAN,
    SHAPE,
    World,
    body,
    frame,
    open_world,
)

#: Durability calls of a version: two blobs of three parts each.
NUM_CALLS = 2 * 9
GRADIENTS = msgspec.structs.replace(
    PLAN, round_kind=RoundKind.GRADIENT, learning_rate=0.02, warmup_tokens=1000
)


@pytest.fixture
def running(world: World) -> World:
    world.start_run(GRADIENTS)
    world.register("w1")
    return world


@pytest.mark.parametrize(
    ("plan", "optimiser"), [(PLAN, PLAN.local_optimiser), (GRADIENTS, None)]
)
def test_who_registers_hears_what_makes_its_steps(world: World, plan, optimiser):
    world.start_run(plan)

    assert world.register("w1").optimiser == optimiser


def noise(seed):
    return np.random.default_rng(seed).normal(size=NUM_PARAMS).astype(np.float32)


def stepped(state, mean, *, before, tokens, step):
    """Return the state that a mean gradient leads to."""
    sizes = step_sizes(GRADIENTS, tokens_before=before, tokens=tokens, step=step)
    known = OptimiserState(
        weights=state.weights, momentum=state.momentum, square=state.square
    )
    return gradient_step(known, mean, segments(SHAPE), sizes)


def assert_is(state, due):
    for name in ("weights", "momentum", "square"):
        np.testing.assert_array_equal(getattr(state, name), getattr(due, name))


def test_tasks_say_what_they_want(running: World):
    assert running.claimed().round_kind is RoundKind.GRADIENT


def test_each_round_is_a_step_down_the_mean_at_the_rate_of_its_tokens(running: World):
    running.register("w2")
    running.set_speed("w1", 3.2)  # 192 tokens
    before = 0
    for step in (1, 2):
        base, first, second = running.state(step), noise(step), noise(10 + step)
        held = running.claimed("w1"), running.claimed("w2")
        sizes = [task.byte_length // 4 for task in held]
        running.clock.advance(10.0)
        running.submit(held[1], "w2", second)
        running.submit(held[0], "w1", first)

        assert running.close_round()

        shares = [np.float32(size / sum(sizes)) for size in sizes]
        mean = shares[0] * first + shares[1] * second
        due = stepped(base, mean, before=before, tokens=sum(sizes), step=step)
        assert_is(running.state(step + 1), due)
        assert not np.array_equal(due.weights, base.weights)
        before += sum(sizes)
    assert running.run_row().tokens_accepted == before


def test_the_order_of_arrival_changes_no_bit(tmp_path: Path):
    found = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        folder = tmp_path / str(order)
        folder.mkdir()
        with open_world(folder) as world:
            world.start_run(GRADIENTS)
            for name in ("w1", "w2", "w3"):
                world.register(name)
            held = [world.claimed(name) for name in ("w1", "w2", "w3")]
            for at in order:
                world.submit(held[at], f"w{at + 1}", noise(at))
            world.close_round()
            found.append(world.fleet.blobs.read(BlobKind.STATE, version_blob(2)))

    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("codec", [Codec.INT8, Codec.TERNARY])
def test_coded_gradients_are_merged_as_they_decode(world: World, codec):
    world.start_run(msgspec.structs.replace(GRADIENTS, codec=codec))
    world.register("w1")
    base, task = world.state(1), world.claimed()
    sent = frame(task, noise(3), codec=codec)
    world.send(body(world.meta(task), sent))

    world.close_round()

    header, payload = decode_frame(sent)
    mean = decode(header.codec, payload, NUM_PARAMS)
    assert header.kind is FrameKind.GRADIENT
    assert_is(world.state(2), stepped(base, mean, before=0, tokens=64, step=1))


@pytest.mark.parametrize(
    ("due", "sent"), [(GRADIENTS, RoundKind.DELTA), (PLAN, RoundKind.GRADIENT)]
)
def test_the_other_kind_of_frame_is_refused(world: World, due, sent):
    world.start_run(due)
    world.register("w1")
    task = world.claimed()
    other = frame(msgspec.structs.replace(task, round_kind=sent), 0.5)
    before = world.everything()

    with pytest.raises(RefusedError) as refused:
        world.send(body(world.meta(task), other))

    assert (refused.value.code, refused.value.field) == (ErrorCode.BAD_FRAME, "frame")
    assert f"kind must be {due.round_kind}, got {sent}" in str(refused.value)
    assert world.everything() == before


@pytest.mark.parametrize("ordinal", range(1, NUM_CALLS + 1))
def test_after_a_crash_the_round_is_closed_again_with_the_same_bytes(
    running: World, ordinal
):
    gradient = noise(1)
    due = stepped(running.state(1), gradient, before=0, tokens=64, step=1)
    running.submit(running.claimed(), value=gradient)

    running.close_over_a_crash(ordinal)

    assert_is(running.state(2), due)
    assert len(running.blobs()) == 5


def test_a_new_process_goes_on_from_what_is_on_disk(running: World):
    for seed in (1, 2, 3):
        base = running.state(seed)
        running.closer = RoundCloser(running.fleet)
        task = running.claimed()
        tokens = task.byte_length // 4
        before = running.run_row().tokens_accepted
        running.submit(task, value=noise(seed))

        assert running.close_round()

        due = stepped(base, noise(seed), before=before, tokens=tokens, step=seed)
        assert_is(running.state(seed + 1), due)


def test_the_published_frame_is_made_again_from_the_state(running: World):
    running.train_round(0.5)
    path = running.fleet.blobs.path(BlobKind.PUBLISHED, version_blob(2))
    row = running.read(lambda c: versions.find_version(c, 2))
    whole = path.read_bytes()
    path.unlink()

    remake_published(running.fleet.blobs, row)

    assert path.read_bytes() == whole


def test_a_step_that_is_not_finite_is_left_out_and_its_tokens_go_back(running: World):
    running.submit(running.claimed(), value=3e38)

    assert running.close_round()

    rows = running.read(lambda c: list(c.execute(select(submissions))))
    assert [(row.state, row.reason) for row in rows] == [
        ("filtered", "not finite after the step")
    ]
    assert running.run_row().tokens_accepted == 0
    assert running.read(versions.highest_number) == 1
    running.train_round(0.5)
    assert np.isfinite(running.state(2).weights).all()
