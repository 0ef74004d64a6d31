"""Before the first request: what is on disk must agree with the database.

Orphans of a crash are removed; a damaged newest version stops the start. A run is
made when there is a corpus and no run, and replaced by a fresh one (hard reset) only
when a preset is named that its weights do not fit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection

from bitnet_ext.layout import (
    ModelShape,
    layout_hash,
    num_params,
    preset_shape,
    shape_to_json,
)
from coordinator.domain.errors import EXIT_DAMAGED, StartError
from coordinator.domain.initial import initial_weights
from coordinator.domain.manifest import MANIFEST_NAME, Manifest, load_manifest
from coordinator.domain.plan import (
    TOKENS_PER_PARAMETER,
    PlanError,
    TrainingPlan,
    scheduled,
)
from coordinator.domain.round_time import first_round_s
from coordinator.domain.stages import constant_reason
from coordinator.service.bookkeeping import book_reset
from coordinator.service.corpus import tokenized_folder
from coordinator.service.fleet import FINISHED, RUNNING, Fleet
from coordinator.service.roster import plan_of
from coordinator.service.seeding import add_evaluation
from coordinator.service.version_blobs import (
    VersionBlobs,
    fault_of,
    first_state,
    write_version,
)
from coordinator.store import rounds, runs, tasks, versions, workers
from coordinator.store.blobs import BlobKind, version_blob
from coordinator.store.rows import RunRow

log = logging.getLogger(__name__)

DEFAULT_PRESET: Final = "small"

#: Returns the first weights of a run: float32 (n,) in layout order.
Initial = Callable[[ModelShape, int], NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What a new run is made of, besides its corpus."""

    #: None: that of the run there is, `small` for the first.
    preset: str | None
    seed: int
    plan: TrainingPlan
    #: None: 20 tokens for each parameter. 0: no end by tokens.
    token_budget: int | None = None


def load_corpus(folder: Path) -> Manifest | None:
    """Read the manifest, where there is one. Raises ManifestError for a bad one."""
    path = tokenized_folder(folder) / MANIFEST_NAME
    return load_manifest(path) if path.exists() else None


def reconcile(fleet: Fleet) -> None:
    """Make disk and database agree. Blocking; raises StartError.

    What is damaged stops the start before anything is removed.
    """
    fleet.store.read_now(lambda connection: _check_newest(connection, fleet))
    removed = _remove_orphans(fleet)
    log.info(
        "recovered: %d orphans removed",
        removed,
        extra={"event": "coordinator.recovered"},
    )


def ensure_run(
    fleet: Fleet,
    manifest: Manifest | None,
    settings: RunSettings,
    initial: Initial = initial_weights,
) -> bool:
    """Make the run of a corpus where there is none, or where another model is named.

    Blocking. Returns whether one was made. Raises StartError when the corpus is not
    the one that the run was started with, and when the run no longer fits its own
    preset: a run is only ever replaced where the settings name a preset.
    """
    run = fleet.store.read_now(runs.newest_run)
    if run is not None:
        # First of all: a mistake in the name of a folder must not end a run.
        check_corpus(run, manifest, fleet.corpus)
    if manifest is None:
        return False
    preset = settings.preset or (DEFAULT_PRESET if run is None else run.preset)
    shape = preset_shape(preset, vocab_size=manifest.vocab_size)
    if run is not None and run.layout_hash == layout_hash(shape).hex():
        return False
    if run is not None and settings.preset is None:
        raise StartError(
            f"the weights of run {run.run_id} do not fit preset {preset} as it is in "
            f"this version of the program: go back to the version that made them, or "
            f"give the run up for a fresh one with BITNET_COORD_PRESET or --preset"
        )
    settings = replace(settings, preset=preset)
    _make_run(fleet, settings, manifest, shape, initial, replaces=run)
    return True


def check_corpus(run: RunRow, manifest: Manifest | None, folder: Path) -> None:
    """Raise StartError unless the corpus in `folder` is the one of a run."""
    if manifest is None:
        raise StartError(
            f"run {run.run_id} trains on a corpus that is not in {folder}: "
            f"put it back, or name its folder"
        )
    if run.corpus_hash != manifest.corpus_sha256:
        raise StartError(
            f"run {run.run_id} trains on corpus {run.corpus_hash[:12]}, but {folder} "
            f"holds {manifest.corpus_sha256[:12]}; put the first one back or name its "
            f"folder, or begin anew on this one with another data folder "
            f"(BITNET_COORD_DATA or --data)"
        )


def _make_run(
    fleet: Fleet,
    settings: RunSettings,
    manifest: Manifest,
    shape: ModelShape,
    initial: Initial,
    *,
    replaces: RunRow | None,
) -> None:
    """Write the root version of a new run, then its rows in one transaction."""
    version = fleet.store.read_now(versions.highest_number) + 1
    weights = initial(shape, settings.seed)
    root = first_state(version, weights, settings.plan.round_kind)
    blobs = write_version(fleet.blobs, root, layout_hash(shape))
    now = fleet.clock.now()
    columns = _run_columns(fleet, settings, manifest, shape)

    def add(connection: Connection) -> RunRow:
        if replaces is not None:
            _end_run(connection, replaces, now)
            columns["reset_from_version"] = version - 1
            columns["reset_acknowledged"] = False
        runs.add_run(connection, root_version=version, created_at=now, **columns)
        return _add_root(connection, fleet, manifest, blobs, now)

    run = fleet.store.write_now(add)
    log.info(
        "%s: its learning rate %s",
        "run made" if replaces is None else "hard reset, run replaced",
        told_schedule(run),
        extra={
            "event": "run.started" if replaces is None else "run.reset",
            "run_id": run.run_id,
            "version": version,
            "preset": settings.preset,
        },
    )


