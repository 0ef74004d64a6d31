"""The view of the fleet: everything that the page shows, read in one snapshot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version as package_version
from typing import Final

import msgspec
from sqlalchemy import Connection

from bitnet_ext.layout import num_params, shape_from_json
from bitnet_ext.wire.verdicts import TaskKind, TaskState, Verdict
from coordinator.domain.accounting import tally
from coordinator.domain.eta import MANY_ARRIVALS, NUM_ROUNDS, Closed, estimate, windows
from coordinator.domain.history import NUM_NEWEST, stride, thinned
from coordinator.domain.plan import Aggregation
from coordinator.domain.rollback import loss_alarm
from coordinator.domain.round_time import reason, usual
from coordinator.domain.verdicts import verdict
from coordinator.service.assessing import facts_of
from coordinator.service.bookkeeping import duration_alarm
from coordinator.service.closing import version_point
from coordinator.service.evaluating import evaluation_point
from coordinator.service.fleet import FINISHED, RUNNING, Known
from coordinator.service.lines import line_of, rollback_view, rollbacks_of
from coordinator.service.pacing import recently_measured
from coordinator.service.replanning import changes_ahead
from coordinator.service.roster import heartbeat_s, plan_of
from coordinator.service.seeding import budget_left, is_stalled
from coordinator.service.ternary_health import newest_health
from coordinator.service.training import training_view
from coordinator.service.view import (
    BooksView,
    EtaView,
    EvaluationPoint,
    FailedTaskView,
    FleetView,
    LaneView,
    RoundView,
    RunView,
    ServerView,
    TallyView,
    TasksView,
    VersionPoint,
    WorkerView,
)
from coordinator.store import rounds, runs, tallies, tasks, versions, workers
from coordinator.store.rows import ClaimRow, RunRow, TaskRow, WorkerRow

#: Closed rounds that the speed of the fleet is the mean of.
SPEED_ROUNDS: Final = 5
#: Failed tasks that are named.
NUM_FAILED: Final = 5

_NO_CORPUS: Final = "There is no corpus yet.\nbitnet-coordinator tokenize-corpus"
_NO_TASKS: Final = "There is nothing to train yet.\nbitnet-coordinator seed-real-tasks"
_ALL_FAILED: Final = (
    "No task of epoch {epoch} was accepted, so no other epoch was begun. See why tasks "
    "failed, then add one.\nbitnet-coordinator seed-real-tasks"
)


def look(
    connection: Connection,
    fleet: Known,
    *,
    now: float,
    loop_lag_ms: float,
    insecure_http: bool,
    history: bool,
) -> FleetView:
    """Return the view at `now`; without `history` no point but the newest score."""
    run = runs.newest_run(connection)
    server = ServerView(loop_lag_ms=round(loop_lag_ms, 1))
    if run is None:
        return FleetView(
            package_version=package_version("bitnet-fleet"),
            insecure_http=insecure_http,
            missing=_no_run(fleet),
            run=None,
            training=None,
            round=None,
            tasks=None,
            workers=[],
            ternary=None,
            server=server,
            versions=[],
            evaluations=[],
        )
    held = {task.lease_worker_id or "": task for task in tasks.all_leased(connection)}
    lanes = _claims(connection, run, held)
    seen = _workers(connection, fleet, run, lanes, held, now)
    return FleetView(
        package_version=package_version("bitnet-fleet"),
        insecure_http=insecure_http,
        missing=_missing(connection, fleet, run),
        run=_run(connection, fleet, run, now),
        training=training_view(connection, run),
        round=_round(connection, run, lanes, held),
        tasks=_tasks(connection, run, seen, held),
        workers=seen,
        ternary=next(iter(newest_health(connection, run.run_id, 1)), None),
        server=server,
        versions=_versions(connection, run) if history else [],
        evaluations=_evaluations(connection, run, history=history),
    )


def _no_run(fleet: Known) -> str:
    """Return what keeps the first run from being made."""
    if fleet.corpus_fault is None:
        return _NO_CORPUS
    return f"The corpus can't be used, and is tried again: {fleet.corpus_fault}"


def _missing(connection: Connection, fleet: Known, run: RunRow) -> str | None:
    """Return what an operator has to do before training can begin, or go on."""
    if fleet.file_faults:
        reasons = "; ".join(fault.reason for fault in fleet.file_faults.values())
        return f"No work is given out until a file is whole again: {reasons}"
    if fleet.disk_fault is not None:
        return f"No work is given out until there is room: {fleet.disk_fault}"
    if run.epoch == 0:
        return _NO_TASKS
    if run.state == RUNNING and is_stalled(connection, run):
        return _ALL_FAILED.format(epoch=run.epoch)
    return None


def _run(connection: Connection, fleet: Known, run: RunRow, now: float) -> RunView:
    manifest = fleet.manifest
    newest = versions.newest_version(connection, run.run_id)
    closed = _closed(connection, run)
    why_over = _why_over(fleet, run)
    moving = [] if why_over else [one.rate for one in closed[-SPEED_ROUNDS:]]
    return RunView(
        run_id=run.run_id,
        state=run.state,
        preset=run.preset,
        num_params=num_params(shape_from_json(msgspec.json.decode(run.model_json))),
        started_at=run.created_at,
        stop_at=run.stop_at,
        token_budget=run.token_budget,
        tokens_accepted=run.tokens_accepted,
        epoch=run.epoch,
        epoch_tokens=None
        if manifest is None
        else sum(shard.num_tokens for shard in manifest.train_shards()),
        epoch_tokens_accepted=run.epoch_tokens_accepted,
        newest_version=newest.version,
        newest_version_at=newest.created_at,
        best_version=versions.best_version(connection, run.run_id),
        gzip_bits_per_byte=None if manifest is None else manifest.gzip_bits_per_byte(),
        tokens_per_s=sum(moving) / len(moving) if moving else None,
        eta=_no_eta(why_over)
        if why_over is not None
        else _eta(connection, run, closed, now),
        tally=_tally(tallies.tokens_of_run(connection, run.run_id)),
        loss_alarm=loss_alarm(
            line_of(connection, run.run_id), rollbacks_of(connection, run.run_id)
        ),
        rollback=rollback_view(connection, run),
        plan_changes=changes_ahead(run),
        reset_from_version=None if run.reset_acknowledged else run.reset_from_version,
    )


def _closed(connection: Connection, run: RunRow) -> list[Closed]:
    """Return the last rounds that became versions, oldest first.

    Where each submission makes a version: what came in each stretch of time.
    """
    plan = plan_of(run)
    if plan.aggregation is Aggregation.PER_ARRIVAL:
        points = versions.points_of(connection, run.run_id, newest=MANY_ARRIVALS)
        arrivals = [
            (point.created_at, point.tokens_total - (point.tokens_before or 0))
            for point in points
        ]
        (newest,) = rounds.newest_rounds(connection, run.run_id, 1)
        return windows(arrivals, newest.round_s)[-NUM_ROUNDS:]
    return [
        Closed(
            at=point.created_at,
            tokens=point.tokens_total - point.tokens_before,
            seconds=point.created_at - point.first_claim_at,
        )
        for point in versions.points_of(connection, run.run_id, newest=NUM_ROUNDS)
        if point.tokens_before is not None and point.first_claim_at is not None
    ]


def _why_over(fleet: Known, run: RunRow) -> str | None:
    """Return why nothing is trained any more; None: training may go on."""
    if run.state == FINISHED:
        return "The run is finished."
    return None if fleet.is_running else "No coordinator runs."


def _no_eta(reason: str) -> EtaView:
    return EtaView(at=None, earliest_at=None, latest_at=None, reason=reason)


def _eta(
    connection: Connection, run: RunRow, closed: list[Closed], now: float
) -> EtaView:
    live = rounds.live_round(connection, run.run_id)
    eta = estimate(
        now=now,
        tokens_left=budget_left(run),
        stop_at=run.stop_at,
        rounds=closed,
        round_s=0.0 if live is None else live.round_s,
    )
    return EtaView(
        at=eta.at,
        earliest_at=eta.earliest_at,
        latest_at=eta.latest_at,
        reason=eta.reason,
    )


def _tally(tokens: Mapping[str, int]) -> TallyView:
    found = tally(tokens)
    return TallyView(
        trained=found.trained,
        accepted=found.accepted,
        applied=found.applied,
        wasted=dict(found.wasted),
    )


def _claims(
    connection: Connection, run: RunRow, held: Mapping[str, TaskRow]
) -> list[ClaimRow]:
    """Return the claims of the live round, and of earlier ones those still out."""
    live = rounds.live_round(connection, run.run_id)
    if live is None:
        return []
    earlier = [
        task.lease_hash or ""
        for task in held.values()
        if task.round_id not in (None, live.round_id)
    ]
    return [
        *rounds.claims_of_leases(connection, earlier),
        *rounds.claims_of(connection, live.round_id),
    ]


def _round(
    connection: Connection,
    run: RunRow,
    claims: list[ClaimRow],
    held: dict[str, TaskRow],
) -> RoundView | None:
    live = rounds.live_round(connection, run.run_id)
    if live is None:
        return None
    plan, measured = plan_of(run), recently_measured(connection, run)
    known = usual(measured)
    return RoundView(
        round_id=live.round_id,
        base_version=live.base_version,
        state=live.state,
        opened_at=live.opened_at,
        first_claim_at=min((claim.claimed_at for claim in claims), default=None),
        round_s=live.round_s,
        round_reason=reason(plan, live.round_s, measured),
        overhead_s=None if known is None else known.overhead_s,
        lanes=[_lane(claim, held.get(claim.worker_id)) for claim in claims],
    )


def _lane(claim: ClaimRow, task: TaskRow | None) -> LaneView:
    done = claim.num_tokens if claim.outcome == "back" else 0
    if task is not None and task.task_id == claim.task_id:
        done = task.tokens_done
    return LaneView(
        worker_id=claim.worker_id,
        task_id=claim.task_id,
        num_tokens=claim.num_tokens,
        tokens_done=done,
        claimed_at=claim.claimed_at,
        predicted_s=claim.predicted_s,
        ended_at=claim.ended_at,
        outcome=claim.outcome,
    )


def _tasks(
    connection: Connection,
    run: RunRow,
    seen: Sequence[WorkerView],
    held: Mapping[str, TaskRow],
) -> TasksView:
    counts = tasks.count_not_done(connection, run.run_id)
    training = {key for key, task in held.items() if task.kind == TaskKind.TRAIN}
    words = [row.verdict for row in seen if row.worker_id in training]
    return TasksView(
        pending=counts[TaskState.PENDING],
        leased=counts[TaskState.LEASED],
        done=run.tasks_done,
        failed=counts[TaskState.FAILED],
        soft_expired=words.count(Verdict.SLOW),
        stuck=words.count(Verdict.STUCK) + words.count(Verdict.LOST),
        range_tokens=runs.range_tokens(connection, run.run_id),
        latest_failed=[
            FailedTaskView(
                task_id=task.task_id,
                kind=task.kind,
                attempt=task.attempt,
                reason=task.reason or "",
            )
            for task in tasks.latest_failed(connection, run.run_id, NUM_FAILED)
        ],
    )


def _workers(
    connection: Connection,
    fleet: Known,
    run: RunRow,
    claims: list[ClaimRow],
    held: dict[str, TaskRow],
    now: float,
) -> list[WorkerView]:
    tallied = tallies.tokens_by_worker(connection, run.run_id)
    back = {claim.worker_id for claim in claims if claim.outcome == "back"}
    return [
        _worker(
            worker,
            held.get(worker.worker_id),
            back_in_round=worker.worker_id in back,
            interval_s=heartbeat_s(fleet, worker),
            books=BooksView(
                spread=worker.spread,
                duration_ratio=worker.duration_ratio,
                duration_alarm=duration_alarm(connection, run.run_id, worker),
                tally=_tally(tallied.get(worker.worker_id, {})),
            ),
            now=now,
        )
        for worker in workers.all_workers(connection)
    ]


def _worker(
    worker: WorkerRow,
    task: TaskRow | None,
    *,
    back_in_round: bool,
    interval_s: float,
    books: BooksView,
    now: float,
) -> WorkerView:
    facts = facts_of(
        worker,
        task,
        back_in_round=back_in_round,
        interval_s=interval_s,
        now=now,
    )
    word, evidence = verdict(facts)
    return WorkerView(
        worker_id=worker.worker_id,
        name=worker.name,
        verdict=word,
        evidence=evidence,
        facts=facts,
        phase=worker.phase,
        draining=worker.draining,
        cpu_model=worker.cpu_model,
        isa=worker.isa,
        threads=worker.threads,
        heartbeat_at=worker.heartbeat_at,
        heartbeat_s=interval_s,
        task_id=None if task is None else task.task_id,
        tokens_done=None if task is None else task.tokens_done,
        num_tokens=None if task is None else task.num_tokens,
        claimed_at=None if task is None else task.claimed_at,
        predicted_s=None if task is None else task.predicted_s,
        tokens_per_s=worker.tokens_per_s,
        calibrated_tokens_per_s=worker.calibrated_tokens_per_s,
        tokens_accepted=worker.tokens_accepted,
        tasks_done=worker.tasks_done,
        tasks_failed=worker.tasks_failed,
        books=books,
    )


def _versions(connection: Connection, run: RunRow) -> list[VersionPoint]:
    """Return points for the charts: of a long run not all."""
    num = versions.count_versions(connection, run.run_id)
    newest = versions.newest_version(connection, run.run_id).version
    # A mark on the chart says from which version the run went back.
    backs = versions.rollbacks_of(connection, run.run_id)
    always = {run.root_version} | {
        v for row in backs for v in (row.version - 1, row.version)
    }
    rows = versions.some_points_of(
        connection,
        run.run_id,
        stride=stride(num),
        all_from=newest - NUM_NEWEST + 1,
        always=always,
    )
    return [version_point(row) for row in rows]


def _evaluations(
    connection: Connection, run: RunRow, *, history: bool
) -> list[EvaluationPoint]:
    """Return scores for the charts, the best among them; or the newest alone."""
    if history:
        every = versions.scores_of(connection, run.run_id)
        best = min(every, key=lambda row: row.nats / row.tokens, default=None)
        rows = thinned(every, keep=best)
    else:
        newest = versions.newest_score(connection, run.run_id)
        rows = [] if newest is None else [newest]
    return [evaluation_point(row, row.tokens_total) for row in rows]
