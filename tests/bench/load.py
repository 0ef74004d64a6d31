"""One load: a real coordinator process, a crowd of workers, a dashboard, a scraper.

What happened in a round is read from the coordinator's database and log; what its
clients felt is measured where they are.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
from sqlalchemy import Connection, func, select

from coordinator.app import DATABASE_NAME
from coordinator.control import ResetPassword, Seed, ask
from coordinator.demo.processes import Child, start_coordinator
from coordinator.domain.manifest import Manifest
from coordinator.settings import PREFIX
from coordinator.store import rounds, runs, versions
from coordinator.store.engine import read_once
from coordinator.store.tables import events, submissions
from tests.bench.crowd import ARRIVAL_S, CrowdWorker, Heard, Payloads, Place
from tests.bench.fleet import end
from tests.bench.watching import Seen, scrape, watch

#: One sequence a step, so that steps of the slowest worker take seconds; scores belong
#: to it; no end by tokens. All else is as it is by itself.
SETTINGS: Final = {
    "PORT": "0",
    "BATCH_SIZE": "1",
    "EVALUATE_EVERY": "2",
    "TOKEN_BUDGET": "0",
}
#: Rounds before those that count: the first is of probes, and all fetch all.
WARM_UP_ROUNDS: Final = 2
#: Who takes so many times what the rounds should take is not waited for.
PATIENCE: Final = 4.0
#: A probe of 4 steps of the slowest worker, and what comes before, in seconds.
START_S: Final = 60.0
LOOK_S: Final = 0.5
#: What the guards, the step, the files and the transaction of a closing took.
STAGES: Final = ("judge_s", "step_s", "write_s", "commit_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """How a round was closed."""

    #: From the first claim to the version, and from the last claim's end to there.
    took_s: float
    close_s: float
    #: By the coordinator's log.
    stages: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a crowd asked for, and how it was served, in the rounds that count."""

    num_workers: int
    round_s: float
    #: How long these rounds took together; rounds that count, and that were to.
    seconds: float
    closings: Sequence[Closing]
    num_rounds: int
    num_tasks: int
    #: Seconds. A claim counts from when it could be answered: when it was sent, or the
    #: version was there that it waited for.
    claim_s: Sequence[float]
    heartbeat_s: Sequence[float]
    submit_s: Sequence[float]
    scrape_s: Sequence[float]
    #: The worst since the coordinator began.
    lag_s: float
    cpu_s: float
    #: The most memory that the coordinator had, and what its database grew by.
    peak_bytes: int
    database_bytes: int
    feed_bytes: int
    #: Of the whole run.
    refusals: Counter[str]
    num_expired: int


def run_load(
    folder: Path,
    corpus: Path,
    manifest: Manifest,
    *,
    preset: str,
    num_workers: int,
    num_rounds: int,
    round_s: float,
) -> Load:
    """Serve a crowd for some rounds; all that it leaves lies in `folder`."""
    folder.mkdir()
    key = secrets.token_urlsafe(32)
    settings = SETTINGS | {
        "DATA": str(folder / "data"),
        "CORPUS": str(corpus),
        "WORKER_API_KEY": key,
        "PRESET": preset,
        "ROUND_S": str(round_s),
    }
    env = {PREFIX + name: value for name, value in settings.items()}
    coordinator, port = start_coordinator(env, folder)
    try:
        place = Place(port=port, key=key, manifest=manifest)
        run = _Run(folder, coordinator, place, num_workers, num_rounds, round_s)
        return asyncio.run(run.go())
    finally:
        end(coordinator)


