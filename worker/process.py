"""A worker process put together: settings -> collaborators -> loop, and how it ends."""

from __future__ import annotations

import logging
import os
import random
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Final

from bitnet_ext.wire.messages import HeartbeatRequest, ReleaseRequest
from bitnet_ext.wire.verdicts import WorkerPhase
from worker.client import Client
from worker.errors import CoordinatorError
from worker.heartbeat import Heartbeat
from worker.logship import LogShipper
from worker.loop import Worker
from worker.retry import Retry
from worker.settings import WorkerSettings
from worker.shutdown import LAST_WORDS_SHARE, Shutdown
from worker.trainer import Trainer
from worker.work import Kit

log = logging.getLogger(__name__)

_MAX_LAST_WORDS_S: Final = 5.0


def work(settings: WorkerSettings, trainer: Trainer) -> None:
    """Work until SIGTERM or SIGINT; raises what `Worker.run` raises.

    Must run in the main thread, which alone may catch signals.
    """
    chance = random.SystemRandom()
    heartbeat = Heartbeat(_client(settings), settings.worker_id, settings.beacon)
    shipper = LogShipper(_client(settings), settings.worker_id, Retry(chance))
    shutdown = Shutdown(settings.shutdown_s)
    shutdown.install(partial(end_now, settings, heartbeat))
    kit = Kit(
        settings=settings,
        client=_client(settings),
        heartbeat=heartbeat,
        trainer=trainer,
        shutdown=shutdown,
        retry=Retry(chance),
        clock=time.monotonic,
        cpu_s=time.process_time,
        new_id=lambda: uuid.uuid4().hex,
    )

    def start_threads() -> None:
        heartbeat.start()
        shipper.start()

    logging.getLogger().addHandler(shipper)
    try:
        Worker(kit, start_threads).run()
    finally:
        heartbeat.stop()
        if shutdown.requested and heartbeat.lease is None:
            with closing(_last_client(settings)) as client:
                _say_goodbye(client, settings, heartbeat)
        shipper.stop(_last_words_s(settings))
        logging.getLogger().removeHandler(shipper)


def end_now(
    settings: WorkerSettings,
    heartbeat: Heartbeat,
    end: Callable[[int], object] = os._exit,
) -> None:
    """Give back what is held and end the process; for a thread of its own.

    The main thread is in the middle of a step and cannot be interrupted.
    """
    lease = heartbeat.lease
    try:
        if lease is not None:
            with closing(_last_client(settings)) as client:
                client.release(
                    lease.task.task_id,
                    ReleaseRequest(
                        worker_id=settings.worker_id,
                        lease_id=lease.task.lease_id,
                        reason="told to stop, and a step outlasted the grace period",
                    ),
                )
                _say_goodbye(client, settings, heartbeat)
    except CoordinatorError as error:
        log.warning("task not given back: %s", error, extra={"event": "task.untold"})
    finally:
        end(0)


def _client(settings: WorkerSettings, **patience_s: float) -> Client:
    return Client(settings.coordinator_url, settings.api_key, **patience_s)


def _last_client(settings: WorkerSettings) -> Client:
    """Return a client that has no more time than is left for last words."""
    # Connecting and reading may each take so long.
    patience_s = _last_words_s(settings) / 2
    return _client(settings, connect_s=patience_s, read_s=patience_s)


def _say_goodbye(
    client: Client, settings: WorkerSettings, heartbeat: Heartbeat
) -> None:
    """Tell the coordinator that this process ends, so that nobody looks for it."""
    # A heartbeat that came after it would take it back.
    heartbeat.stop(_last_words_s(settings))
    request = HeartbeatRequest(
        worker_id=settings.worker_id,
        phase=WorkerPhase.STOPPING,
        cpu_s=time.process_time(),
    )
    try:
        client.heartbeat(request)
    except CoordinatorError as error:
        log.warning("no goodbye: %s", error, extra={"event": "heartbeat.failed"})


def _last_words_s(settings: WorkerSettings) -> float:
    return min(_MAX_LAST_WORDS_S, LAST_WORDS_SHARE * settings.shutdown_s)
