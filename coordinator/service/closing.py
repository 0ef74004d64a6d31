"""Closing a round: from its accepted submissions to the next weight version.

Journey: read the round and its submissions in their fixed order; average, take the
outer step and encode the blobs, off the loop; make them durable; then one
transaction makes the version, marks the submissions applied, closes the round and
opens the next. A crash before that transaction leaves the round as it was: it is
closed again at the next start, with the same bytes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace

from sqlalchemy import Connection

from bitnet_ext.codecs import PayloadError
from bitnet_ext.frames import FrameError, decode_frame
from bitnet_ext.outer import Part
from coordinator.domain import leases
from coordinator.domain.outer_step import merge_weights, outer_step
from coordinator.domain.plan import TrainingPlan
from coordinator.service.broadcast import publication
from coordinator.service.fleet import Fleet
from coordinator.service.pruning import prune_versions
from coordinator.service.roster import plan_of
from coordinator.service.seeding import add_epoch_if_done, add_evaluation
from coordinator.service.version_blobs import (
    Published,
    ServerState,
    VersionBlobs,
    read_state,
    write_version,
)
from coordinator.service.view import VersionPoint
from coordinator.store import rounds, runs, tasks, versions, workers
from coordinator.store.blobs import BlobKind, Blobs
from coordinator.store.rows import PointRow, RoundRow, RunRow, SubmissionRow

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Closing:
    """A round on its way to a version."""

    run: RunRow
    live: RoundRow
    plan: TrainingPlan
    #: In the one order in which they are merged.
    submissions: list[SubmissionRow]
    #: Number of the version to make.
    version: int


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
        """Close the round that is ready; return False when none is.

        Raises OSError, FrameError or PayloadError when one of its files does not
        help; the round stays as it is.
        """
        closing = await self._fleet.store.read(_find)
        if closing is None:
            return False
        base = self._state
        if base is None or base.version != closing.live.base_version:
            base = await self._fleet.off_loop(
                lambda: read_state(self._fleet.blobs, closing.live.base_version)
            )
        stepped = await self._fleet.off_loop(
            lambda: _step(self._fleet.blobs, closing, base, self._spare)
        )
        if stepped is None:
            await self._refuse_all(closing)
        else:
            await self._publish(closing, base, stepped)
        self._fleet.work.ring()
        self._fleet.changed.ring()
        return True

    async def _publish(
        self, closing: _Closing, base: ServerState, stepped: ServerState
    ) -> None:
        fleet = self._fleet
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
        now = fleet.clock.now()
        point = await fleet.store.write(
            lambda connection: _commit(connection, fleet, closing, blobs, now)
        )
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
            },
        )
        fleet.publish("version.published", point)
        await prune_versions(fleet)

    async def _refuse_all(self, closing: _Closing) -> None:
        """Leave a round out whose outer step is not finite; its tokens go back."""
        log.error(
            "the outer step of a round is not finite, its submissions are left out",
            extra={"event": "round.filtered", "round_id": closing.live.round_id},
        )
        now = self._fleet.clock.now()
        await self._fleet.store.write(
            lambda connection: _filter(connection, closing, now)
        )


def _find(connection: Connection) -> _Closing | None:
    run = runs.newest_run(connection)
    live = None if run is None else rounds.live_round(connection, run.run_id)
    if run is None or live is None or live.state != "closing":
        return None
    return _Closing(
        run=run,
        live=live,
        plan=plan_of(run),
        submissions=rounds.accepted_in_round(connection, live.round_id),
        version=versions.highest_number(connection) + 1,
    )


def _step(
    blobs: Blobs, closing: _Closing, base: ServerState, spare: ServerState | None
) -> ServerState | None:
    """Return the next server state, in the memory of `spare` where that fits.

    None when it would not be finite.
    """
    if spare is None or spare.weights.shape != base.weights.shape:
        spare = ServerState.empty(len(base.weights))
    is_finite = outer_step(
        (base.weights, base.momentum),
        _parts(blobs, closing.submissions),
        (spare.weights, spare.momentum),
        rate=closing.plan.outer_rate,
        decay=closing.plan.outer_momentum,
    )
    return replace(spare, version=closing.version) if is_finite else None


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
    )


def _parts(blobs: Blobs, submissions: list[SubmissionRow]) -> Iterator[Part]:
    """Yield the submissions in order, each with its share of the tokens.

    Shares are normalised before anything is multiplied, so that one submission
    alone has a share of exactly 1.
    """
    shares = merge_weights([row.tokens for row in submissions])
    for row, share in zip(submissions, shares, strict=True):
        header, payload = decode_frame(
            blobs.read(BlobKind.PAYLOAD, row.payload_file or "")
        )
        yield Part(header.codec, payload, share)


def _commit(
    connection: Connection,
    fleet: Fleet,
    closing: _Closing,
    blobs: VersionBlobs,
    now: float,
) -> VersionPoint:
    """Make the version. Raises LookupError when its round is no longer to close."""
    run = runs.newest_run(connection)
    live = None if run is None else rounds.live_round(connection, run.run_id)
    if run is None or live is None or live.round_id != closing.live.round_id:
        # Its blobs stay: the number may be that of another version by now, and what
        # no row names is removed at the next start.
        raise LookupError(f"round {closing.live.round_id} is not to be closed any more")
    tokens = sum(row.tokens for row in closing.submissions)
    parent = versions.find_version(connection, live.base_version)
    loss = sum(row.loss_mean * row.tokens for row in closing.submissions) / tokens
    versions.add_version(
        connection,
        version=closing.version,
        run_id=run.run_id,
        parent=live.base_version,
        round_id=live.round_id,
        created_at=now,
        tokens_total=(parent.tokens_total if parent else 0) + tokens,
        num_submissions=len(closing.submissions),
        train_loss=loss,
        plan_json=run.plan_json,
        published_sha256=blobs.published.sha256,
        published_bytes=blobs.published.num_bytes,
        state_sha256=blobs.state.sha256,
        state_bytes=blobs.state.num_bytes,
    )
    rounds.apply_submissions(connection, live.round_id, closing.version)
    _open_next(connection, fleet, run, live, closing.version, now)
    return version_point(versions.points_of(connection, run.run_id, newest=1)[0])


def _open_next(
    connection: Connection,
    fleet: Fleet,
    run: RunRow,
    live: RoundRow,
    version: int,
    now: float,
) -> None:
    """Close the round, open the next, and make what the new version calls for."""
    manifest = fleet.the_manifest()
    rounds.change_round(
        connection, live.round_id, state="closed", closed_at=now, version=version
    )
    rounds.open_round(connection, run_id=run.run_id, base_version=version, now=now)
    workers.add_event(
        connection,
        at=now,
        kind="version.published",
        body={"version": version, "round_id": live.round_id},
    )
    if (version - run.root_version) % plan_of(run).evaluate_every == 0:
        add_evaluation(
            connection, run, manifest, version=version, now=now, rng=fleet.rng
        )
    add_epoch_if_done(connection, run, manifest, now)


def _filter(connection: Connection, closing: _Closing, now: float) -> None:
    """Leave every submission of the round out; the round starts over."""
    live, run = closing.live, closing.run
    rounds.filter_submissions(connection, live.round_id, "not finite after the step")
    for row in closing.submissions:
        runs.add_range(
            connection,
            run_id=run.run_id,
            epoch=row.epoch,
            shard_id=row.shard_id,
            start_token=row.start_token,
            num_tokens=row.tokens,
        )
        runs.add_accepted_tokens(connection, run.run_id, -row.tokens)
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
