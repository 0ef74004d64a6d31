"""From the submissions of a round to the next version: once, and to the bit."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest
from sqlalchemy import select

from bitnet_ext.codecs import Codec, decode
from bitnet_ext.frames import FrameKind, decode_frame
from bitnet_ext.layout import layout_hash
from bitnet_ext.wire.verdicts import TaskKind
from coordinator.service.closing import RoundCloser
from coordinator.service.tending import requeue_failed
from coordinator.service.view import VersionPoint
from coordinator.store import rounds, runs, tasks, versions
from coordinator.store.blobs import BlobKind, version_blob
from coordinator.store.tables import events, ranges, submissions
from tests.fakes import START, MadeToFailError
from tests.unit.coordinator.fleets import (
    NUM_PARAMS,
    PLAN,
    SHAPE,
    World,
    body,
    frame,
    open_world,
)

#: Durability calls of a version: a blob of three parts, and the state, which has four.
NUM_CALLS = 9 + 10
RATE, DECAY = np.float32(PLAN.outer_rate), np.float32(PLAN.outer_momentum)


@pytest.fixture
def two(running: World) -> World:
    running.register("w2")
    return running


def noise(seed):
    return np.random.default_rng(seed).normal(size=NUM_PARAMS).astype(np.float32)


def stepped(state, mean):
    """Return weights and momentum after a step; plain float32, in order."""
    momentum = state.momentum * DECAY + mean
    return state.weights - (momentum * DECAY + mean) * RATE, momentum


def assert_is(state, weights, momentum):
    np.testing.assert_array_equal(state.weights, weights)
    np.testing.assert_array_equal(state.momentum, momentum)


def test_one_submission_is_taken_as_it_is(running: World):
    base, gradient = running.state(1), noise(1)
    running.submit(running.claimed(), value=gradient)

    assert running.close_round()

    assert_is(running.state(2), *stepped(base, gradient))


def test_the_mean_goes_by_tokens(two: World):
    two.set_speed("w2", 3.2)  # 192 tokens
    base, first, second = two.state(1), noise(1), noise(2)
    held = two.claimed("w1"), two.claimed("w2")
    two.submit(held[0], "w1", first)
    two.submit(held[1], "w2", second)

    two.close_round()

    mean = np.float32(64 / 256) * first + np.float32(192 / 256) * second
    assert_is(two.state(2), *stepped(base, mean))


def test_the_order_of_arrival_changes_no_bit(tmp_path: Path):
    found = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        folder = tmp_path / str(order)
        folder.mkdir()
        with open_world(folder) as world:
            world.start_run()
            for name in ("w1", "w2", "w3"):
                world.register(name)
            world.set_speed("w2", 3.0)
            held = [world.claimed(name) for name in ("w1", "w2", "w3")]
            for at in order:
                world.submit(held[at], f"w{at + 1}", noise(at))
            world.close_round()
            found.append(world.state(2).weights.tobytes())

    assert found[0] == found[1] == found[2]


def test_momentum_moves_once_a_round_however_many_submit(two: World):
    mean = np.full(NUM_PARAMS, 0.5, dtype=np.float32)
    for version in (1, 2):
        before = two.state(version)

        two.train_round(0.5, 0.5)

        assert_is(two.state(version + 1), *stepped(before, mean))
    assert two.state(3).momentum[0] == np.float32(0.5) * DECAY + np.float32(0.5)


def test_workers_get_the_master_weights(running: World):
    running.train_round(0.5)

    row = running.read(lambda c: versions.find_version(c, 2))
    content = running.fleet.blobs.read(BlobKind.PUBLISHED, version_blob(2))
    header, payload = decode_frame(content)
    assert (header.kind, header.codec, header.version) == (
        FrameKind.WEIGHTS,
        Codec.FP32,
        2,
    )
    assert header.layout_hash == layout_hash(SHAPE)
    np.testing.assert_array_equal(
        decode(header.codec, payload, NUM_PARAMS), running.state(2).weights
    )
    assert row.published_bytes == len(content)


def test_the_version_the_round_and_the_submissions_agree(two: World):
    first, second = two.claimed("w1"), two.claimed("w2")
    two.clock.advance(10.0)
    for task, name, loss in ((first, "w1", 2.0), (second, "w2", 4.0)):
        two.send(body(two.meta(task, name, loss_mean=loss), frame(task, 0.5)))

    two.close_round()

    row = two.read(lambda c: versions.find_version(c, 2))
    assert (row.parent, row.round_id, row.num_submissions) == (1, 1, 2)
    assert (row.tokens_total, row.train_loss) == (128, 3.0)
    applied = two.read(lambda c: list(c.execute(select(submissions))))
    assert {(s.state, s.version) for s in applied} == {("applied", 2)}
    live = two.live_round()
    assert (live.round_id, live.base_version, live.state) == (2, 2, "open")
    assert two.told[-1] == (
        "version.published",
        VersionPoint(
            version=2,
            at=START + 10.0,
            tokens_total=128,
            num_submissions=2,
            train_loss=3.0,
            tokens_per_s=12.8,
        ),
    )


def test_tokens_add_up_from_version_to_version(two: World):
    for _ in range(3):
        for name in ("w1", "w2"):
            two.set_speed(name, 1.0)
        two.train_round(0.5, 0.5)

    points = two.read(lambda c: versions.points_of(c, "r-1"))

    trained = two.run_row().tokens_accepted
    assert trained == 3 * 128
    assert points[-1].tokens_total == trained
    assert points[1].tokens_total == 128


def test_a_closer_that_missed_a_round_reads_what_that_round_made(running: World):
    other = RoundCloser(running.fleet)
    running.train_round(0.5)
    running.submit(running.claimed(), value=0.25)
    assert running.do(other.close_one())
    before = running.state(3)
    running.submit(running.claimed(), value=0.5)

    assert running.close_round()

    merged = np.full(NUM_PARAMS, 0.5, dtype=np.float32)
    assert_is(running.state(4), *stepped(before, merged))


def test_nothing_is_closed_before_it_is_ready(two: World):
    assert not two.close_round()
    first = two.claimed("w1")
    two.claimed("w2")
    two.submit(first, "w1")

    assert not two.close_round()

    assert two.blobs().keys() >= {"published/v0000000001.frame"}
    assert two.live_round().state == "open"


def test_a_round_is_closed_once(running: World):
    running.submit(running.claimed())

    assert running.close_round()
    before = running.everything()
    assert not running.close_round()
    assert running.everything() == before


@pytest.mark.parametrize("ordinal", range(1, NUM_CALLS + 1))
def test_after_a_crash_the_round_is_closed_again_with_the_same_bytes(
    running: World, ordinal
):
    gradient = noise(1)
    weights, momentum = stepped(running.state(1), gradient)
    running.submit(running.claimed(), value=gradient)

    running.close_over_a_crash(ordinal)

    assert_is(running.state(2), weights, momentum)
    assert len(running.blobs()) == 5


def test_those_calls_are_all_there_are(running: World):
    running.submit(running.claimed())
    before = len(running.fs.calls)

    running.close_round()

    assert len(running.fs.calls) - before == NUM_CALLS


def test_a_failing_disk_leaves_the_round_ready_to_close(running: World):
    running.submit(running.claimed())
    with running.fs.failing(5), pytest.raises(MadeToFailError):
        running.close_round()

    assert running.live_round().state == "closing"
    assert running.close_round()


class EndOfStoryError(Exception):
    """The closer has done all that a test wants to see."""


def payload_path(world: World) -> Path:
    (name,) = world.fleet.blobs.names(BlobKind.PAYLOAD)
    return world.fleet.blobs.path(BlobKind.PAYLOAD, name)


def stuck_events(world: World) -> list[str]:
    return world.read(
        lambda c: list(
            c.scalars(select(events.c.body_json).where(events.c.kind == "round.stuck"))
        )
    )


def test_a_round_whose_payload_is_gone_says_so_once_and_waits_longer_each_time(
    running: World, caplog
):
    running.submit(running.claimed())
    payload_path(running).unlink()
    waits: list[float] = []

    async def pause(seconds):
        waits.append(seconds)
        if len(waits) == 8:
            raise EndOfStoryError

    with pytest.raises(EndOfStoryError):
        running.do(RoundCloser(running.fleet, pause).run())

    assert waits == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    (line,) = [r for r in caplog.records if r.event == "round.stuck"]
    assert "payload" in line.message
    assert line.exc_info is None
    (told,) = stuck_events(running)
    assert "FileNotFoundError" in told
    assert running.live_round().state == "closing"


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_a_round_is_closed_once_its_payload_is_back(running: World, damage):
    running.submit(running.claimed())
    path = payload_path(running)
    whole = path.read_bytes()
    path.unlink()
    if damage == "damaged":
        path.write_bytes(whole[:-1])

    async def restore(_seconds):
        path.write_bytes(whole)

    async def story():
        closer = asyncio.create_task(RoundCloser(running.fleet, restore).run())
        async with asyncio.timeout(10.0):
            await running.fleet.work.wait()
        closer.cancel()

    running.do(story())

    assert running.live_round().base_version == 2
    assert len(stuck_events(running)) == 1


def test_another_fault_is_told_again_and_a_closed_round_starts_anew(running: World):
    running.submit(running.claimed())
    path = payload_path(running)
    whole = path.read_bytes()
    path.unlink()
    waits: list[float] = []

    async def pause(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            path.write_bytes(b"noise")
        if len(waits) == 4:
            raise EndOfStoryError

    with pytest.raises(EndOfStoryError):
        running.do(RoundCloser(running.fleet, pause).run())

    assert len(stuck_events(running)) == 2
    path.write_bytes(whole)
    assert running.close_round()


def test_a_round_that_is_closed_meanwhile_makes_no_second_version_and_removes_nothing(
    running: World,
):
    """A version's number may be taken by another: its blobs must be left alone."""
    running.submit(running.claimed())
    run_id = running.run_row().run_id

    before = running.blobs()
    write = running.fleet.blobs.write_frame

    def write_and_close(kind, name, parts):
        running.write(lambda c: rounds.close_rounds(c, run_id, running.clock.now()))
        return write(kind, name, parts)

    running.fleet.blobs.write_frame = write_and_close
    with pytest.raises(LookupError, match="not to be closed"):
        running.close_round()

    assert running.blobs().items() >= before.items()
    assert {version_blob(2)} <= set(running.fleet.blobs.names(BlobKind.STATE))


