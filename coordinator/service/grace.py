"""After a pause of the coordinator itself: time for workers to be heard again.

Nobody could renew a lease while there was nobody to answer.
"""

from __future__ import annotations

import logging
from typing import Final

from sqlalchemy import Connection

from coordinator.domain import leases
from coordinator.service.fleet import Fleet
from coordinator.service.roster import heartbeat_s
from coordinator.store import tasks, workers

log = logging.getLogger(__name__)

#: Leases are looked at each second; later than this, the process itself stood still.
SLEPT_S: Final = 10.0


def extend_leases(fleet: Fleet) -> None:
    """Give every live lease the grace of a start. Blocking.

    To be called once nothing can stop the start any more: whoever only looks at a
    data folder, or is refused, must not keep a lease alive.
    """
    now = fleet.clock.now()
    fleet.store.write_now(lambda connection: _give_grace(connection, fleet, now))


async def awake(fleet: Fleet) -> float:
    """Return the lease clock; where this process slept, leases get that grace first.

    Whoever judges a lease asks here for the time: what workers sent meanwhile is read
    only now.
    """
    if _slept(fleet):
        async with fleet.waking:
            if _slept(fleet):
                now = fleet.clock.now()
                await fleet.store.write(lambda c: _give_grace(c, fleet, now))
                fleet.swept_at = fleet.clock.monotonic()
    return fleet.clock.now()


def _slept(fleet: Fleet) -> bool:
    return (
        fleet.swept_at is not None
        and fleet.clock.monotonic() - fleet.swept_at > SLEPT_S
    )


def _give_grace(connection: Connection, fleet: Fleet, now: float) -> None:
    by_id = {worker.worker_id: worker for worker in workers.all_workers(connection)}
    held = tasks.all_leased(connection)
    for task in held:
        interval_s = heartbeat_s(fleet, by_id[task.lease_worker_id or ""])
        tasks.renew_lease(
            connection,
            task.task_id,
            expires_at=max(task.expires_at or now, now + leases.ttl_s(interval_s)),
            hard_at=leases.resumed_hard_at(
                task.claimed_at or now, task.hard_at or now, now=now
            ),
        )
    log.info(
        "%d leases get time to be renewed",
        len(held),
        extra={"event": "leases.extended"},
    )
