"""Judging a round before it is merged, and what that means for tokens and workers.

A ruling is a function of the payloads of the round, the plan and the submissions that
were applied before; it is stored with each submission, and once more only to be seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from sqlalchemy import Connection

from bitnet_ext.codecs import Bytes, Codec, Vector, decode
from bitnet_ext.frames import FrameHeader, decode_frame, split_frame
from bitnet_ext.fused import norm_of
from bitnet_ext.layout import num_params, shape_from_json
from bitnet_ext.wire.verdicts import TaskKind
from coordinator.domain import guards, leases
from coordinator.domain.accounting import Fate
from coordinator.domain.guards import Candidate, Judgement, Ruling
from coordinator.domain.seams import Rng
from coordinator.service.bookkeeping import book_merge
from coordinator.service.seeding import task_id
from coordinator.service.stepping import Closing, num_cores
from coordinator.store import rounds, runs, tasks, workers
from coordinator.store.blobs import BlobKind, Blobs
from coordinator.store.rows import SubmissionRow

log = logging.getLogger(__name__)

#: Returns header and payload of a frame.
Parse = Callable[[Bytes], tuple[FrameHeader, memoryview]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A round after the guards have seen it."""

    #: What is left of the round to merge, with its factors.
    kept: Closing
    candidates: Sequence[Candidate]
    rulings: Sequence[Ruling]
    #: All submissions of the round, in the order of rulings.
    submissions: Sequence[SubmissionRow]


def judge_round(blobs: Blobs, closing: Closing) -> Judged:
    """Rule on every submission of a round; blocking, off the loop.

    Raises OSError, FrameError or PayloadError when a file does not help.
    """
    rows = closing.submissions

    def read(place: int, parse: Parse = split_frame) -> tuple[Codec, Bytes]:
        data = blobs.read(BlobKind.PAYLOAD, rows[place].payload_file or "")
        header, payload = parse(data)
        return header.codec, payload

    shape = shape_from_json(msgspec.json.decode(closing.run.model_json))
    scratch = np.empty(num_params(shape), dtype=np.float32)
    # Each is read up to three times: its checksum is looked at with the first.
    candidates = [
        _candidate(closing, row, read(place, decode_frame), scratch)
        for place, row in enumerate(rows)
    ]
    judgement = guards.judge(
        candidates,
        closing.recent_sizes,
        read,
        num_elements=len(scratch),
        threads=num_cores(),
    )
    return Judged(
        kept=_kept(closing, judgement),
        candidates=candidates,
        rulings=judgement.rulings,
        submissions=rows,
    )


def _kept(closing: Closing, judgement: Judgement) -> Closing:
    """Return what is left of a round to merge.

    The guards don't know of staleness: what they added up is merged only where none is
    stale. Then its weights are those of merging, to the bit.
    """
    rulings = judgement.rulings
    merged = [n for n, ruling in enumerate(rulings) if ruling.reason is None]
    submissions = [closing.submissions[n] for n in merged]
    return replace(
        closing,
        submissions=submissions,
        factors=[rulings[n].factor for n in merged],
        mean=None if any(map(closing.staleness, submissions)) else judgement.mean,
    )


def _candidate(
    closing: Closing, row: SubmissionRow, payload: tuple[Codec, Bytes], scratch: Vector
) -> Candidate:
    codec, data = payload
    numbers = decode(codec, data, len(scratch), out=scratch)
    norm = norm_of(numbers, threads=num_cores())
    size = guards.size_of(
        norm,
        closing.plan_behind(row),
        tokens_before=closing.tokens_before_made(row),
        tokens=row.tokens,
        num_steps=row.num_steps,
    )
    return Candidate(tokens=row.tokens, norm=norm, size=size)


def record(connection: Connection, judged: Judged, *, now: float, rng: Rng) -> None:
    """Store the rulings; what is left out goes back, and who sent it is looked at."""
    for row, candidate, ruling in zip(
        judged.submissions, judged.candidates, judged.rulings, strict=True
    ):
        rounds.rule(
            connection,
            row.submission_id,
            norm=candidate.norm,
            size=candidate.size,
            factor=ruling.factor,
            cosine=ruling.cosine,
        )
        if ruling.reason is not None:
            _leave_out(connection, row, candidate, ruling, now, rng)


