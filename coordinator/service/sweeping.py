"""What has to be done now and then: expired leases, the end of a run, a new corpus."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from sqlalchemy import Connection

from bitnet_ext.wire.verdicts import TaskState
from coordinator.domain.errors import FleetError, RefusedError
from coordinator.service.adopting import adopt_corpus
from coordinator.service.fleet import FINISHED, RUNNING, Fleet
from coordinator.service.returning import sweep_leases
from coordinator.service.seeding import add_evaluation, is_over
from coordinator.service.starting import RunSettings
from coordinator.store import clock, rounds, runs, tasks, versions, workers

log = logging.getLogger(__name__)

SWEEP_S: Final = 1.0
CLOCK_S: Final = 10.0


async def every(
    seconds: float, act: Callable[[], Awaitable[object]], name: str
) -> None:
    """Do something again and again; a failure is logged and tried again."""
    while True:
        try:
            await act()
        except RefusedError as error:  # a full disk, mostly
            log.error("%s failed: %s", name, error, extra={"event": "sweep.failed"})
        except Exception:
            log.exception("%s failed", name, extra={"event": "sweep.failed"})
        await asyncio.sleep(seconds)


async def sweep(fleet: Fleet, settings: RunSettings) -> None:
    """Do everything that is due."""
    if fleet.manifest is None:
        await _look_for_corpus(fleet, settings)
    await sweep_leases(fleet)
    await _end_run(fleet)


async def keep_clock(fleet: Fleet) -> None:
    """Store how far the lease clock has come: it never goes back over a restart."""
    now = fleet.clock.now()
    await fleet.store.write(lambda connection: clock.keep(connection, now))


async def _look_for_corpus(fleet: Fleet, settings: RunSettings) -> None:
    """Take a corpus that has appeared; what fails is tried again at the next sweep."""
    try:
        # In a thread of its own: it waits for the store and for the disk.
        found = await asyncio.to_thread(adopt_corpus, fleet, settings)
    except (FleetError, OSError) as error:
        log.error("no run yet: %s", error, extra={"event": "corpus.refused"})
        fleet.corpus_fault = str(error)
        return
    fleet.corpus_fault = None
    if found:
        fleet.work.ring()
        fleet.changed.ring()


async def _end_run(fleet: Fleet) -> None:
    """Score the last version of a run that is over, then finish the run."""
    now = fleet.clock.now()
    run = await fleet.store.read(runs.newest_run)
    if run is None or run.state != RUNNING or not is_over(run, now):
        return
    ended = await fleet.store.write(lambda connection: _finish(connection, fleet, now))
    if ended:
        log.info("run finished", extra={"event": "run.finished", "run_id": run.run_id})
    fleet.round_ready.ring()  # what came late may wait to be merged
    fleet.work.ring()
    fleet.changed.ring()


def _finish(connection: Connection, fleet: Fleet, now: float) -> bool:
    run = runs.newest_run(connection)
    if run is None or run.roll_back_to is not None:
        return False
    live = rounds.live_round(connection, run.run_id)
    if live is None or live.state != "open" or live.first_submission_at is not None:
        return False
    if tasks.leased_tokens(connection, run.run_id):
        return False
    if rounds.accepted_in_round(connection, live.round_id):
        # Only what came late from rounds before: nobody else will close this one.
        rounds.change_round(connection, live.round_id, state="closing")
        return False
    newest = versions.newest_version(connection, run.run_id).version
    scored = tasks.evaluation_of(connection, run.run_id, newest)
    if scored is None:
        add_evaluation(
            connection,
            run,
            fleet.the_manifest(),
            version=newest,
            now=now,
            rng=fleet.rng,
        )
        return False
    if scored.state in (TaskState.PENDING, TaskState.LEASED):
        return False
    runs.change_run(connection, run.run_id, state=FINISHED)
    workers.add_event(
        connection, at=now, kind="run.finished", body={"run_id": run.run_id}
    )
    return True
