"""After a pause of the coordinator itself: time for workers to be heard again.

Nobody could renew a lease, or send a heartbeat, while there was nobody to answer.
"""

from __future__ import annotations

import logging
from typing import Final

from sqlalchemy import Connection

from coordinator.domain import leases
from coordinator.domain.leases import Lease, Reported
from coordinator.domain.verdicts import heard_at
from coordinator.service.fleet import Fleet
from coordinator.service.roster import heartbeat_s
from coordinator.store import clock, tasks, workers
from coordinator.store.rows import TaskRow

log = logging.getLogger(__name__)

#: Leases are looked at each second; later than this, the process itself stood still.
SLEPT_S: Final = 10.0


def extend_leases(fleet: Fleet) -> None:
    """Give every live lease at least one TTL from now, after a restart. Blocking.

    To be called once nothing can stop the start any more: whoever only looks at a
    data folder, or is refused, must not keep a lease alive.
    """
    now = fleet.clock.now()

    def extend(connection: Connection) -> None:
        ran_until = clock.ran_until(connection)
        away_s = 0.0 if ran_until is None else now - ran_until
        _give_grace(connection, fleet, now, away_s)

    fleet.store.write_now(extend)
    fleet.awake_since = now


async def awake(fleet: Fleet) -> float:
    """Return the lease clock; where this process slept, leases get that grace first.

    Whoever judges a lease asks here for the time: what workers sent meanwhile is read
    only now.
    """
    if _slept_s(fleet) > SLEPT_S:
        async with fleet.waking:
            away_s = _slept_s(fleet)
            if away_s > SLEPT_S:
                now = fleet.clock.now()
                await fleet.store.write(lambda c: _give_grace(c, fleet, now, away_s))
                fleet.swept_at, fleet.awake_since = fleet.clock.monotonic(), now
    return fleet.clock.now()


def _slept_s(fleet: Fleet) -> float:
    if fleet.swept_at is None:
        return 0.0
    return fleet.clock.monotonic() - fleet.swept_at


def _give_grace(
    connection: Connection, fleet: Fleet, now: float, away_s: float
) -> None:
    by_id = {worker.worker_id: worker for worker in workers.all_workers(connection)}
    held = tasks.all_leased(connection)
    for task in held:
        interval_s = heartbeat_s(fleet, by_id[task.lease_worker_id or ""])
        lease = leases.resumed(
            lease_of(task, now), ttl_s=leases.ttl_s(interval_s), now=now, away_s=away_s
        )
        tasks.renew_lease(
            connection,
            task.task_id,
            progress_at=lease.progress_at,
            expires_at=lease.expires_at,
            hard_at=lease.hard_at,
            paused_s=lease.paused_s,
            stalled_at=lease.stalled_at,
        )
    for worker in by_id.values():
        heard = heard_at(worker.heartbeat_at, now=now, away_s=away_s)
        workers.change_worker(connection, worker.worker_id, heartbeat_at=heard)
    log.info(
        "%d leases get time to be renewed",
        len(held),
        extra={"event": "leases.extended"},
    )


def lease_of(task: TaskRow, now: float) -> Lease:
    """Return the lease of a leased task."""
    expires_at = task.expires_at or now
    return Lease(
        num_tokens=task.num_tokens,
        claimed_at=task.claimed_at or now,
        progress_at=task.progress_at or now,
        expires_at=expires_at,
        hard_at=task.hard_at or expires_at,
        reported=Reported(
            tokens_done=task.tokens_done,
            bytes_done=task.bytes_done,
            cpu_s=task.cpu_s,
            step_s=task.step_s,
        ),
        paused_s=task.paused_s,
        stalled_at=task.stalled_at,
    )