def test_a_step_that_is_not_finite_is_left_out_and_its_tokens_go_back(two: World):
    first, second = two.claimed("w1"), two.claimed("w2")
    before = two.read(lambda c: runs.range_tokens(c, "r-1"))
    two.submit(first, "w1", 3e38)
    two.submit(second, "w2", 3e38)
    round_id = two.live_round().round_id

    assert two.close_round()

    rows = two.read(lambda c: list(c.execute(select(submissions))))
    assert {(r.state, r.reason) for r in rows} == {
        ("filtered", "not finite after the step")
    }
    assert two.read(lambda c: runs.range_tokens(c, "r-1")) == before + 128
    assert two.run_row().tokens_accepted == 0
    assert two.read(versions.highest_number) == 1
    live = two.live_round()
    assert (live.round_id, live.state) == (round_id, "open")
    assert (live.first_claim_at, live.first_submission_at) == (None, None)
    assert not two.close_round()
    # Everybody may claim again, and the round can still make a version.
    two.train_round(0.5, 0.5)
    assert np.isfinite(two.state(2).weights).all()


def test_filtered_tokens_are_trained_once_in_the_end(running: World):
    running.set_speed("w1", 100.0)
    running.submit(running.claimed(), value=3e38)
    running.close_round()

    while running.run_row().epoch == 1:
        running.train_round(0.5)

    assert running.run_row().tokens_accepted == 1504
    assert running.epoch_tokens(1) == 1504


