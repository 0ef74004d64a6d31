"""The composition root: every collaborator is made and joined to the others here."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from sqlalchemy.exc import DBAPIError
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

import webui
from coordinator.api.base import Api, UnknownRoute, secret_hash
from coordinator.api.exports import export_routes
from coordinator.api.files import file_routes
from coordinator.api.gradient import gradient_routes
from coordinator.api.status import status_routes
from coordinator.api.workers import worker_routes
from coordinator.control import ControlServer
from coordinator.domain.errors import RefusedError, StartError
from coordinator.live.hub import Hub
from coordinator.live.socket import LiveFeed, live_route
from coordinator.login.door import Door
from coordinator.login.handlers import Site, page_routes, page_settings
from coordinator.login.hosts import host_allowed
from coordinator.login.passwords import ensure_admin_password
from coordinator.server import Server, allow_connections
from coordinator.service.adopting import adopt_corpus
from coordinator.service.closing import RoundCloser
from coordinator.service.feed import Feed
from coordinator.service.fleet import Fleet, OnEvent
from coordinator.service.grace import extend_leases
from coordinator.service.lag import LoopLag
from coordinator.service.own_files import look_again
from coordinator.service.starting import RunSettings, reconcile
from coordinator.service.sweeping import (
    CLOCK_S,
    SWEEP_S,
    every,
    keep_clock,
    sweep,
)
from coordinator.service.ternary_health import HEALTH_S, examine_due
from coordinator.settings import KEY_RULE, CoordinatorSettings, is_key
from coordinator.store import clock, workers
from coordinator.store.blobs import Blobs
from coordinator.store.engine import Store, clear_errors
from coordinator.store.lock import DataLock
from coordinator.store.schema import has_tables, migrate
from coordinator.store.system import LeaseClock, OsFs, SystemRng

log = logging.getLogger(__name__)

DATABASE_NAME: Final = "fleet.db"
KEY_NAME: Final = "worker-api-key"
#: In-flight requests get this long when the coordinator is told to stop.
DRAIN_S: Final = 20.0
_NUM_BENCHES: Final = 4


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a coordinator can be reached."""

    port: int
    #: The admin password, at the very first start only.
    first_password: str | None


@contextlib.contextmanager
def open_fleet(settings: CoordinatorSettings, on_event: OnEvent) -> Iterator[Fleet]:
    """Open the data folder under its lock. Blocking; raises StartError."""
    settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = settings.data / DATABASE_NAME
    with clear_errors(path), contextlib.ExitStack() as opened:
        opened.callback(DataLock(settings.data).close)
        store = Store(path)
        opened.callback(store.close)
        workbench = ThreadPoolExecutor(_NUM_BENCHES, thread_name_prefix="workbench")
        opened.callback(workbench.shutdown)
        store.write_now(lambda connection: has_tables(connection, settings.data))
        store.write_now(migrate)
        fleet = _make_fleet(settings, store, workbench, on_event)
        yield opened.enter_context(contextlib.closing(fleet))


def _make_fleet(
    settings: CoordinatorSettings,
    store: Store,
    workbench: ThreadPoolExecutor,
    on_event: OnEvent,
) -> Fleet:
    rng, fs = SystemRng(), OsFs()
    ran_until = store.read_now(clock.ran_until)
    fresh = rng.token(32)
    secret = store.write_now(lambda c: workers.server_secret(c, fresh))
    return Fleet(
        store=store,
        blobs=Blobs(settings.data, fs, rng),
        fs=fs,
        clock=LeaseClock(ran_until or 0.0),
        rng=rng,
        corpus=settings.corpus,
        on_event=on_event,
        secret=secret,
        workbench=workbench,
        heartbeat_s=settings.heartbeat_s,
        keep_versions=settings.keep_versions,
        roll_back=settings.roll_back,
    )


def run_settings(settings: CoordinatorSettings) -> RunSettings:
    """Return what a new run is made of."""
    return RunSettings(
        preset=settings.preset,
        seed=settings.seed,
        plan=settings.plan,
        token_budget=settings.token_budget,
    )


def worker_key(settings: CoordinatorSettings) -> str:
    """Return the key of the workers: the one set, else one made at the first start.

    Raises StartError where that one is damaged: it would let no worker in.
    """
    if settings.worker_api_key is not None:
        return settings.worker_api_key
    path = settings.data / KEY_NAME
    if not path.exists():
        # Whole before it has its name: another process may look at the same time.
        fresh = path.with_name(f".{KEY_NAME}-{os.getpid()}")
        fresh.touch(mode=0o600)
        fresh.write_text(secrets.token_urlsafe(32))
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(fresh)
        fresh.unlink()
    key = path.read_text(errors="replace").strip()
    if not is_key(key):
        raise StartError(
            f"{path} is damaged: it must hold a key, {KEY_RULE}. Put it back from a "
            "backup, or remove it: another is made, which every worker then needs"
        )
    return key


async def serve(
    settings: CoordinatorSettings, ready: Callable[[Listening], None]
) -> None:
    """Run a coordinator until SIGTERM or SIGINT. Raises StartError.

    The port is taken before anything is made: who finds it in use has changed nothing.
    """
    settings.check_reach()
    hub = Hub()
    stop = _stop_on_signal()
    with _bound(settings) as sockets, open_fleet(settings, hub.publish) as fleet:
        new_run = run_settings(settings)
        await asyncio.to_thread(reconcile, fleet)
        await asyncio.to_thread(adopt_corpus, fleet, new_run)
        await asyncio.to_thread(extend_leases, fleet)
        lag = LoopLag(fleet.clock)
        feed = Feed(
            fleet,
            lag,
            insecure_http=not settings.is_loopback,
            is_watched=lambda: hub.is_watched,
        )
        async with _listen(settings, sockets, fleet, hub, feed, lag) as listening:
            background = [
                asyncio.create_task(work)
                for work in _background(fleet, new_run, feed, lag)
            ]
            if not settings.is_loopback:
                log.warning(
                    "plain HTTP beyond this machine: keys and passwords can be read",
                    extra={"event": "http.insecure", "address": settings.host},
                )
            ready(listening)
            await stop.wait()
            log.info("stopping", extra={"event": "coordinator.stopping"})
            fleet.stop_giving_out()
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await _keep_clock_at_last(fleet)


