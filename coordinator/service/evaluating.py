"""The score of one version on the held-out shard, accepted once."""

from __future__ import annotations

import hashlib
import logging
import math

import msgspec
from sqlalchemy import Connection

from bitnet_ext.wire.messages import EvaluationAnswer, EvaluationRequest
from bitnet_ext.wire.verdicts import ErrorCode, TaskKind
from coordinator.domain.errors import RefusedError
from coordinator.domain.manifest import Shard
from coordinator.domain.rollback import loss_alarm
from coordinator.service.fleet import Fleet
from coordinator.service.grace import awake
from coordinator.service.lines import (
    line_of,
    roll_back_if_due,
    rollbacks_of,
)
from coordinator.service.returning import held_task, lease_lost
from coordinator.service.view import EvaluationPoint
from coordinator.store import runs, tasks, versions, workers
from coordinator.store.rows import EvaluationRow, ScoreRow

log = logging.getLogger(__name__)


async def take_evaluation(
    fleet: Fleet, task_id: str, request: EvaluationRequest
) -> EvaluationAnswer:
    """Accept a score; the same submission always gets the same answer.

    Raises RefusedError: unknown_task, lease_lost, stale_base, wrong_length,
    submission_conflict.
    """
    now = await awake(fleet)
    shard = fleet.the_manifest().held_out_shard()
    answer, point = await fleet.store.write(
        lambda connection: _take(connection, fleet, shard, task_id, request, now)
    )
    if point is not None:
        fleet.publish("version.evaluated", point)
        fleet.round_ready.ring()  # the run may be about to go back
        fleet.changed.ring()
    return answer


def evaluation_point(
    row: EvaluationRow | ScoreRow, tokens_total: int
) -> EvaluationPoint:
    """Return what the page shows of a score, after training on so many tokens."""
    return EvaluationPoint(
        version=row.version,
        tokens_total=tokens_total,
        loss=row.nats / row.tokens,
        bits_per_byte=bits_per_byte(row),
    )


def bits_per_byte(row: EvaluationRow | ScoreRow) -> float:
    """Return the summed cross-entropy in bits for each UTF-8 byte of the text."""
    return row.nats / math.log(2.0) / row.bytes


def _take(
    connection: Connection,
    fleet: Fleet,
    shard: Shard,
    task_id: str,
    request: EvaluationRequest,
    now: float,
) -> tuple[EvaluationAnswer, EvaluationPoint | None]:
    body = msgspec.json.encode(request)
    body_sha256 = hashlib.sha256(body).hexdigest()
    known = versions.find_evaluation(connection, request.submission_id)
    if known is not None:
        if known.body_sha256 != body_sha256:
            raise RefusedError(
                ErrorCode.SUBMISSION_CONFLICT,
                f"submission_id {request.submission_id!r} was used for another score",
                field="submission_id",
            )
        return msgspec.json.decode(known.answer_json, type=EvaluationAnswer), None
    _check(connection, shard, task_id, request, now)
    answer = EvaluationAnswer(
        submission_id=request.submission_id, task_id=task_id, version=request.version
    )
    point = _record(connection, request, answer, body_sha256, now)
    run = runs.newest_run(connection)
    if run is not None:
        roll_back_if_due(connection, fleet, run, now)
    return answer, point


def _check(
    connection: Connection,
    shard: Shard,
    task_id: str,
    request: EvaluationRequest,
    now: float,
) -> None:
    task = held_task(connection, task_id, request.lease_id, now)
    if task.kind != TaskKind.EVALUATE:
        raise lease_lost(task_id)
    # Each document begins with an end of text, which is context and never scored.
    for code, field, due, got in (
        (ErrorCode.STALE_BASE, "version", task.version, request.version),
        (
            ErrorCode.WRONG_LENGTH,
            "tokens",
            shard.num_tokens - shard.num_documents,
            request.tokens,
        ),
        (ErrorCode.WRONG_LENGTH, "bytes", shard.text_bytes, request.bytes),
    ):
        if due != got:
            raise RefusedError(code, f"{field} must be {due}, got {got}", field=field)


def _record(
    connection: Connection,
    request: EvaluationRequest,
    answer: EvaluationAnswer,
    body_sha256: str,
    now: float,
) -> EvaluationPoint:
    task = tasks.find_task(connection, answer.task_id)
    version = versions.find_version(connection, request.version)
    if task is None or version is None:
        raise LookupError(f"task {answer.task_id} has no row, or its version")
    tasks.finish_task(connection, task.task_id, now)
    versions.add_evaluation(
        connection,
        submission_id=request.submission_id,
        task_id=task.task_id,
        run_id=task.run_id,
        version=request.version,
        worker_id=request.worker_id,
        nats=request.nats,
        tokens=request.tokens,
        bytes=request.bytes,
        compute_s=request.compute_s,
        created_at=now,
        body_sha256=body_sha256,
        answer_json=msgspec.json.encode(answer).decode(),
    )
    workers.add_event(
        connection,
        at=now,
        kind="version.evaluated",
        body={"version": request.version, "worker_id": request.worker_id},
    )
    row = versions.find_evaluation(connection, request.submission_id)
    if row is None:
        raise LookupError(f"evaluation {request.submission_id} has no row")
    _alarm_if_due(connection, row, now)
    return evaluation_point(row, version.tokens_total)


def _alarm_if_due(connection: Connection, row: EvaluationRow, now: float) -> None:
    """Record that held-out loss has risen, when this score is the one that says so."""
    rollbacks = rollbacks_of(connection, row.run_id)
    line = line_of(connection, row.run_id)
    without = {n: loss for n, loss in line.items() if n != row.version}
    reason = loss_alarm(line, rollbacks)
    if reason is None or loss_alarm(without, rollbacks) is not None:
        return
    log.error(reason, extra={"event": "loss.risen", "version": row.version})
    body = {"version": row.version, "reason": reason}
    workers.add_event(connection, at=now, kind="loss.risen", body=body)
