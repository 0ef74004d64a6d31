"""A claim: one task for one worker, cut to its measured speed, in one transaction.

- a round takes claims until its first submission arrives, one from each worker; where
  each submission makes a version, nobody waits for a round
- work that came back goes first where it fits or has waited, then what is cut from the
  ranges of the epoch
- an evaluation goes to a worker that has nothing to train, or to anyone once it
  has waited for a whole round
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Final

import msgspec
from sqlalchemy import Connection

from bitnet_ext.wire.messages import ClaimRequest, Task
from bitnet_ext.wire.verdicts import ErrorCode, TaskKind
from coordinator.domain import leases, sizing
from coordinator.domain.errors import RefusedError
from coordinator.domain.manifest import Shard
from coordinator.domain.plan import Aggregation, TrainingPlan, hyper_parameters
from coordinator.service.bookkeeping import recent_work
from coordinator.service.fleet import RUNNING, Fleet
from coordinator.service.grace import awake
from coordinator.service.returning import expire_overdue, ring
from coordinator.service.roster import (
    check_protocol,
    heartbeat_s,
    known_worker,
    plan_of,
    seq_len_of,
)
from coordinator.service.seeding import budget_left, task_id
from coordinator.service.stretches import P, next_in_corpus
from coordinator.store import rounds, runs, tasks, versions, workers
from coordinator.store.rows import RoundRow, RunRow, TaskRow, WorkerRow

log = logging.getLogger(__name__)

#: Less than this before the end of the run is not worth a task.
MIN_TASK_S: Final = 1.0
#: So much of the work that came back is looked through for what suits a claimer.
MAX_WAITING: Final = 100
#: Below this the disk counts as full: versions, payloads and logs still have room.
MIN_FREE_BYTES: Final = 2**30


async def claim(fleet: Fleet, request: ClaimRequest) -> Task | None:
    """Return a task under a lease, or None when there is nothing to do now.

    The same `claim_id` gets the same lease as long as that lease lives. Raises
    RefusedError: protocol_mismatch, no_run, disk_low, unknown_worker.
    """
    check_protocol(request.protocol_version)
    fleet.the_manifest()
    if fleet.is_stopping:
        return None
    await _check_disk(fleet)
    now = await awake(fleet)

    def act(connection: Connection) -> tuple[int, Task | None]:
        num_ended = expire_overdue(connection, fleet, now)
        return num_ended, _Claim(connection, fleet, request, now).make()

    num_ended, task = await fleet.store.write(act)
    if num_ended:  # the next sweep finds nothing to wake anybody for
        ring(fleet)
    elif task is not None:
        fleet.changed.ring()
    return task


async def _check_disk(fleet: Fleet) -> None:
    """Give out no work whose result could not be stored."""
    free = await fleet.off_loop(fleet.blobs.free_bytes)
    fault = None
    if free < MIN_FREE_BYTES:
        fault = f"the data folder must have {MIN_FREE_BYTES} bytes free, has {free}"
    _note_disk(fleet, fault)
    if fault is not None:
        raise RefusedError(ErrorCode.DISK_LOW, fault, retry_after_s=30.0)


def _note_disk(fleet: Fleet, fault: str | None) -> None:
    """Let everybody see what a claim found; an event would need room itself."""
    before, fleet.disk_fault = fleet.disk_fault, fault
    if fault is not None and before is None:
        log.error("no work is given out: %s", fault, extra={"event": "disk.low"})
    elif fault is None and before is not None:
        log.info("there is room again", extra={"event": "disk.mended"})
    if fault != before:
        fleet.changed.ring()


class _Claim:
    """One claim while its transaction runs."""

    def __init__(
        self, connection: Connection, fleet: Fleet, request: ClaimRequest, now: float
    ) -> None:
        self._connection = connection
        self._fleet = fleet
        self._request = request
        self._now = now

    def make(self) -> Task | None:
        """Find a task, lease it, and return its terms."""
        worker = known_worker(self._connection, self._request.worker_id)
        repeated = tasks.leased_by_claim(self._connection, self._request.claim_id)
        if repeated is not None:
            return self._again(repeated)
        if self._fleet.file_faults:
            return None
        run = runs.newest_run(self._connection)
        if run is None or run.state != RUNNING or worker.draining:
            return None
        if worker.quarantined_at is not None or worker.gone_at is not None:
            return None
        # One lease a worker. Its old one may be of a process that died: it runs out.
        if tasks.leased_to(self._connection, worker.worker_id):
            return None
        return self._lease_next(run, worker)

    def _again(self, task: TaskRow) -> Task | None:
        """Return the terms of a lease whose answer was lost on its way."""
        if task.lease_worker_id != self._request.worker_id:
            return None
        terms = msgspec.json.decode(task.lease_terms_json or "", type=Task)
        return msgspec.structs.replace(
            terms,
            lease_id=self._lease_id(task.task_id, task.num_leases),
            lease_s=max(0.0, (task.expires_at or 0.0) - self._now),
        )

    def _lease_next(self, run: RunRow, worker: WorkerRow) -> Task | None:
        live = rounds.live_round(self._connection, run.run_id)
        if live is None:
            return None
        plan, evaluation = plan_of(run), self._next_pending(run, TaskKind.EVALUATE)
        if evaluation and self._now - evaluation.created_at > live.round_s:
            return self._lease(run, worker, evaluation, live)
        if run.roll_back_to is None and self._may_join(plan, live, worker):
            found = self._take_training(run, plan, live, worker)
            if found is not None:
                return self._lease(run, worker, found, live)
        if evaluation is not None:
            return self._lease(run, worker, evaluation, live)
        return None

    def _next_pending(
        self, run: RunRow, kind: TaskKind, round_id: int | None = None
    ) -> TaskRow | None:
        def find() -> TaskRow | None:
            return tasks.next_pending(
                self._connection,
                run_id=run.run_id,
                kind=kind,
                now=self._now,
                round_id=round_id,
            )

        return self._in_corpus(run, find)

    def _in_corpus(self, run: RunRow, find: Callable[[], P | None]) -> P | None:
        manifest = self._fleet.the_manifest()
        return next_in_corpus(self._connection, run, manifest, find, self._now)

    def _may_join(self, plan: TrainingPlan, live: RoundRow, worker: WorkerRow) -> bool:
        if live.state != "open" or live.first_submission_at is not None:
            return False
        if plan.aggregation is Aggregation.PER_ARRIVAL:
            return True
        return not rounds.has_claim(self._connection, live.round_id, worker.worker_id)

    def _take_training(
        self, run: RunRow, plan: TrainingPlan, live: RoundRow, worker: WorkerRow
    ) -> TaskRow | None:
        """Return a pending task for this worker, cut anew where need be."""
        size, most = self._size(run, plan, live, worker), self._allowed(run)
        if size is None or most == 0:
            return None
        given_back = self._in_corpus(run, lambda: self._given_back(plan, live, size))
        if given_back is None:
            fresh = self._cut(run, size, most)
            if fresh is not None:
                return fresh
            # Nobody idles beside work that would suit another better.
            given_back = self._next_pending(run, TaskKind.TRAIN, live.round_id)
        if given_back is None:
            return None
        head = sizing.divided(given_back.num_tokens, size, quorum=plan.quorum)
        return self._divide(given_back, min(head, most))

    def _given_back(
        self, plan: TrainingPlan, live: RoundRow, size: int
    ) -> TaskRow | None:
        """Return the pending task that suits a claimer of `size` tokens."""
        waiting = tasks.all_pending(
            self._connection,
            run_id=live.run_id,
            kind=TaskKind.TRAIN,
            now=self._now,
            round_id=live.round_id,
            limit=MAX_WAITING,
        )
        pieces = [_piece(task, live.round_id) for task in waiting]
        place = sizing.chosen(pieces, size, quorum=plan.quorum)
        return None if place is None else waiting[place]

    def _size(
        self, run: RunRow, plan: TrainingPlan, live: RoundRow, worker: WorkerRow
    ) -> int | None:
        """Return the tokens that suit this worker; None when time is up."""
        seconds = self._seconds_left(live)
        if run.stop_at is not None:
            seconds = min(seconds, run.stop_at - self._now)
            if seconds < MIN_TASK_S:
                return None
        seq_len = seq_len_of(run)
        recent = recent_work(self._connection, run.run_id, worker.worker_id)
        return sizing.task_tokens(
            worker.tokens_per_s,
            seconds=seconds,
            batch_tokens=plan.batch_size * seq_len,
            seq_len=seq_len,
            largest=max((one.tokens for one in recent), default=None),
        )

    def _seconds_left(self, live: RoundRow) -> float:
        started = self._now if live.first_claim_at is None else live.first_claim_at
        return sizing.seconds_left(live.round_s, round_age_s=self._now - started)

    def _allowed(self, run: RunRow) -> int:
        """Return the tokens that the budget still allows to give out.

        In whole sequences: a budget is passed by less than one of them.
        """
        left = budget_left(run)
        if left is None:
            return sys.maxsize
        left -= tasks.leased_tokens(self._connection, run.run_id)
        seq_len = seq_len_of(run)
        return max(0, -(-left // seq_len) * seq_len)

    def _divide(self, task: TaskRow, head: int) -> TaskRow:
        """Return given-back work; what is too much for claimer or budget is cut off."""
        if task.fixed_size or head == task.num_tokens:
            return task
        tasks.shorten_task(self._connection, task.task_id, head)
        runs.add_range(
            self._connection,
            run_id=task.run_id,
            epoch=task.epoch,
            shard_id=task.shard_id,
            start_token=task.start_token + head,
            num_tokens=task.num_tokens - head,
            attempt=task.attempt,
        )
        return msgspec.structs.replace(task, num_tokens=head)

    def _cut(self, run: RunRow, size: int, most: int) -> TaskRow | None:
        """Return a new pending task from the front of the next range."""
        piece = self._in_corpus(
            run, lambda: runs.next_range(self._connection, run.run_id)
        )
        if piece is None:
            return None
        taken = min(sizing.cut(piece.num_tokens, size), most)
        runs.shorten_range(self._connection, piece, taken)
        fresh = task_id(self._fleet.rng)
        tasks.add_task(
            self._connection,
            task_id=fresh,
            run_id=run.run_id,
            kind=TaskKind.TRAIN,
            epoch=piece.epoch,
            shard_id=piece.shard_id,
            start_token=piece.start_token,
            num_tokens=taken,
            attempt=piece.attempt,
            fixed_size=False,
            created_at=self._now,
        )
        return tasks.find_task(self._connection, fresh)

    def _lease(
        self, run: RunRow, worker: WorkerRow, task: TaskRow, live: RoundRow
    ) -> Task:
        """Give `task` to `worker`; in round `live`, or beside it (evaluation)."""
        ttl, plan = leases.ttl_s(heartbeat_s(self._fleet, worker)), plan_of(run)
        trains = task.kind == TaskKind.TRAIN
        base = live.base_version if trains else task.version
        predicted = self._predicted_s(worker, task)
        # The fleet's speed says nothing of a box that nobody has measured.
        own = None if worker.tokens_per_s is None else predicted
        hard_at = leases.first_hard_at(
            self._now,
            own,
            num_steps=-(-task.num_tokens // (plan.batch_size * seq_len_of(run))),
            round_s=live.round_s,
            fixed_size=task.fixed_size,
        )
        terms = self._terms(run, task, base or 0, ttl)
        if trains:
            stop_after_s = sizing.stop_after_s(
                meant_s=self._seconds_left(live),
                predicted_s=own,
                limit_s=hard_at - self._now,
                fixed_size=task.fixed_size,
            )
            terms = msgspec.structs.replace(terms, stop_after_s=stop_after_s)
        tasks.lease_task(
            self._connection,
            task.task_id,
            lease_hash=leases.lease_hash(terms.lease_id),
            lease_claim_id=self._request.claim_id,
            lease_worker_id=worker.worker_id,
            lease_terms_json=_without_lease_id(terms),
            base_version=terms.base_version,
            round_id=live.round_id if trains else None,
            claimed_at=self._now,
            progress_at=self._now,
            expires_at=self._now + ttl,
            hard_at=hard_at,
            predicted_s=predicted,
        )
        if trains:
            self._join(plan, live, worker, task, predicted, terms.lease_id)
        return terms

    def _join(
        self,
        plan: TrainingPlan,
        live: RoundRow,
        worker: WorkerRow,
        task: TaskRow,
        predicted_s: float | None,
        lease_id: str,
    ) -> None:
        # Where no round is waited for, nobody's task is cut to end with it.
        if live.first_claim_at is None and plan.aggregation is Aggregation.ROUNDS:
            rounds.change_round(
                self._connection, live.round_id, first_claim_at=self._now
            )
        rounds.add_claim(
            self._connection,
            round_id=live.round_id,
            worker_id=worker.worker_id,
            task_id=task.task_id,
            num_tokens=task.num_tokens,
            claimed_at=self._now,
            predicted_s=predicted_s,
            lease_hash=leases.lease_hash(lease_id),
        )

    def _predicted_s(self, worker: WorkerRow, task: TaskRow) -> float | None:
        """Return how long the task should take by measured speed; None before any.

        The speed of training serves for an evaluation too, which is faster.
        """
        return sizing.predicted_s(
            task.num_tokens,
            worker.tokens_per_s,
            fleet=workers.fleet_speed(self._connection),
        )

    def _lease_id(self, task_id: str, num_leases: int) -> str:
        return leases.lease_id(
            self._fleet.secret, task_id, num_leases, self._request.claim_id
        )

    def _terms(self, run: RunRow, task: TaskRow, version: int, ttl: float) -> Task:
        plan, seq_len = plan_of(run), seq_len_of(run)
        shard = _shard(self._fleet, task)
        base = versions.find_version(self._connection, version)
        if base is None:
            raise LookupError(f"version {version} of task {task.task_id} has no row")
        scores = task.kind == TaskKind.EVALUATE
        return Task(
            task_id=task.task_id,
            kind=TaskKind(task.kind),
            lease_id=self._lease_id(task.task_id, task.num_leases + 1),
            lease_s=ttl,
            run_id=run.run_id,
            base_version=version,
            base_sha256=base.published_sha256,
            shard_id=task.shard_id,
            shard_sha256=shard.sha256,
            byte_offset=4 * task.start_token,
            byte_length=4 * task.num_tokens,
            shard_bytes=shard.num_bytes,
            synthetic=shard.synthetic,
            eot_id=self._fleet.the_manifest().eot_id,
            num_steps=0
            if scores
            else sizing.num_steps(
                task.num_tokens, seq_len=seq_len, batch_size=plan.batch_size
            ),
            batch_size=plan.batch_size,
            seq_len=seq_len,
            block_size=0 if scores else sizing.BLOCK_SIZE,
            seed=sizing.order_seed(run.seed, epoch=task.epoch, shard_id=task.shard_id),
            round_kind=plan.round_kind,
            codec=plan.codec,
            # As the version was published, by the plan that it was made by.
            broadcast=msgspec.json.decode(base.plan_json, type=TrainingPlan).broadcast,
            hyper=hyper_parameters(
                plan, tokens_accepted=run.tokens_accepted, task_tokens=task.num_tokens
            ),
            text_bytes=shard.text_bytes if scores else 0,
        )


def _piece(task: TaskRow, round_id: int) -> sizing.GivenBack:
    """Return a pending task as a claimer sees it; one of a fixed size never waits."""
    came_back = None if task.fixed_size else task.returned_round_id
    return sizing.GivenBack(
        num_tokens=task.num_tokens,
        num_rounds=None if came_back is None else round_id - came_back,
    )


def _shard(fleet: Fleet, task: TaskRow) -> Shard:
    shard = fleet.the_manifest().shard(task.shard_id)
    if shard is None:
        raise LookupError(f"task {task.task_id} names no shard: {task.shard_id!r}")
    return shard


def _without_lease_id(terms: Task) -> str:
    """Return the terms as stored: the right to the task is kept as a hash only."""
    blank = msgspec.structs.replace(terms, lease_id="0" * 32)
    return msgspec.json.encode(blank).decode()
