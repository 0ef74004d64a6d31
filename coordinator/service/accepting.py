"""Accepting a submission: one transaction that checks, records and counts it.

At most one submission of a task is ever accepted. The answer is stored with it. Where
only a part of the task was trained, the task becomes that part, and the rest a range.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from sqlalchemy import Connection

from bitnet_ext.codecs import Codec
from bitnet_ext.wire.messages import SubmissionAnswer, SubmissionMeta
from bitnet_ext.wire.verdicts import ErrorCode, SubmissionState, TaskKind, TaskState
from coordinator.domain import sizing
from coordinator.domain.accounting import Fate
from coordinator.domain.errors import RefusedError
from coordinator.domain.plan import Aggregation
from coordinator.domain.throughput import waited_s
from coordinator.service.bookkeeping import book_end
from coordinator.service.fleet import Fleet, no_run
from coordinator.service.late import leased_task, round_closing
from coordinator.service.returning import is_held, lease_lost, settle_round
from coordinator.service.roster import plan_from, plan_of, seq_len_of
from coordinator.service.seeding import add_epoch_if_done
from coordinator.store import rounds, runs, tasks, workers
from coordinator.store.blobs import Kept
from coordinator.store.rows import RunRow, TaskRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A submission whose body is complete."""

    meta: SubmissionMeta
    #: None where it was known before its payload came.
    kept: Kept | None
    codec: Codec
    body_sha256: str
    #: When its body began to arrive.
    began_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A submission that was accepted, now or before."""

    answer: SubmissionAnswer
    #: False where the same submission was accepted before.
    is_new: bool = False
    #: Whether its round is to be closed.
    closes_round: bool = False
    #: Whether there is work now that was not there: the rest of a part, or an epoch.
    frees_work: bool = False


def acceptable(
    connection: Connection, meta: SubmissionMeta, now: float
) -> tuple[RunRow, TaskRow]:
    """Return run and task of a submission that may be accepted.

    Raises RefusedError: no_run, unknown_task, lease_lost, busy, stale_base,
    wrong_length, bad_request.
    """
    run = runs.newest_run(connection)
    if run is None:
        raise no_run()
    task = leased_task(connection, run, meta, now)
    if task.run_id != run.run_id or task.kind != TaskKind.TRAIN:
        raise lease_lost(meta.task_id)
    if task.lease_worker_id != meta.worker_id:
        raise RefusedError(
            ErrorCode.LEASE_LOST,
            f"worker_id must be the one that claimed task {task.task_id}, "
            f"got {meta.worker_id!r}",
            field="worker_id",
        )
    if task.base_version != meta.base_version:
        raise RefusedError(
            ErrorCode.STALE_BASE,
            f"base_version must be {task.base_version}, as leased, "
            f"got {meta.base_version}",
            field="base_version",
        )
    _check_trained(connection, run, task, meta)
    return run, task


def _check_trained(
    connection: Connection, run: RunRow, task: TaskRow, meta: SubmissionMeta
) -> None:
    seq_len = seq_len_of(run)
    batch_size = plan_from(connection, run, meta.base_version).batch_size
    batch_tokens = batch_size * seq_len
    if not sizing.is_part(meta.tokens, task.num_tokens, batch_tokens=batch_tokens):
        raise RefusedError(
            ErrorCode.WRONG_LENGTH,
            f"tokens must be {task.num_tokens}, the stretch of the task, or fewer in "
            f"whole steps of {batch_tokens}, got {meta.tokens}",
            field="tokens",
        )
    due = sizing.num_steps(meta.tokens, seq_len=seq_len, batch_size=batch_size)
    if meta.num_steps != due:
        raise RefusedError(
            ErrorCode.BAD_REQUEST,
            f"num_steps must be {due} for {meta.tokens} tokens, got {meta.num_steps}",
            field="num_steps",
        )


def accept(
    connection: Connection, fleet: Fleet, arrived: Arrived, now: float
) -> Accepted:
    """Accept a submission in this transaction, or answer as it was answered before."""
    meta = arrived.meta
    known = rounds.find_submission(connection, meta.submission_id)
    if known is not None:
        if known.body_sha256 != arrived.body_sha256:
            raise RefusedError(
                ErrorCode.SUBMISSION_CONFLICT,
                f"submission_id {meta.submission_id!r} was used for another body",
                field="submission_id",
            )
        answer = msgspec.json.decode(known.answer_json, type=SubmissionAnswer)
        return Accepted(answer=answer)
    run, task = acceptable(connection, meta, now)
    if plan_of(run).aggregation is Aggregation.PER_ARRIVAL:
        task = _in_live_round(connection, task)
    if arrived.kept is None or task.round_id is None or task.claimed_at is None:
        raise lease_lost(meta.task_id)
    answer = SubmissionAnswer(state=SubmissionState.ACCEPTED, round_id=task.round_id)
    _record(connection, arrived, arrived.kept, task, answer, now)
    trained = _shortened(connection, task, meta.tokens)
    _count(connection, run, trained, meta, now)
    closes, begins_epoch = _settle(connection, fleet, run, trained, now)
    return Accepted(
        answer=answer,
        is_new=True,
        closes_round=closes,
        frees_work=begins_epoch or trained.num_tokens < task.num_tokens,
    )


def _in_live_round(connection: Connection, task: TaskRow) -> TaskRow:
    """Return the task as part of the round that takes what arrives now.

    Raises RefusedError `busy` while that one is being closed. Not before the payload
    has come: by then it may be open again, and the bytes are sent in any case.
    """
    live = rounds.live_round(connection, task.run_id)
    if live is None:
        raise LookupError(f"run {task.run_id} has no live round")
    if live.state != "open":
        raise round_closing(live)
    return msgspec.structs.replace(task, round_id=live.round_id)


def _shortened(connection: Connection, task: TaskRow, tokens: int) -> TaskRow:
    """Return the task as far as it was trained; the rest becomes a range."""
    if tokens == task.num_tokens:
        return task
    tasks.shorten_task(connection, task.task_id, tokens)
    runs.add_range(
        connection,
        run_id=task.run_id,
        epoch=task.epoch,
        shard_id=task.shard_id,
        start_token=task.start_token + tokens,
        num_tokens=task.num_tokens - tokens,
        # What was not trained can't have been at fault in this attempt.
        attempt=max(0, task.attempt - 1),
    )
    return msgspec.structs.replace(task, num_tokens=tokens)


def _record(
    connection: Connection,
    arrived: Arrived,
    kept: Kept,
    task: TaskRow,
    answer: SubmissionAnswer,
    now: float,
) -> None:
    meta = arrived.meta
    rounds.add_submission(
        connection,
        submission_id=meta.submission_id,
        run_id=task.run_id,
        task_id=task.task_id,
        round_id=answer.round_id,
        worker_id=meta.worker_id,
        base_version=meta.base_version,
        epoch=task.epoch,
        shard_id=task.shard_id,
        start_token=task.start_token,
        tokens=meta.tokens,
        num_steps=meta.num_steps,
        loss_first=meta.loss_first,
        loss_last=meta.loss_last,
        loss_mean=meta.loss_mean,
        claimed_at=task.claimed_at,
        accepted_at=now,
        compute_s=meta.compute_s,
        download_s=meta.download_s,
        download_bytes=meta.download_bytes,
        upload_s=max(0.0, now - arrived.began_at),
        cpu_s=meta.cpu_s,
        codec=arrived.codec,
        payload_file=kept.name,
        payload_bytes=kept.num_bytes,
        body_sha256=arrived.body_sha256,
        answer_json=msgspec.json.encode(answer).decode(),
    )


def _count(
    connection: Connection, run: RunRow, task: TaskRow, meta: SubmissionMeta, now: float
) -> None:
    """Finish the task, and count it for run, worker and round."""
    live = rounds.find_round(connection, task.round_id or 0)
    if task.state == TaskState.PENDING:
        tasks.finish_late(connection, task.task_id, now)
    else:
        tasks.finish_task(connection, task.task_id, now)
    runs.add_accepted_tokens(
        connection, run.run_id, epoch=task.epoch, tokens=meta.tokens, tasks=1
    )
    workers.count_task(connection, meta.worker_id, tokens=meta.tokens)
    # From claim to acceptance, by our own clock: what a round really waits for.
    done = msgspec.structs.replace(
        task,
        tokens_done=meta.tokens,
        progress_at=now,
        paused_s=waited_s(
            elapsed_s=now - (task.claimed_at or now),
            paused_s=task.paused_s,
            compute_s=meta.compute_s,
        ),
    )
    book_end(connection, done, outcome="back", fate=Fate.ACCEPTED, now=now)
    staleness = live.base_version - meta.base_version
    workers.add_event(
        connection,
        at=now,
        kind="submission.accepted",
        body={
            "task_id": task.task_id,
            "worker_id": meta.worker_id,
            "round_id": live.round_id,
            "late": not is_held(task, meta.lease_id, now),
            "staleness": staleness,
        },
    )


def _settle(
    connection: Connection, fleet: Fleet, run: RunRow, task: TaskRow, now: float
) -> tuple[bool, bool]:
    """Tell the round, or the epoch, that this task is done.

    Return whether the round is to be closed, and whether an epoch has begun.
    """
    live = rounds.find_round(connection, task.round_id or 0)
    if plan_of(run).aggregation is Aggregation.PER_ARRIVAL:
        rounds.note_first_submission(connection, live.round_id, now)
        rounds.change_round(connection, live.round_id, state="closing")
        return True, False
    if live.base_version == task.base_version:
        rounds.note_first_submission(connection, live.round_id, now)
        return settle_round(connection, live.round_id), False
    # What is stale only goes along: it neither ends the claims of a round nor closes
    # it, or those that it is open for would find nothing to do. So where it was the
    # last of its epoch, no version that closes the round would begin the next one.
    newest = runs.newest_run(connection)
    begins_epoch = newest is not None and add_epoch_if_done(
        connection, newest, fleet.the_manifest(), now
    )
    return False, begins_epoch