async def _keep_clock_at_last(fleet: Fleet) -> None:
    """Store the lease clock once more; where that fails, that of the last time does."""
    try:
        await keep_clock(fleet)
    except (RefusedError, DBAPIError) as error:
        about = {"event": "clock.not_stored"}
        log.warning("the clock was not stored: %s", error, extra=about)


def _background(
    fleet: Fleet, new_run: RunSettings, feed: Feed, lag: LoopLag
) -> list[Any]:
    closer = RoundCloser(fleet)
    return [
        every(SWEEP_S, partial(sweep, fleet, new_run), "sweep"),
        every(CLOCK_S, partial(keep_clock, fleet), "clock"),
        # Apart from the sweep: hashing a file can take longer than a lease may wait.
        every(SWEEP_S, partial(look_again, fleet), "looking at broken files"),
        every(HEALTH_S, partial(examine_due, fleet), "looking at scored versions"),
        every(SWEEP_S, closer.run, "closing a round"),
        every(SWEEP_S, feed.run, "the live feed"),
        every(SWEEP_S, lag.run, "the lag metric"),
    ]


def _stop_on_signal() -> asyncio.Event:
    """Return what the first signal sets; the second ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def first(number: int) -> None:
        stop.set()
        for later in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(later)
            signal.signal(later, signal.SIG_DFL)
        log.info("told to stop", extra={"event": "signal.received", "signal": number})

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, first, number)
    return stop


@contextlib.asynccontextmanager
async def _listen(
    settings: CoordinatorSettings,
    sockets: list[socket.socket],
    fleet: Fleet,
    hub: Hub,
    feed: Feed,
    lag: LoopLag,
) -> AsyncIterator[Listening]:
    """Serve HTTP and the control socket as long as the block runs."""
    mark = hashlib.sha256(b"session cookie" + fleet.secret).hexdigest()[:8]
    door = Door(fleet.store, fleet.clock, fleet.rng, secure=False, mark=mark)
    live = _live_feed(settings, fleet, hub, feed, door)
    door.on_logout(live.clients.recheck)
    application = _application(settings, fleet, feed, lag, door, live)
    server = Server(application, limit=allow_connections())
    control = ControlServer(
        fleet, feed, settings.data, key_is_set=settings.worker_api_key is not None
    )
    await control.start()
    # Last of all: it is shown once, so nothing may fail between here and there.
    password = await ensure_admin_password(fleet.store, fleet.rng)
    server.add_sockets(sockets)
    try:
        yield Listening(sockets[0].getsockname()[1], password)
    finally:
        await control.stop()
        live.clients.close_all()
        await server.drain(DRAIN_S)


@contextlib.contextmanager
def _bound(settings: CoordinatorSettings) -> Iterator[list[socket.socket]]:
    """Hold the port as long as the block runs."""
    try:
        sockets = bind_sockets(settings.port, settings.host)
    except OSError as error:
        raise StartError(
            f"cannot listen on host {settings.host!r}, port {settings.port}: "
            f"{error.strerror or error}"
        ) from error
    try:
        yield sockets
    finally:
        for bound in sockets:
            bound.close()


def _live_feed(
    settings: CoordinatorSettings, fleet: Fleet, hub: Hub, feed: Feed, door: Door
) -> LiveFeed:
    return LiveFeed(
        hub=hub,
        take_snapshot=feed.for_page,
        current_operator=door.watching_operator,
        host_allowed=partial(host_allowed, allowed=settings.allowed_hosts),
        clock=fleet.clock,
    )


def _application(
    settings: CoordinatorSettings,
    fleet: Fleet,
    feed: Feed,
    lag: LoopLag,
    door: Door,
    live: LiveFeed,
) -> Application:
    keys = [worker_key(settings), settings.worker_api_key_next]
    api = Api(
        fleet=fleet,
        feed=feed,
        lag=lag,
        key_hashes=[secret_hash(key) for key in keys if key],
        metrics_hash=(
            secret_hash(settings.metrics_token) if settings.metrics_token else None
        ),
        is_operator=_operator_check(settings, door),
    )
    site = Site(
        door=door,
        allowed_hosts=settings.allowed_hosts,
        webui_folder=Path(webui.__file__).parent,
    )
    return Application(
        [
            *worker_routes(api),
            *gradient_routes(api),
            *file_routes(api),
            *export_routes(api),
            *status_routes(api),
            *page_routes(site),
            live_route(live),
        ],
        default_handler_class=UnknownRoute,
        default_handler_args={"api": api},
        log_function=_log_request,
        **page_settings(secure=False),
    )


def _operator_check(
    settings: CoordinatorSettings, door: Door
) -> Callable[[RequestHandler], Awaitable[bool]]:
    async def is_operator(handler: RequestHandler) -> bool:
        if not host_allowed(
            handler.request.headers.get("Host"), settings.allowed_hosts
        ):
            return False
        return await door.current_operator(handler) is not None

    return is_operator


def _log_request(handler: RequestHandler) -> None:
    log.debug(
        "%s",
        handler.request.method,
        extra={
            "event": "request.answered",
            "path": handler.request.path,
            "status": handler.get_status(),
            "seconds": round(handler.request.request_time(), 4),
        },
    )