def left_out_at(world: World, is_bad) -> int:
    """Let w1 train the epoch; what is bad is not finite. Return how often it was."""
    count = 0
    for _ in range(40):
        if world.run_row().epoch == 2 or (task := world.claim()) is None:
            return count
        world.clock.advance(10.0)
        bad = is_bad(task)
        count += bad
        world.submit(task, value=3e38 if bad else 1e-3)
        assert world.close_round()
    raise AssertionError("it goes round for ever")


def test_a_stretch_that_is_left_out_each_time_is_given_up(running: World):
    running.set_speed("w1", 1000.0)

    count = left_out_at(running, lambda task: task.shard_id == "train-00001")

    assert count == 5
    (given_up,) = running.read(lambda c: tasks.latest_failed(c, "r-1", 9))
    assert (given_up.shard_id, given_up.start_token) == ("train-00001", 0)
    assert (given_up.num_tokens, given_up.attempt) == (504, 5)
    assert given_up.reason == "left out each time, last: not finite after the step"
    # The epoch went on without it, and the next one has all.
    assert running.run_row().tokens_accepted == 1000
    assert running.read(lambda c: runs.range_tokens(c, "r-1")) == 1504


def test_a_stretch_that_was_given_up_gets_another_try(running: World):
    running.set_speed("w1", 1000.0)
    left_out_at(running, lambda task: task.shard_id == "train-00001")

    assert running.do(requeue_failed(running.fleet, None)) == 1

    running.submit(task := running.claimed())
    assert (task.shard_id, task.byte_length) == ("train-00001", 4 * 504)
    assert running.close_round()
    assert running.run_row().tokens_accepted == 1504


