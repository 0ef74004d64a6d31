"""Workers: who they are, and the log lines that they send."""

from __future__ import annotations

from typing import Final

import msgspec
from sqlalchemy import Connection

from bitnet_ext.layout import UnknownPresetError, preset_shape
from bitnet_ext.wire import PROTOCOL_VERSION
from bitnet_ext.wire.messages import LogsRequest, RegisterAnswer, RegisterRequest
from bitnet_ext.wire.verdicts import ErrorCode, RoundKind, WorkerPhase
from coordinator.domain.errors import RefusedError
from coordinator.domain.plan import TrainingPlan
from coordinator.service.fleet import Fleet, Known, no_run
from coordinator.store import runs, versions, workers
from coordinator.store.rows import RunRow, WorkerRow

#: Workers known at most; who has been silent for `FORGET_AFTER_S` makes room.
MAX_WORKERS: Final = 1000
FORGET_AFTER_S: Final = 3600.0


async def register(fleet: Fleet, request: RegisterRequest) -> RegisterAnswer:
    """Take a worker in, or take it back; clears neither drain nor leases.

    Raises RefusedError: protocol_mismatch, unknown_preset, preset_mismatch,
    no_run, rate_limited (too many workers).
    """
    check_protocol(request.protocol_version)
    fleet.the_manifest()
    now = fleet.clock.now()
    answer = await fleet.store.write(
        lambda connection: _register(connection, fleet, request, now)
    )
    fleet.changed.ring()
    return answer


def check_protocol(version: int) -> None:
    """Raise RefusedError `protocol_mismatch` for another version than ours."""
    if version != PROTOCOL_VERSION:
        raise RefusedError(
            ErrorCode.PROTOCOL_MISMATCH,
            f"protocol_version must be {PROTOCOL_VERSION}, got {version}",
            field="protocol_version",
        )


def plan_of(run: RunRow) -> TrainingPlan:
    """Return the plan in force: that of the open round, and of all that is claimed."""
    return msgspec.json.decode(run.plan_json, type=TrainingPlan)


def plan_from(connection: Connection, run: RunRow, base_version: int) -> TrainingPlan:
    """Return the plan of the tasks that start from a version.

    It is that of the version which was made after it.
    """
    after = versions.version_after(connection, base_version)
    if after is None:
        return plan_of(run)
    return msgspec.json.decode(after.plan_json, type=TrainingPlan)


def seq_len_of(run: RunRow) -> int:
    """Return the tokens in a sequence of the model of a run."""
    return int(msgspec.json.decode(run.model_json)["seq_len"])


def known_worker(connection: Connection, worker_id: str) -> WorkerRow:
    """Return a registered worker. Raises RefusedError `unknown_worker`."""
    worker = workers.find_worker(connection, worker_id)
    if worker is None:
        raise RefusedError(
            ErrorCode.UNKNOWN_WORKER,
            f"worker_id must be registered first, got {worker_id!r}",
            field="worker_id",
        )
    return worker


def come_back(connection: Connection, worker_id: str, now: float) -> None:
    """Take a worker in again that an operator had put away."""
    workers.change_worker(connection, worker_id, gone_at=None)
    workers.add_event(
        connection, at=now, kind="worker.returned", body={"worker_id": worker_id}
    )


def heartbeat_s(fleet: Known, worker: WorkerRow) -> float:
    """Return the heartbeat interval of a worker: its own wish, or ours."""
    return worker.own_heartbeat_s or fleet.heartbeat_s


async def take_logs(fleet: Fleet, request: LogsRequest) -> None:
    """Keep a batch of log records. Raises RefusedError `unknown_worker`."""
    now = fleet.clock.now()
    records = [
        {
            "received_at": now,
            "at": record.at,
            "worker_id": request.worker_id,
            "level": record.level,
            "event": _plain(record.event),
            "message": _plain(record.message),
            "task_id": record.task_id,
        }
        for record in request.records
    ]

    def keep(connection: Connection) -> None:
        known_worker(connection, request.worker_id)
        workers.add_logs(connection, records)

    await fleet.store.write(keep)


def _plain(text: str) -> str:
    """Replace control characters: a log line must not forge or drive anything."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for char in text
    )


def _check_preset(request: RegisterRequest, run: RunRow) -> None:
    if request.preset is None or request.preset == run.preset:
        return
    try:
        preset_shape(request.preset)
    except UnknownPresetError as error:
        raise RefusedError(
            ErrorCode.UNKNOWN_PRESET, str(error), field="preset"
        ) from error
    raise RefusedError(
        ErrorCode.PRESET_MISMATCH,
        f"preset must be {run.preset!r}, which this coordinator trains, "
        f"got {request.preset!r}",
        field="preset",
    )


def _register(
    connection: Connection, fleet: Fleet, request: RegisterRequest, now: float
) -> RegisterAnswer:
    run = runs.newest_run(connection)
    if run is None:
        raise no_run()
    _check_preset(request, run)
    _keep(connection, request, now)
    plan = plan_of(run)
    makes_steps = plan.round_kind is RoundKind.DELTA
    return RegisterAnswer(
        protocol_version=PROTOCOL_VERSION,
        worker_id=request.worker_id,
        run_id=run.run_id,
        preset=run.preset,
        model=msgspec.json.decode(run.model_json),
        layout_hash=run.layout_hash,
        tokenizer_hash=run.tokenizer_hash,
        corpus_hash=run.corpus_hash,
        heartbeat_s=request.heartbeat_s or fleet.heartbeat_s,
        batch_size=plan.batch_size,
        optimiser=plan.local_optimiser if makes_steps else None,
    )


def _keep(connection: Connection, request: RegisterRequest, now: float) -> None:
    said = {
        "name": request.name,
        "cpu_model": request.cpu_model,
        "isa": request.isa,
        "threads": request.threads,
        "package_version": request.package_version,
        "own_heartbeat_s": request.heartbeat_s,
        "heartbeat_at": now,
        "phase": WorkerPhase.STARTING,
        "lease_lost_at": None,
    }
    if request.calibrated_tokens_per_s is not None:
        said["calibrated_tokens_per_s"] = request.calibrated_tokens_per_s
    known = workers.find_worker(connection, request.worker_id)
    if known is not None:
        workers.change_worker(connection, request.worker_id, **said)
        if known.gone_at is not None:
            come_back(connection, request.worker_id, now)
        return
    if workers.count_workers(connection) >= MAX_WORKERS:
        _make_room(connection, now)
    workers.add_worker(
        connection,
        worker_id=request.worker_id,
        registered_at=now,
        **said,
    )
    workers.add_event(
        connection,
        at=now,
        kind="worker.registered",
        body={"worker_id": request.worker_id},
    )


def _make_room(connection: Connection, now: float) -> None:
    """Forget a worker that is long lost: its id is known again once it comes back."""
    lost = workers.longest_silent(connection, before=now - FORGET_AFTER_S)
    if lost is None:
        raise RefusedError(
            ErrorCode.RATE_LIMITED,
            f"worker_id: at most {MAX_WORKERS} workers can register, and none of them "
            f"has been silent for {FORGET_AFTER_S:.0f} s",
            field="worker_id",
            retry_after_s=60.0,
        )
    workers.remove_worker(connection, lost)
    workers.add_event(
        connection, at=now, kind="worker.forgotten", body={"worker_id": lost}
    )
