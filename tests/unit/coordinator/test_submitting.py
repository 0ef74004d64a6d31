"""A pseudo-gradient is accepted once, or refused with nothing changed."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from bitnet_ext.codecs import Codec
from bitnet_ext.frames import FrameHeader, FrameKind, encode_frame
from bitnet_ext.layout import layout_hash
from bitnet_ext.wire.messages import SubmissionMeta, Task
from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError
from coordinator.service.claiming import claim
from coordinator.service.starting import reconcile
from coordinator.service.submitting import MAX_META_BYTES, Intake
from coordinator.store import rounds
from coordinator.store.blobs import BlobKind
from tests.fakes import START, MadeToFailError
from tests.unit.coordinator.fleets import (
    NUM_PARAMS,
    SHAPE,
    World,
    body,
    claim_request,
    frame,
)

#: Durability calls of one upload before it is accepted; the last test names them.
NUM_CALLS = 6


def submission(world, submission_id):
    return world.read(lambda c: rounds.find_submission(c, submission_id))


def changed(meta: SubmissionMeta, **fields) -> SubmissionMeta:
    return msgspec.structs.replace(meta, **fields)


def raw_frame(
    task: Task,
    payload: bytes,
    *,
    kind: FrameKind = FrameKind.DELTA,
    version: int | None = None,
    layout: bytes = layout_hash(SHAPE),
) -> bytes:
    header = FrameHeader(
        kind=kind,
        codec=Codec.FP32,
        layout_hash=layout,
        version=task.base_version if version is None else version,
        num_elements=NUM_PARAMS,
    )
    return encode_frame(header, payload)


def numbers(*first: float) -> bytes:
    vector = np.zeros(NUM_PARAMS, dtype="<f4")
    vector[: len(first)] = first
    return vector.tobytes()


def block(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


def with_meta(**fields):
    return lambda task, meta: body(changed(meta, **fields), frame(task, 1.0))


def with_frame(make):
    return lambda task, meta: body(meta, make(task))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


OTHER_LAYOUT = layout_hash(dataclasses.replace(SHAPE, rope_theta=1.0))

#: What is sent instead, the code, and the field.
REFUSED: dict[str, tuple[Callable[[Task, SubmissionMeta], bytes], str, str]] = {
    "foreign lease": (with_meta(lease_id="0" * 32), "lease_lost", "lease_id"),
    "other worker": (with_meta(worker_id="w2"), "lease_lost", "worker_id"),
    "unknown task": (with_meta(task_id="t-x"), "unknown_task", "task_id"),
    "stale base": (
        lambda task, meta: body(
            changed(meta, base_version=2), raw_frame(task, numbers(), version=2)
        ),
        "stale_base",
        "base_version",
    ),
    "half a step": (with_meta(tokens=56, num_steps=4), "wrong_length", "tokens"),
    "too many tokens": (with_meta(tokens=80, num_steps=5), "wrong_length", "tokens"),
    "steps of other tokens": (with_meta(tokens=48), "bad_request", "num_steps"),
    "wrong steps": (with_meta(num_steps=5), "bad_request", "num_steps"),
    "loss below zero": (with_meta(loss_mean=-1.0), "bad_request", "loss_mean"),
    "frame of another base": (
        with_frame(lambda task: raw_frame(task, numbers(), version=2)),
        "stale_base",
        "base_version",
    ),
    "frame cut short": (
        with_frame(lambda task: frame(task, 1.0)[:-1]),
        "wrong_length",
        "frame",
    ),
    "frame too long": (
        with_frame(lambda task: frame(task, 1.0) + b"x"),
        "wrong_length",
        "frame",
    ),
    "no frame": (with_frame(lambda task: b""), "wrong_length", "frame"),
    "other layout": (
        with_frame(lambda task: raw_frame(task, numbers(), layout=OTHER_LAYOUT)),
        "layout_mismatch",
        "frame",
    ),
    "gradient in a delta round": (
        with_frame(lambda task: raw_frame(task, numbers(), kind=FrameKind.GRADIENT)),
        "bad_frame",
        "frame",
    ),
    "weights": (
        with_frame(lambda task: raw_frame(task, numbers(), kind=FrameKind.WEIGHTS)),
        "bad_frame",
        "frame",
    ),
    "not a number": (
        with_frame(lambda task: raw_frame(task, numbers(0.0, float("nan")))),
        "non_finite",
        "gradient",
    ),
    "infinity": (
        with_frame(lambda task: raw_frame(task, numbers(float("-inf")))),
        "non_finite",
        "gradient",
    ),
    "damaged payload": (
        with_frame(lambda task: flipped(frame(task, 1.0), 100)),
        "bad_frame",
        "frame",
    ),
    "damaged checksum": (
        with_frame(lambda task: flipped(frame(task, 1.0), -1 + len(frame(task, 1.0)))),
        "bad_frame",
        "frame",
    ),
    "damaged magic": (
        with_frame(lambda task: flipped(frame(task, 1.0), 0)),
        "bad_frame",
        "frame",
    ),
    "other codec": (
        with_frame(lambda task: frame(task, 1.0, codec=Codec.INT8)),
        "wrong_length",
        "frame",
    ),
    "nothing": (lambda task, meta: b"", "wrong_length", "body"),
    "half a length": (lambda task, meta: b"\x05\x00", "wrong_length", "body"),
    "half a block": (lambda task, meta: b"\x05\x00\x00\x00{", "wrong_length", "body"),
    "empty block": (lambda task, meta: block(b"") + b"x", "bad_request", "body"),
    "endless block": (
        lambda task, meta: block(b" " * (MAX_META_BYTES + 1)),
        "bad_request",
        "body",
    ),
    "no JSON": (lambda task, meta: block(b"{nonsense}"), "bad_request", "body"),
    "unknown field": (
        lambda task, meta: block(
            msgspec.json.encode(msgspec.to_builtins(meta) | {"extra": 1})
        ),
        "bad_request",
        "extra",
    ),
    "missing field": (
        lambda task, meta: block(b'{"submission_id":"s"}'),
        "bad_request",
        "task_id",
    ),
    "id that is a path": (
        lambda task, meta: block(
            msgspec.json.encode(msgspec.to_builtins(meta) | {"submission_id": "../x"})
        ),
        "bad_request",
        "submission_id",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_submission_is_refused_and_nothing_changes(running: World, case):
    make, code, field = REFUSED[case]
    task = running.claimed()
    sent = make(task, running.meta(task))
    before = running.everything()

    with pytest.raises(RefusedError) as caught:
        running.send(sent)

    assert (caught.value.code, caught.value.field) == (code, field)
    assert running.everything() == before
    # The lease lives on: an honest try still counts.
    assert running.submit(task).state == "accepted"


def test_an_accepted_submission_is_durable_and_counted(running: World):
    task = running.claimed()
    running.clock.advance(10.0)
    meta, sent = running.meta(task), frame(task, 0.5)

    answer = running.send(body(meta, sent))

    row = submission(running, meta.submission_id)
    assert (answer.state, answer.round_id) == ("accepted", 1)
    assert (row.state, row.version, row.codec) == ("accepted", None, "fp32")
    assert (row.epoch, row.shard_id, row.start_token) == (1, "train-00000", 0)
    assert (row.tokens, row.num_steps, row.loss_mean) == (64, 4, 2.5)
    assert (row.claimed_at, row.accepted_at) == (START, START + 10.0)
    assert (row.payload_bytes, row.upload_s) == (len(sent), 0.0)
    assert running.fleet.blobs.read(BlobKind.PAYLOAD, row.payload_file) == sent
    assert running.task(task.task_id).state == "done"
    assert running.run_row().tokens_accepted == 64
    worker = running.worker("w1")
    assert (worker.tasks_done, worker.tokens_accepted) == (1, 64)
    assert worker.tokens_per_s == pytest.approx(6.4)
    assert running.live_round().first_submission_at == running.clock.now()


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_a_body_may_arrive_in_pieces_of_any_size(running: World, piece):
    task = running.claimed()
    meta, sent = (
        running.meta(task),
        frame(task, np.arange(NUM_PARAMS, dtype=np.float32)),
    )

    running.send(body(meta, sent), piece)

    row = submission(running, meta.submission_id)
    assert running.fleet.blobs.read(BlobKind.PAYLOAD, row.payload_file) == sent


def test_the_same_submission_gets_the_same_answer_and_counts_once(running: World):
    task = running.claimed()
    sent = body(running.meta(task), frame(task, 0.5))
    first = running.send(sent)
    before = running.everything()
    running.clock.advance(1000.0)

    again = running.send(sent)

    assert msgspec.json.encode(again) == msgspec.json.encode(first)
    assert running.everything() == before


def test_a_frame_that_grows_too_long_is_refused_before_its_end(running: World):
    task = running.claimed()
    sent = body(running.meta(task), frame(task, 0.5))

    async def story():
        intake = Intake(running.fleet)
        try:
            await intake.feed(sent)
            with pytest.raises(RefusedError) as caught:
                await intake.feed(b"x")
            return caught.value.code
        finally:
            await intake.close()

    assert running.do(story()) is ErrorCode.WRONG_LENGTH
    assert running.fleet.blobs.names(BlobKind.PAYLOAD) == []


def test_the_last_submission_of_a_round_wakes_who_closes_it_and_none_for_work(
    running: World,
):
    # It frees no work: of hundreds who wait each would ask in vain, each time.
    running.register("w2")
    sent = [
        body(running.meta(task, name), frame(task, 0.5))
        for name in ("w1", "w2")
        for task in [running.claimed(name)]
    ]

    assert running.woken_by(*sent) == [set(), {"round_ready"}]


def test_a_part_wakes_who_waits_for_work_as_the_rest_is_some(running: World):
    running.register("w2")
    running.claimed("w2")
    task = running.claimed()
    part = running.meta(task, num_steps=1, tokens=16)

    assert running.woken_by(body(part, frame(task, 0.5))) == [{"work"}]


def test_it_gets_the_same_answer_after_its_round_has_closed(running: World):
    task = running.claimed()
    sent = body(running.meta(task), frame(task, 0.5))
    first = running.send(sent)
    running.close_round()
    before = running.everything()

    assert running.send(sent) == first
    assert running.everything() == before


@pytest.mark.parametrize("tail", [b"", b"x" * 50])
def test_the_same_id_with_another_body_is_a_conflict(running: World, tail):
    task = running.claimed()
    meta = running.meta(task)
    running.send(body(meta, frame(task, 0.5)))
    before = running.everything()

    with pytest.raises(RefusedError) as caught:
        running.send(body(meta, frame(task, 0.25) + tail))

    assert caught.value.code is ErrorCode.SUBMISSION_CONFLICT
    assert caught.value.field == "submission_id"
    assert running.everything() == before


def test_a_task_takes_one_submission(running: World):
    task = running.claimed()
    running.submit(task)
    before = running.everything()

    with pytest.raises(RefusedError) as caught:
        running.submit(task)  # under a new id

    assert caught.value.code is ErrorCode.LEASE_LOST
    assert running.everything() == before


def released(world, task):
    world.release(task)


def claimed_anew(world, task):
    world.clock.advance(30.0)
    world.register("w2")
    assert world.claimed("w2").task_id == task.task_id


#: What was trained is booked all the same, under what the lease ended by.
BOOKS = ("claims", "tallies", "events", "workers")


def but_for_books(world):
    return {k: v for k, v in world.everything().items() if k not in BOOKS}


@pytest.mark.parametrize("happens", [released, claimed_anew])
def test_a_lease_that_ended_takes_nothing(running: World, happens):
    task = running.claimed()
    happens(running, task)
    before = but_for_books(running)

    with pytest.raises(RefusedError) as caught:
        running.submit(task)

    assert (caught.value.code, caught.value.field) == (ErrorCode.LEASE_LOST, "lease_id")
    assert but_for_books(running) == before


def test_the_lease_of_an_evaluation_takes_no_gradient(world: World):
    world.start_run(scored=True, seeded=False)
    world.register()
    task = world.claimed()
    meta = world.meta(task, num_steps=1)
    before = world.everything()

    with pytest.raises(RefusedError) as caught:
        world.send(body(meta, frame(task, 1.0)))

    assert caught.value.code is ErrorCode.LEASE_LOST
    assert world.everything() == before


def test_a_task_that_another_gets_during_the_upload_is_lost(running: World):
    task = running.claimed()
    sent = body(running.meta(task), frame(task, 0.5))

    async def slowly():
        intake = Intake(running.fleet)
        try:
            await intake.feed(sent[:-100])
            running.clock.advance(30.0)
            await claim(running.fleet, claim_request("w2", "c-9"))
            await intake.feed(sent[-100:])
            await intake.finish()
        finally:
            await intake.close()

    running.register("w2")
    with pytest.raises(RefusedError) as caught:
        running.do(slowly())

    assert caught.value.code is ErrorCode.LEASE_LOST
    assert running.task(task.task_id).lease_worker_id == "w2"
    assert not running.fleet.blobs.names(BlobKind.PAYLOAD)


def test_an_upload_that_breaks_off_leaves_nothing(running: World):
    task = running.claimed()
    sent = body(running.meta(task), frame(task, 0.5))
    before = running.everything()

    async def break_off():
        intake = Intake(running.fleet)
        await intake.feed(sent[:-100])
        assert running.fleet.blobs.names(BlobKind.PAYLOAD)
        await intake.close()

    running.do(break_off())

    assert running.everything() == before


def test_one_submission_sent_twice_at_a_time_counts_once(running: World):
    task = running.claimed()
    meta = running.meta(task)
    sent = body(meta, frame(task, 0.5))

    async def upload(both_began):
        intake = Intake(running.fleet)
        try:
            await intake.feed(sent)
            await both_began.wait()
            return await intake.finish()
        finally:
            await intake.close()

    async def together():
        barrier = asyncio.Barrier(2)
        return await asyncio.gather(upload(barrier), upload(barrier))

    first, second = running.do(together())

    row = submission(running, meta.submission_id)
    assert first == second
    assert running.fleet.blobs.names(BlobKind.PAYLOAD) == [row.payload_file]
    assert running.run_row().tokens_accepted == 64
    assert row.body_sha256 == hashlib.sha256(sent).hexdigest()


def test_two_bodies_for_one_task_at_a_time_and_one_wins(running: World):
    task = running.claimed()
    bodies = [body(running.meta(task), frame(task, v)) for v in (0.5, 0.25)]

    async def upload(sent, both_began):
        intake = Intake(running.fleet)
        try:
            await intake.feed(sent)
            await both_began.wait()
            return await intake.finish()
        finally:
            await intake.close()

    async def together():
        barrier = asyncio.Barrier(2)
        return await asyncio.gather(
            *(upload(sent, barrier) for sent in bodies), return_exceptions=True
        )

    outcomes = running.do(together())

    lost = [o for o in outcomes if isinstance(o, RefusedError)]
    assert [error.code for error in lost] == [ErrorCode.LEASE_LOST]
    assert len(running.fleet.blobs.names(BlobKind.PAYLOAD)) == 1
    assert running.run_row().tokens_accepted == 64


@pytest.mark.parametrize("ordinal", range(1, NUM_CALLS + 1))
def test_a_failing_disk_accepts_nothing_and_the_next_try_counts(
    running: World, ordinal
):
    task = running.claimed()
    sent = body(running.meta(task), frame(task, 0.5))
    before = running.everything()

    with running.fs.failing(ordinal), pytest.raises(MadeToFailError):
        running.send(sent)

    left = {k: v for k, v in running.everything().items() if k in before}
    assert left == before
    assert running.send(sent).state == "accepted"


@pytest.mark.parametrize("ordinal", range(1, NUM_CALLS + 1))
def test_a_crash_during_an_upload_leaves_nothing_after_the_next_start(
    running: World, ordinal
):
    task = running.claimed()
    sent = body(running.meta(task), frame(task, 0.5))
    before = running.everything()
    with running.fs.crashing(ordinal), pytest.raises(MadeToFailError):
        running.send(sent)

    reconcile(running.fleet)

    assert running.everything() == before
    assert running.send(sent).state == "accepted"
    reconcile(running.fleet)
    assert len(running.fleet.blobs.names(BlobKind.PAYLOAD)) == 1


def test_the_calls_above_are_all_there_are(running: World):
    task = running.claimed()
    before = len(running.fs.calls)

    running.submit(task)

    assert running.fs.calls[before:] == [
        "create",
        "write",
        "sync",
        "close",
        "rename",
        "sync_folder",
        "unlink",  # of the temporary name, long gone; after the answer
    ]


def test_an_upload_is_timed_from_its_first_bytes(running: World):
    task = running.claimed()
    meta = running.meta(task)
    sent = body(meta, frame(task, 0.5))

    async def slowly() -> None:
        intake = Intake(running.fleet)
        await intake.feed(sent[:100])
        running.clock.advance(7.0)
        await intake.feed(sent[100:])
        await intake.finish()
        await intake.close()

    running.do(slowly())

    assert submission(running, meta.submission_id).upload_s == 7.0