def _run_columns(
    fleet: Fleet, settings: RunSettings, manifest: Manifest, shape: ModelShape
) -> dict[str, object]:
    budget = settings.token_budget
    if budget is None:
        budget = TOKENS_PER_PARAMETER * num_params(shape)
    return {
        "run_id": f"r-{fleet.rng.token(4).hex()}",
        "state": RUNNING,
        "seed": settings.seed,
        "preset": settings.preset,
        "model_json": msgspec.json.encode(shape_to_json(shape)).decode(),
        "layout_hash": layout_hash(shape).hex(),
        "tokenizer_hash": manifest.tokenizer_sha256,
        "corpus_hash": manifest.corpus_sha256,
        "plan_json": msgspec.json.encode(_scheduled(settings.plan, budget)).decode(),
        "token_budget": budget or None,
    }


def _scheduled(plan: TrainingPlan, budget: int) -> TrainingPlan:
    try:
        return scheduled(plan, budget)
    except PlanError as error:
        raise StartError(f"BITNET_COORD_SCHEDULE_TOKENS: {error}") from None


def told_schedule(run: RunRow) -> str:
    """Return what becomes of the learning rate of a new run, and why if it stays."""
    plan = plan_of(run)
    reason = constant_reason(plan, run.token_budget)
    if reason is None:
        return f"falls to zero at {plan.schedule_tokens} accepted tokens"
    return f"stays at its peak after the warm-up. {reason}"


def _add_root(
    connection: Connection,
    fleet: Fleet,
    manifest: Manifest,
    blobs: VersionBlobs,
    now: float,
) -> RunRow:
    run = runs.newest_run(connection)
    if run is None:
        raise LookupError("the run that was just made has no row")
    versions.add_version(
        connection,
        version=run.root_version,
        run_id=run.run_id,
        parent=None,
        round_id=None,
        created_at=now,
        tokens_total=0,
        num_submissions=0,
        train_loss=None,
        plan_json=run.plan_json,
        published_sha256=blobs.published.sha256,
        published_bytes=blobs.published.num_bytes,
        state_sha256=blobs.state.sha256,
        state_bytes=blobs.state.num_bytes,
    )
    rounds.open_round(
        connection,
        run_id=run.run_id,
        base_version=run.root_version,
        round_s=first_round_s(plan_of(run)),
        now=now,
    )
    add_evaluation(
        connection, run, manifest, version=run.root_version, now=now, rng=fleet.rng
    )
    workers.add_event(
        connection, at=now, kind="run.started", body={"run_id": run.run_id}
    )
    return run


def _end_run(connection: Connection, run: RunRow, now: float) -> None:
    """Finish a run whose weights no longer fit; its blobs and rows stay."""
    book_reset(connection, run.run_id)
    tasks.cancel_unfinished(connection, run.run_id, reason="hard reset", now=now)
    rounds.filter_run(connection, run.run_id, "reset")
    rounds.close_rounds(connection, run.run_id, now)
    runs.drop_ranges(connection, run.run_id)
    nothing = {"next_plan_json": None, "next_token_budget": None}
    runs.change_run(connection, run.run_id, state=FINISHED, **nothing)
    workers.forget_speeds(connection)
    workers.add_event(connection, at=now, kind="run.reset", body={"run_id": run.run_id})


def _remove_orphans(fleet: Fleet) -> int:
    """Remove every file that no row names: the leftovers of a crash."""

    def named(connection: Connection) -> dict[BlobKind, set[str]]:
        kept = {version_blob(row.version) for row in versions.kept_versions(connection)}
        return {
            BlobKind.PUBLISHED: kept,
            BlobKind.STATE: kept,
            BlobKind.LINK: kept,
            BlobKind.PAYLOAD: rounds.payload_files(connection),
        }

    count = 0
    for kind, needed in fleet.store.read_now(named).items():
        orphans = [name for name in fleet.blobs.names(kind) if name not in needed]
        if orphans:
            fleet.blobs.remove(kind, orphans)
        count += len(orphans)
    return count


def _check_newest(connection: Connection, fleet: Fleet) -> None:
    """Refuse to start on a damaged newest version: never begin anew by oneself."""
    run = runs.newest_run(connection)
    if run is None:
        return
    newest = versions.newest_version(connection, run.run_id)
    fault = fault_of(fleet.blobs, newest)
    if fault is None:
        return
    good = _newest_good(connection, fleet)
    raise StartError(
        f"version {newest.version} is damaged ({fault}). The newest version that is "
        f"whole: {'none' if good is None else good}. Restore the files of version "
        f"{newest.version} from a backup; nothing has been changed",
        exit_code=EXIT_DAMAGED,
    )


def _newest_good(connection: Connection, fleet: Fleet) -> int | None:
    kept = reversed(versions.kept_versions(connection))
    return next(
        (row.version for row in kept if fault_of(fleet.blobs, row) is None), None
    )
