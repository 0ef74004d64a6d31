"""Keeps the page up to date: looks when something has changed, sends what is new."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from msgspec.structs import replace

from coordinator.service.fleet import Fleet
from coordinator.service.grace import awake
from coordinator.service.lag import LoopLag
from coordinator.service.looking import look
from coordinator.service.telemetry import Telemetry, collect
from coordinator.service.view import FleetUpdate, FleetView, LaneView, WorkerView

#: Least time between two updates.
MIN_GAP_S: Final = 0.5
#: Looked at this often even when nothing rings: silence changes verdicts too.
MAX_GAP_S: Final = 2.0
#: Looking takes longer the more workers there are: no more than this share of the time,
LOOK_SHARE: Final = 0.05
#: but a look that was held up, once, is no reason to leave pages as they are for long.
MOST_GAP_S: Final = 30.0
#: The lag is told along with something else, never alone.
_PARTS: Final = ("missing", "run", "training", "round", "tasks", "ternary")


class Feed:
    """What the live page is fed with."""

    def __init__(
        self,
        fleet: Fleet,
        lag: LoopLag,
        *,
        insecure_http: bool,
        is_watched: Callable[[], bool],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._fleet = fleet
        self._lag = lag
        self._insecure_http = insecure_http
        self._pause = pause
        #: Tells whether there is a page to keep up to date.
        self._is_watched = is_watched
        #: What pages know; None: it differs, each has its own snapshot.
        self._last: FleetView | None = None

    async def snapshot(self) -> FleetView:
        """Return everything, history included."""
        return await self._look(history=True)

    async def for_page(self) -> FleetView:
        """Return the same for a page; the next update holds everything once more.

        The page may be shown what comes after one look of ours and goes before the
        next: no difference of these would ever take it back.
        """
        self._last = None
        return await self.snapshot()

    async def glance(self) -> FleetView:
        """Return everything but the history, of which it has the newest score."""
        return await self._look(history=False)

    async def telemetry(self) -> Telemetry:
        """Return all that an expert may want to see."""
        now = await awake(self._fleet)
        lag_ms = 1000.0 * self._lag.worst_s()
        return await self._fleet.store.read(
            lambda connection: collect(
                connection,
                self._fleet,
                now=now,
                loop_lag_ms=lag_ms,
                insecure_http=self._insecure_http,
            )
        )

    async def run(self) -> None:
        """Publish what changes; never returns."""
        while True:
            await self._fleet.changed.wait(MAX_GAP_S)
            began = self._fleet.clock.monotonic()
            await self.update()
            await self._pause(gap_s(self._fleet.clock.monotonic() - began))

    async def update(self) -> None:
        """Publish what differs from the last look, if anything does.

        While nobody watches nothing is looked at: it would be a good part of what an
        idle coordinator does. The first update after that holds everything.
        """
        if not self._is_watched():
            self._last = None
            return
        view = await self.glance()
        update = difference(self._last, view)
        self._last = view
        if update is not None:
            self._fleet.publish("fleet.updated", update)

    async def _look(self, *, history: bool) -> FleetView:
        now = await awake(self._fleet)
        lag_ms = 1000.0 * self._lag.worst_s()
        return await self._fleet.store.read(
            lambda connection: look(
                connection,
                self._fleet,
                now=now,
                loop_lag_ms=lag_ms,
                insecure_http=self._insecure_http,
                history=history,
            )
        )


def gap_s(look_s: float) -> float:
    """Return how long to wait after a look that took `look_s`."""
    due_s = look_s * (1.0 - LOOK_SHARE) / LOOK_SHARE
    return min(max(MIN_GAP_S, due_s), MOST_GAP_S)


def _is_news(before: WorkerView | None, after: WorkerView) -> bool:
    """Return whether more has changed about a worker than the age of what is known.

    The page has the moments, and counts by itself.
    """
    return before is None or _timeless(before) != _timeless(after)


def _timeless(row: WorkerView) -> WorkerView:
    still = dataclasses.replace(
        row.facts, heartbeat_age_s=0.0, elapsed_s=0.0, progress_age_s=None
    )
    return replace(row, facts=still)


def _new_lanes(before: FleetView, after: FleetView) -> Sequence[LaneView] | None:
    """Return the lanes that differ or are new; None where more of the round differs."""
    old, new = before.round, after.round
    if old is None or new is None:
        return None
    if replace(old, lanes=[]) != replace(new, lanes=[]):
        return None
    if [_claim(lane) for lane in new.lanes[: len(old.lanes)]] != [
        _claim(lane) for lane in old.lanes
    ]:
        return None
    changed = [
        now for was, now in zip(old.lanes, new.lanes, strict=False) if was != now
    ]
    return [*changed, *new.lanes[len(old.lanes) :]]


def _claim(lane: LaneView) -> tuple[str, str, float]:
    """Return what tells one claim from another."""
    return lane.worker_id, lane.task_id, lane.claimed_at


def difference(before: FleetView | None, after: FleetView) -> FleetUpdate | None:
    """Return what an update must say; None when nothing but the lag has changed."""
    rows = {} if before is None else {row.worker_id: row for row in before.workers}
    lanes = None if before is None else _new_lanes(before, after)
    parts = _PARTS if lanes is None else [name for name in _PARTS if name != "round"]
    update = FleetUpdate(
        **{
            name: getattr(after, name)
            for name in parts
            if before is None or getattr(after, name) != getattr(before, name)
        },
        workers=[
            row for row in after.workers if _is_news(rows.get(row.worker_id), row)
        ],
        lanes=list(lanes or ()),
    )
    if update == FleetUpdate():
        return None
    return replace(update, server=after.server)