def leave_all_out(
    connection: Connection,
    rows: Sequence[SubmissionRow],
    *,
    round_id: int,
    reason: str,
    now: float,
    rng: Rng,
) -> None:
    """Leave all that a round would have merged out; its tokens go back."""
    rounds.filter_submissions(connection, round_id, reason)
    book_merge(connection, rows, Fate.FILTERED)
    give_tokens_back(connection, rows, reason=reason, now=now, rng=rng)


def give_tokens_back(
    connection: Connection,
    rows: Iterable[SubmissionRow],
    *,
    reason: str,
    now: float,
    rng: Rng,
) -> None:
    """Make the stretches of submissions that are left out ranges again.

    The attempt is used up, whoever is to blame: after the last one the stretch is given
    up, as a failed task, or it would be trained for nothing for ever.
    """
    for row in rows:
        runs.add_accepted_tokens(
            connection, row.run_id, epoch=row.epoch, tokens=-row.tokens
        )
        task = tasks.find_task(connection, row.task_id)
        attempt = 0 if task is None else task.attempt
        if attempt < leases.MAX_ATTEMPTS:
            runs.add_range(
                connection,
                run_id=row.run_id,
                epoch=row.epoch,
                shard_id=row.shard_id,
                start_token=row.start_token,
                num_tokens=row.tokens,
                attempt=attempt,
            )
        else:
            _give_up(connection, row, attempt, reason, now, rng)


def _give_up(
    connection: Connection,
    row: SubmissionRow,
    attempt: int,
    reason: str,
    now: float,
    rng: Rng,
) -> None:
    fresh, why = task_id(rng), f"left out each time, last: {reason}"
    log.error(
        "a stretch is given up: %s",
        why,
        extra={"event": "task.failed", "task_id": fresh, "reason": why},
    )
    tasks.add_failed(
        connection,
        task_id=fresh,
        run_id=row.run_id,
        kind=TaskKind.TRAIN,
        epoch=row.epoch,
        shard_id=row.shard_id,
        start_token=row.start_token,
        num_tokens=row.tokens,
        fixed_size=False,
        attempt=attempt,
        reason=why,
        created_at=now,
        done_at=now,
    )


def _leave_out(
    connection: Connection,
    row: SubmissionRow,
    candidate: Candidate,
    ruling: Ruling,
    now: float,
    rng: Rng,
) -> None:
    reason = ruling.reason or ""
    rounds.filter_one(connection, row.submission_id, reason)
    book_merge(connection, [row], Fate.FILTERED)
    give_tokens_back(connection, [row], reason=reason, now=now, rng=rng)
    log.warning(
        "a submission of %s is left out: %s",
        row.worker_id,
        reason,
        extra={"event": "submission.filtered", "worker_id": row.worker_id},
    )
    workers.add_event(
        connection,
        at=now,
        kind="submission.filtered",
        body={
            "submission_id": row.submission_id,
            "worker_id": row.worker_id,
            "round_id": row.round_id,
            "reason": reason,
            "norm": candidate.norm,
            "cosine": ruling.cosine,
        },
    )
    _quarantine_if_due(connection, row.worker_id, reason, now)


def _quarantine_if_due(
    connection: Connection, worker_id: str, reason: str, now: float
) -> None:
    worker = workers.find_worker(connection, worker_id)
    if worker is None or worker.quarantined_at is not None:
        return
    left_out = rounds.left_out_of(
        connection, worker_id, since=worker.judged_from, newest=guards.NUM_JUDGED
    )
    if not guards.keeps_failing(left_out):
        return
    why = f"{sum(left_out)} of its last {len(left_out)} left out, the last one {reason}"
    workers.change_worker(
        connection, worker_id, quarantined_at=now, quarantine_reason=why
    )
    log.error(
        "worker %s is quarantined: %s",
        worker_id,
        why,
        extra={"event": "worker.quarantined", "worker_id": worker_id},
    )
    workers.add_event(
        connection,
        at=now,
        kind="worker.quarantined",
        body={"worker_id": worker_id, "reason": why},
    )