class _Run:
    """A load while it runs."""

    def __init__(
        self,
        folder: Path,
        coordinator: Child,
        place: Place,
        num_workers: int,
        num_rounds: int,
        round_s: float,
    ) -> None:
        self._data = folder / "data"
        self._coordinator = coordinator
        self._process = psutil.Process(coordinator.pid)
        self._place = place
        self._num_workers, self._num_rounds = num_workers, num_rounds
        self._round_s = round_s
        self._heard, self._seen = Heard(), Seen()

    async def go(self) -> Load:
        ask(self._data, Seed())
        said = ask(self._data, ResetPassword()) or ""
        password = said.rpartition(" ")[2]
        place, payloads = self._place, Payloads()
        async with AsyncExitStack() as stack:
            group = await stack.enter_async_context(asyncio.TaskGroup())
            work = [
                CrowdWorker(place, self._heard, payloads, n, self._num_workers).run()
                for n in range(self._num_workers)
            ]
            work += [
                watch(place.port, password, self._seen),
                scrape(place.port, place.key, self._seen),
            ]
            running = [group.create_task(one) for one in work]
            load = await self._measure()
            for task in running:
                task.cancel()
        return load

    async def _measure(self) -> Load:
        root = (await self._look(_versions))[0]
        first = root + WARM_UP_ROUNDS
        warm_up_s = ARRIVAL_S + START_S + PATIENCE * self._round_s * WARM_UP_ROUNDS
        await self._until(first, warm_up_s)
        before = self._cpu_s(), await self._look(_database_bytes)
        await self._until(
            first + self._num_rounds, PATIENCE * self._round_s * self._num_rounds
        )
        after = self._cpu_s(), await self._look(_database_bytes)
        story = await self._look(lambda connection: _story(connection, first))
        return self._load(
            story, cpu_s=after[0] - before[0], database_bytes=after[1] - before[1]
        )

    async def _until(self, version: int, patience_s: float) -> None:
        """Wait for a version; who is too late for that is left behind."""
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if (await self._look(_versions))[1] >= version:
                return
            if not self._coordinator.alive:
                raise OSError(f"coordinator ended: {self._coordinator.last_words()}")
            await asyncio.sleep(LOOK_S)

    async def _look(self, act: Any) -> Any:
        return await asyncio.to_thread(read_once, self._data / DATABASE_NAME, act)

    def _cpu_s(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system

    def _load(self, story: _Story, *, cpu_s: float, database_bytes: int) -> Load:
        heard, seen = self._heard, self._seen

        def inside(at: float) -> bool:
            return story.began_at <= at <= story.ended_at

        published_at = story.published_at
        stages = _stages(self._coordinator.log_path)
        return Load(
            num_workers=self._num_workers,
            round_s=self._round_s,
            seconds=story.ended_at - story.began_at,
            closings=[
                Closing(took_s=took_s, close_s=close_s, stages=stages.get(version, {}))
                for version, took_s, close_s in story.closings
            ],
            num_rounds=self._num_rounds,
            num_tasks=story.num_tasks,
            claim_s=[
                answered_at - max(sent_at, published_at.get(version, 0.0))
                for sent_at, answered_at, version in heard.claims
                if inside(answered_at)
            ],
            heartbeat_s=[took_s for at, took_s in heard.heartbeats if inside(at)],
            submit_s=[took_s for at, took_s in heard.submissions if inside(at)],
            scrape_s=[took_s for at, took_s in seen.scrapes if inside(at)],
            lag_s=seen.lag_s,
            cpu_s=cpu_s,
            peak_bytes=_peak_bytes(self._process.pid),
            database_bytes=database_bytes,
            feed_bytes=sum(size for at, size in seen.messages if inside(at)),
            refusals=heard.refusals,
            num_expired=story.num_expired,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Story:
    """What the database says of the rounds that count."""

    began_at: float
    ended_at: float
    published_at: dict[int, float]
    #: Version, seconds from the first claim, seconds from the last claim's end.
    closings: list[tuple[int, float, float]]
    num_tasks: int
    num_expired: int


def _story(connection: Connection, first: int) -> _Story:
    """Return what happened since version `first` was published."""
    run = runs.newest_run(connection)
    assert run is not None
    points = versions.points_of(connection, run.run_id)
    counted = [point for point in points if point.version > first]
    began_at = max((p.created_at for p in points if p.version <= first), default=0.0)
    made = {
        row.version: row.round_id
        for row in versions.versions_of(connection, run.run_id)
        if row.round_id is not None
    }
    closings = [
        (
            point.version,
            point.created_at - (point.first_claim_at or math.nan),
            point.created_at
            - (rounds.ended_at(connection, made[point.version]) or math.nan),
        )
        for point in counted
    ]
    expired = select(func.count()).where(events.c.kind == "lease.expired")
    tasks = select(func.count()).where(submissions.c.version > first)
    return _Story(
        began_at=began_at,
        ended_at=points[-1].created_at,
        published_at={point.version: point.created_at for point in points},
        closings=closings,
        num_tasks=connection.execute(tasks).scalar_one(),
        num_expired=connection.execute(expired).scalar_one(),
    )


def _versions(connection: Connection) -> tuple[int, int]:
    """Return the first and the newest version of the run."""
    run = runs.newest_run(connection)
    assert run is not None
    return run.root_version, versions.newest_version(connection, run.run_id).version


def _database_bytes(connection: Connection) -> int:
    size, count = (
        connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
        for name in ("page_size", "page_count")
    )
    return int(size * count)


def _stages(log_path: Path) -> dict[int, dict[str, float]]:
    """Return by version what the stages of its closing took, by the log."""
    lines = [json.loads(line) for line in log_path.read_text().splitlines() if line]
    return {
        line["version"]: {stage: line[stage] for stage in STAGES}
        for line in lines
        if line.get("event") == "version.published"
    }


def _peak_bytes(pid: int) -> int:
    """Return the most memory that a process has had resident (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return psutil.Process(pid).memory_info().rss