def test_pieces_of_a_stretch_that_was_left_out_know_it(running: World):
    running.set_speed("w1", 1000.0)
    running.submit(running.claimed(), value=3e38)
    running.close_round()
    running.train_round(0.5)  # the other shard, which waited before it
    running.set_speed("w1", 1.0)
    piece = running.claimed()
    running.release(piece)
    running.set_speed("w1", 0.3)

    head = running.claimed()

    assert (head.shard_id, head.task_id) == ("train-00000", piece.task_id)
    assert head.byte_length < piece.byte_length
    assert running.task(head.task_id).attempt == 2
    left = running.read(lambda c: list(c.execute(select(ranges))))
    assert [row.attempt for row in left] == [1, 1]


def test_an_epoch_of_which_all_is_left_out_stops_and_says_so(running: World):
    running.set_speed("w1", 1000.0)

    assert left_out_at(running, lambda _task: True) == 10

    assert running.claim() is None
    assert running.run_row().epoch == 1
    kinds = [
        row.kind for row in running.read(lambda c: list(c.execute(select(events))))
    ]
    assert kinds[-1] == "epoch.failed"


def test_the_next_epoch_is_made_in_the_closing_transaction(two: World):
    for name in ("w1", "w2"):
        two.set_speed(name, 1000.0)

    two.train_round(0.5, 0.5)  # 1000 and 504 tokens: all there are

    assert two.run_row().epoch == 2
    assert two.read(lambda c: runs.range_tokens(c, "r-1")) == 1504


def test_an_epoch_ends_only_when_all_of_it_is_back(two: World):
    for name in ("w1", "w2"):
        two.set_speed(name, 1000.0)
    first, second = two.claimed("w1"), two.claimed("w2")
    two.submit(first, "w1")
    two.release(second, "w2")

    two.close_round()

    assert two.run_row().epoch == 1
    assert two.read(lambda c: runs.range_tokens(c, "r-1")) == 0


def test_no_epoch_begins_once_the_budget_is_used_up(two: World):
    two.change_run(token_budget=1504)
    for name in ("w1", "w2"):
        two.set_speed(name, 1000.0)

    two.train_round(0.5, 0.5)

    assert two.run_row().epoch == 1
    assert two.read(lambda c: runs.range_tokens(c, "r-1")) == 0


def test_a_task_that_was_given_up_does_not_hold_the_epoch_up(two: World):
    for name in ("w1", "w2"):
        two.set_speed(name, 1000.0)
    for _ in range(4):
        two.fail(two.claimed("w1"))
        two.clock.advance(60.0)
    given_up = two.claimed("w1")
    second = two.claimed("w2")
    two.submit(second, "w2")
    two.fail(given_up)

    two.close_round()

    assert two.task(given_up.task_id).state == "failed"
    assert two.run_row().epoch == 2


def test_every_nth_version_gets_an_evaluation(world: World):
    world.start_run(msgspec.structs.replace(PLAN, evaluate_every=2))
    world.register("w1")
    for _ in range(4):
        world.train_round(0.5)

    due = world.read(lambda c: tasks.evaluations_open(c, "r-1"))

    assert due == {3, 5}
    assert world.read(
        lambda c: tasks.count_unfinished(c, "r-1", TaskKind.EVALUATE)
    ) == len(due)


@pytest.mark.parametrize("codec", [Codec.INT8, Codec.TERNARY])
def test_coded_payloads_are_merged_as_they_decode(world: World, codec):
    world.start_run(msgspec.structs.replace(PLAN, codec=codec))
    world.register("w1")
    base, task = world.state(1), world.claimed()
    sent = frame(task, noise(3), codec=codec)
    world.send(body(world.meta(task), sent))

    world.close_round()

    header, payload = decode_frame(sent)
    decoded = decode(header.codec, payload, NUM_PARAMS)
    assert_is(world.state(2), *stepped(base, decoded))


def test_versions_keep_their_numbers_while_memory_is_used_again(running: World):
    states = [running.state(1)]
    for seed in range(4):
        gradient = noise(seed)
        due = stepped(states[-1], gradient)
        running.submit(running.claimed(), value=gradient)
        assert running.close_round()
        states.append(running.state(seed + 2))
        assert_is(states[-1], *due)
