"""Closing a round: from its accepted submissions to the next weight version.

Between two rounds the run may go back to an earlier version (`rolling_back`).

Journey: read the round and its submissions in their fixed order; judge them, average
what is left, take the step and encode the blobs, off the loop; make them durable; then
one transaction makes the version, marks the submissions applied, closes the round and
opens the next. A crash before that transaction leaves the round as it was: it is
closed again at the next start, with the same bytes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from sqlalchemy import Connection

from bitnet_ext.codecs import PayloadError
from bitnet_ext.frames import FrameError
from coordinator.domain import guards, leases
from coordinator.domain.accounting import Fate
from coordinator.service.bookkeeping import book_merge
from coordinator.service.broadcast import publication
from coordinator.service.fleet import Fleet
from coordinator.service.grace import awake
from coordinator.service.judging import Judged, judge_round, leave_all_out, record
from coordinator.service.laps import Laps
from coordinator.service.lines import rollbacks_of
from coordinator.service.pacing import measure_round, open_next
from coordinator.service.pruning import prune_versions
from coordinator.service.replanning import adopt_plan, adopt_where_idle
from coordinator.service.rolling_back import make_rollback
from coordinator.service.roster import plan_from, plan_of
from coordinator.service.seeding import add_epoch_if_done, add_evaluation
from coordinator.service.steering import the_run
from coordinator.service.stepping import Closing, next_state
from coordinator.service.version_blobs import (
    Published,
    ServerState,
    VersionBlobs,
    read_state,
    write_version,
)
from coordinator.service.view import VersionPoint
from coordinator.store import rounds, runs, tasks, versions, workers
from coordinator.store.rows import PointRow, RoundRow, RunRow

log = logging.getLogger(__name__)


class RoundCloser:
    """Closes rounds one after another; keeps the newest server state in memory."""

    def __init__(
        self, fleet: Fleet, pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._fleet = fleet
        self._pause = pause
        self._state: ServerState | None = None
        #: Memory for the next one: the state before.
        self._spare: ServerState | None = None
        #: What workers hold of the newest version, where a link led there.
        self._published: Published | None = None
        #: Why the round could not be closed, and how often in a row.
        self._fault: str | None = None
        self._num_faults = 0

    async def run(self) -> None:
        """Close whatever is ready, whenever the bell rings; never returns.

        A round whose files are gone, damaged or cannot be written is tried again
        after 2, 4, 8, ... and then every 60 seconds.
        """
        while True:
            try:
                while await self.close_one():
                    self._fault, self._num_faults = None, 0
            except (OSError, FrameError, PayloadError) as error:
                self._num_faults += 1
                await self._tell_fault(f"{type(error).__name__}: {error}")
                await self._pause(leases.backoff_s(self._num_faults, 1.0))
            else:
                await self._fleet.round_ready.wait(1.0)

    async def _tell_fault(self, fault: str) -> None:
        """Log why a round cannot be closed, once until that changes."""
        if fault == self._fault:
            return
        self._fault = fault
        log.error(
            "a round cannot be closed, it will be tried again: %s",
            fault,
            extra={"event": "round.stuck"},
        )
        now = self._fleet.clock.now()
        await self._fleet.store.write(
            lambda connection: workers.add_event(
                connection, at=now, kind="round.stuck", body={"reason": fault}
            )
        )

    async def close_one(self) -> bool:
        """Close the round that is ready, or go back a version; False: neither is due.

        Raises OSError, FrameError or PayloadError when one of its files does not
        help; the round stays as it is.
        """
        closing = await self._fleet.store.read(_find)
        if closing is None:
            return await self._roll_back()
        laps = Laps(self._fleet.clock)
        base = self._state
        if base is None or base.version != closing.live.base_version:
            base = await self._fleet.off_loop(
                lambda: read_state(self._fleet.blobs, closing.live.base_version)
            )
        judged = await self._fleet.off_loop(
            lambda: judge_round(self._fleet.blobs, closing)
        )
        laps.end("judge_s")
        stepped = await self._fleet.off_loop(
            lambda: next_state(self._fleet.blobs, judged.kept, base, self._spare)
        )
        laps.end("step_s")
        if stepped is None:
            await self._refuse_all(closing)
        else:
            await self._publish(judged, base, stepped, laps)
        self._fleet.work.ring()
        self._fleet.changed.ring()
        return True

    async def _roll_back(self) -> bool:
        made = await make_rollback(self._fleet)
        if made is None:
            return False
        self._fleet.publish("version.published", await self._fleet.store.read(_newest))
        await prune_versions(self._fleet)
        return True

    async def _publish(
        self, judged: Judged, base: ServerState, stepped: ServerState, laps: Laps
    ) -> None:
        fleet, closing = self._fleet, judged.kept
        layout = bytes.fromhex(closing.run.layout_hash)
        published = await fleet.off_loop(
            lambda: publication(
                fleet.blobs,
                stepped,
                base_version=base.version,
                known=self._published,
                broadcast=closing.plan.broadcast,
            )
        )
        blobs = await fleet.off_loop(
            lambda: write_version(fleet.blobs, stepped, layout, published)
        )
        laps.end("write_s")
        now = await awake(fleet)
        point = await fleet.store.write(
            lambda connection: _commit(connection, fleet, judged, blobs, now)
        )
        laps.end("commit_s")
        self._state, self._spare = stepped, base
        # Whole versions lie in the memory of a state, which is used again.
        self._published = published if published.link is not None else None
        log.info(
            "version %d published",
            point.version,
            extra={
                "event": "version.published",
                "version": point.version,
                "round_id": closing.live.round_id,
                "tokens": point.tokens_total,
                "loss": point.train_loss,
                **laps.seconds,
            },
        )
        fleet.publish("version.published", point)
        await prune_versions(fleet)

    async def _refuse_all(self, closing: Closing) -> None:
        """Leave a round out whose step is not finite; its tokens go back."""
        log.error(
            "the step of a round is not finite, its submissions are left out",
            extra={"event": "round.filtered", "round_id": closing.live.round_id},
        )
        now = self._fleet.clock.now()
        await self._fleet.store.write(
            lambda connection: _filter(connection, self._fleet, closing, now)
        )


def _find(connection: Connection) -> Closing | None:
    run = runs.newest_run(connection)
    live = None if run is None else rounds.live_round(connection, run.run_id)
    if run is None or live is None or live.state != "closing":
        return None
    base = versions.find_version(connection, live.base_version)
    submissions = rounds.accepted_in_round(connection, live.round_id)
    bases = {row.base_version for row in submissions}
    of_other_kind = versions.of_other_kind(
        connection, run.run_id, plan_of(run).round_kind
    )
    earlier = sorted(bases - {live.base_version})
    return Closing(
        run=run,
        live=live,
        submissions=submissions,
        earlier_plans={n: plan_from(connection, run, n) for n in earlier},
        version=versions.highest_number(connection) + 1,
        tokens_before=base.tokens_total if base else 0,
        tokens_behind=versions.tokens_behind(connection, bases),
        recent_sizes=rounds.recent_sizes(
            connection,
            run.run_id,
            after=max(of_other_kind, default=0),
            newest=guards.NUM_RECENT,
        ),
        of_other_kind=of_other_kind,
        rollbacks=rollbacks_of(connection, run.run_id),
    )


def version_point(row: PointRow) -> VersionPoint:
    """Return what the page shows of a version."""
    tokens_per_s = None
    if row.tokens_before is not None and row.first_claim_at is not None:
        seconds = max(row.created_at - row.first_claim_at, 1e-3)
        tokens_per_s = (row.tokens_total - row.tokens_before) / seconds
    return VersionPoint(
        version=row.version,
        at=row.created_at,
        tokens_total=row.tokens_total,
        num_submissions=row.num_submissions,
        train_loss=row.train_loss,
        tokens_per_s=tokens_per_s,
        rolled_back_to=row.rolled_back_to,
    )


def _commit(
    connection: Connection,
    fleet: Fleet,
    judged: Judged,
    blobs: VersionBlobs,
    now: float,
) -> VersionPoint:
    """Make the version. Raises LookupError when its round is no longer to close."""
    closing = judged.kept
    run = runs.newest_run(connection)
    live = None if run is None else rounds.live_round(connection, run.run_id)
    if run is None or live is None or live.round_id != closing.live.round_id:
        # Its blobs stay: the number may be that of another version by now, and what
        # no row names is removed at the next start.
        raise LookupError(f"round {closing.live.round_id} is not to be closed any more")
    loss = sum(row.loss_mean * row.tokens for row in closing.submissions)
    versions.add_version(
        connection,
        version=closing.version,
        run_id=run.run_id,
        parent=live.base_version,
        round_id=live.round_id,
        created_at=now,
        tokens_total=closing.tokens_before + closing.tokens,
        num_submissions=len(closing.submissions),
        train_loss=loss / closing.tokens,
        plan_json=run.plan_json,
        published_sha256=blobs.published.sha256,
        published_bytes=blobs.published.num_bytes,
        state_sha256=blobs.state.sha256,
        state_bytes=blobs.state.num_bytes,
    )
    record(connection, judged, now=now, rng=fleet.rng)
    rounds.apply_submissions(connection, live.round_id, closing.version)
    book_merge(connection, closing.submissions, Fate.APPLIED)
    _open_next(connection, fleet, run, live, closing.version, now)
    return _newest(connection)


def _newest(connection: Connection) -> VersionPoint:
    run = the_run(connection)
    return version_point(versions.points_of(connection, run.run_id, newest=1)[0])


def _open_next(
    connection: Connection,
    fleet: Fleet,
    run: RunRow,
    live: RoundRow,
    version: int,
    now: float,
) -> None:
    """Close the round, open the next, and make what the new version calls for.

    From here on all goes by the plan that was asked for, where one was.
    """
    manifest = fleet.the_manifest()
    measure_round(connection, fleet, run, live, now)
    rounds.change_round(
        connection, live.round_id, state="closed", closed_at=now, version=version
    )
    workers.add_event(
        connection,
        at=now,
        kind="version.published",
        body={"version": version, "round_id": live.round_id},
    )
    run = adopt_plan(connection, run, version=version, now=now)
    open_next(connection, run, live, version=version, now=now)
    if (version - run.root_version) % plan_of(run).evaluate_every == 0:
        add_evaluation(
            connection, run, manifest, version=version, now=now, rng=fleet.rng
        )
    add_epoch_if_done(connection, run, manifest, now)


def _filter(connection: Connection, fleet: Fleet, closing: Closing, now: float) -> None:
    """Leave every submission of the round out; the round starts over."""
    live, reason = closing.live, "not finite after the step"
    leave_all_out(
        connection,
        closing.submissions,
        round_id=live.round_id,
        reason=reason,
        now=now,
        rng=fleet.rng,
    )
    rounds.void_claims(connection, live.round_id)
    tasks.forgive_returns(connection, live.round_id)
    rounds.change_round(
        connection,
        live.round_id,
        state="open",
        first_claim_at=None,
        first_submission_at=None,
    )
    workers.add_event(
        connection,
        at=now,
        kind="round.filtered",
        body={"round_id": live.round_id, "reason": "not finite"},
    )
    adopt_where_idle(connection, fleet, now)
    run = runs.newest_run(connection)
    if run is not None:
        # Where the last stretches were given up, nothing else begins the next epoch.
        add_epoch_if_done(connection, run, fleet.the_manifest(), now)
