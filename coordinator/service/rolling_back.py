"""Going back to an earlier version: decided at any time, made between two rounds.

Journey: a decision is one number in the row of the run. From then on no training is
given out; what is out comes back, and its round becomes a version as ever, so every
token stays trained once. Then one version more is made, which is the earlier one again:
what workers held of it and the whole optimiser state, under a new number. Blobs first,
then one transaction. A crash before that leaves the decision, and the next start makes
the same bytes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import msgspec
from sqlalchemy import Connection

from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError
from coordinator.service.exporting import Pick, choose
from coordinator.service.fleet import Fleet
from coordinator.service.lines import decide, describe
from coordinator.service.pacing import open_next
from coordinator.service.seeding import add_evaluation
from coordinator.service.steering import check_running, the_run
from coordinator.service.version_blobs import (
    Published,
    VersionBlobs,
    fault_of,
    read_published,
    read_state,
    write_version,
)
from coordinator.store import rounds, runs, tasks, versions, workers
from coordinator.store.rows import RoundRow, RunRow, VersionRow

log = logging.getLogger(__name__)


async def ask_for_rollback(fleet: Fleet, wish: int | Pick) -> int:
    """Let the run go back to a version as soon as its round is closed; return which.

    Raises RefusedError: no_run, unknown_version for one that is not kept or not whole,
    bad_request for a run that is finished and for a version that is no earlier one.
    """
    chosen = await fleet.store.read(lambda connection: choose(connection, wish))
    to = chosen.version
    fault = await fleet.off_loop(lambda: fault_of(fleet.blobs, to))
    if fault is not None:
        raise RefusedError(
            ErrorCode.UNKNOWN_VERSION,
            f"version must be one that is whole, got {to.version}: {fault}",
            field="version",
        )
    now = fleet.clock.now()

    def act(connection: Connection) -> None:
        run = the_run(connection)
        check_running(run)
        _check_earlier(connection, run, choose(connection, to.version).version)
        decide(connection, run, to.version, "asked for by an operator", now)

    await fleet.store.write(act)
    fleet.round_ready.ring()
    fleet.changed.ring()
    return to.version


def _check_earlier(connection: Connection, run: RunRow, to: VersionRow) -> None:
    newest = versions.newest_version(connection, run.run_id).version
    if to.run_id != run.run_id or to.version >= newest:
        raise RefusedError(
            ErrorCode.BAD_REQUEST,
            f"version must be one of run {run.run_id} before its newest, {newest}, "
            f"got {to.version}",
            field="version",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Due:
    """A rollback that can be made: the round is open, and nobody works in it."""

    run: RunRow
    live: RoundRow
    to: VersionRow
    version: int
    tokens_total: int


def _find(connection: Connection) -> _Due | None:
    run = runs.newest_run(connection)
    live = None if run is None else rounds.live_round(connection, run.run_id)
    if run is None or run.roll_back_to is None or live is None:
        return None
    # A lease may be of an earlier round, where each submission makes a version.
    if live.state != "open" or tasks.leased_tokens(connection, run.run_id):
        return None
    to = versions.find_version(connection, run.roll_back_to)
    newest = versions.find_version(connection, live.base_version)
    if to is None or newest is None:
        raise LookupError(f"version {run.roll_back_to} or {live.base_version}: no row")
    return _Due(
        run=run,
        live=live,
        to=to,
        version=versions.highest_number(connection) + 1,
        tokens_total=newest.tokens_total,
    )


async def make_rollback(fleet: Fleet) -> VersionRow | None:
    """Make the version that is an earlier one again, where that is due and possible.

    Returns its row. To be called where rounds are closed, by nobody else. Raises
    OSError when a file can't be written; the decision stays then.
    """
    due = await fleet.store.read(_find)
    if due is None or await _is_to_merge_first(fleet, due):
        return None
    fault = await fleet.off_loop(lambda: fault_of(fleet.blobs, due.to))
    if fault is not None:
        await _give_up(fleet, due, fault)
        return None
    blobs = await fleet.off_loop(lambda: _write_again(fleet, due))
    now = fleet.clock.now()
    made = await fleet.store.write(
        lambda connection: _commit(connection, fleet, due, blobs, now)
    )
    fleet.work.ring()
    fleet.changed.ring()
    return made


async def _is_to_merge_first(fleet: Fleet, due: _Due) -> bool:
    """Let the round be closed where it has what came late from rounds before."""

    def close(connection: Connection) -> bool:
        if _find(connection) != due:
            return True
        if not rounds.accepted_in_round(connection, due.live.round_id):
            return False
        rounds.change_round(connection, due.live.round_id, state="closing")
        return True

    is_to_merge = await fleet.store.write(close)
    if is_to_merge:
        fleet.round_ready.ring()
    return is_to_merge


def _write_again(fleet: Fleet, due: _Due) -> VersionBlobs:
    """Write the blobs of the earlier version under the new number. Blocking.

    Without a link: what workers hold now is of no use, so they download it whole.
    """
    held = read_published(fleet.blobs, due.to.version)
    return write_version(
        fleet.blobs,
        replace(read_state(fleet.blobs, due.to.version), version=due.version),
        bytes.fromhex(due.run.layout_hash),
        Published(version=due.version, weights=held),
    )


def _commit(
    connection: Connection, fleet: Fleet, due: _Due, blobs: VersionBlobs, now: float
) -> VersionRow | None:
    """Make the version; None where something has come between."""
    run_id, round_id = due.run.run_id, due.live.round_id
    if _find(connection) != due or rounds.accepted_in_round(connection, round_id):
        return None
    versions.add_version(
        connection,
        version=due.version,
        run_id=run_id,
        parent=due.live.base_version,
        round_id=None,
        created_at=now,
        tokens_total=due.tokens_total,
        num_submissions=0,
        train_loss=None,
        plan_json=due.run.plan_json,
        rolled_back_to=due.to.version,
        published_sha256=blobs.published.sha256,
        published_bytes=blobs.published.num_bytes,
        state_sha256=blobs.state.sha256,
        state_bytes=blobs.state.num_bytes,
    )
    runs.change_run(connection, run_id, roll_back_to=None)
    _open_next(connection, fleet, due, now)
    made = versions.newest_version(connection, run_id)
    about = describe(connection, due.run, due.to.version, made)
    body = msgspec.to_builtins(about)
    workers.add_event(connection, at=now, kind="rollback.made", body=body)
    log.warning(
        "version %d is version %d again",
        made.version,
        due.to.version,
        extra={"event": "rollback.made", "version": made.version},
    )
    return made


def _open_next(connection: Connection, fleet: Fleet, due: _Due, now: float) -> None:
    """Close the round that nobody has claimed in, and open one on the new version."""
    rounds.change_round(connection, due.live.round_id, state="closed", closed_at=now)
    open_next(connection, due.run, due.live, version=due.version, now=now)
    add_evaluation(
        connection,
        due.run,
        fleet.the_manifest(),
        version=due.version,
        now=now,
        rng=fleet.rng,
    )


async def _give_up(fleet: Fleet, due: _Due, fault: str) -> None:
    """Go on with the weights there are: those to go back to are damaged."""
    log.error(
        "the run can't go back to version %d, and goes on as it is: %s",
        due.to.version,
        fault,
        extra={"event": "rollback.refused", "version": due.to.version},
    )
    now, body = fleet.clock.now(), {"to_version": due.to.version, "reason": fault}

    def forget(connection: Connection) -> None:
        if _find(connection) != due:  # an operator has said another since
            return
        runs.change_run(connection, due.run.run_id, roll_back_to=None)
        versions.mark_damaged(connection, due.to.version)
        workers.add_event(connection, at=now, kind="rollback.refused", body=body)

    await fleet.store.write(forget)
    fleet.work.ring()
    fleet.changed.ring()
