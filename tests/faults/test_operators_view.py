"""What an operator sees of real workers that are stopped, killed and throttled.

One fleet: a coordinator and three worker processes, and its page in a real browser.
Each worker is hit in the middle of a task. TTL and silence have a floor of 30 s, so
this takes a minute or two; every wait is for a condition.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coordinator.control import ResetPassword, Seed
from coordinator.domain.manifest import Manifest
from tests.e2e.chromium import BROWSER, Page, chromium_page, log_in
from tests.faults.signals import Process, cpu_s, stopped, throttled
from tests.integration.fleet import (
    CoordinatorProcess,
    coordinator,
    make_corpus,
    wait_for,
    workers,
)

pytestmark = pytest.mark.skipif(
    BROWSER is None,
    reason="chromium is not installed: what operators see of faults is not tried out",
)

STOPPED, KILLED, THROTTLED = NAMES = ("stopped", "killed", "throttled")
#: A task takes about so long on this machine, once its worker was measured. Who is late
#: hands in what it has after a quarter more: that has to be some looks of the page.
ROUND_S = 10.0
SETTINGS = {"ROUND_S": ROUND_S, "BATCH_SIZE": 2, "EVALUATE_EVERY": 1000}
OFTEN = {"BITNET_HEARTBEAT_SECONDS": "0.25"}
TIMEOUT_S = 120.0

#: Keeps each row of the page's table whenever it changes: [name, verdict, evidence].
WATCH = """
window.seen = [];
const text = (row, part) => row.querySelector(part).textContent.trim();
const look = () => {
    for (const row of document.querySelectorAll('.workers tbody tr')) {
        const line = [text(row, '.name'), text(row, '.verdict'), text(row, '.why')];
        const last = window.seen.findLast(([name]) => name === line[0]);
        if (String(last) !== String(line)) window.seen.push(line);
    }
};
const all = {subtree: true, childList: true, characterData: true};
new MutationObserver(look).observe(document.body, all);
look();
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the page's table of workers, at one moment."""

    name: str
    verdict: str
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What is left when the run is over."""

    manifest: Manifest
    #: What the page has shown, in order; and how many rows of it before the faults,
    #: and before the throttled worker had its task accepted.
    seen: list[Row]
    num_before: int
    num_until_accepted: int
    #: The task that each worker held when it was hit.
    held: dict[str, str]
    #: (worker, state) by task, of every submission; (shard, start, tokens) of all that
    #: count; workers whose lease expired.
    submitted: dict[str, tuple[str, str]]
    trained: list[tuple[str, int, int]]
    expired: list[str]
    #: Tasks by state, and tokens that nobody has trained.
    states: dict[str, int]
    left: int

    def shown(self, name: str, *, after: int = 0, until: int | None = None) -> set[str]:
        """Return the verdicts that a worker had on the page."""
        return {row.verdict for row in self.seen[after:until] if row.name == name}

    def evidence(
        self, name: str, verdict: str, *, after: int = 0, until: int | None = None
    ) -> list[str]:
        """Return the reasons that the page gave for a verdict."""
        return [
            row.evidence
            for row in self.seen[after:until]
            if (row.name, row.verdict) == (name, verdict)
        ]


class Watch:
    """Lets one story happen, and keeps what the page shows of it."""

    def __init__(self, process: CoordinatorProcess, page: Page) -> None:
        self._process = process
        self._page = page

    async def wait_for(self, what: str, look: Any) -> Any:
        """Wait for something that is so of the coordinator."""
        return await asyncio.to_thread(wait_for, what, look, TIMEOUT_S)

    async def until_shown(self, name: str, verdict: str, after: int = 0) -> None:
        """Wait until the page shows a verdict of a worker, after so many rows."""
        rows = f"seen.slice({after})"
        await self._page.until(
            f"{rows}.some(([n, v]) => n === '{name}' && v === '{verdict}')", TIMEOUT_S
        )

    async def seen(self) -> list[Row]:
        """Return what the page has shown so far."""
        return [Row(*line) for line in await self._page.run("window.seen")]

    def num_ready(self) -> bool:
        """Return whether every worker has timed itself, and waits for work."""
        rows = self._process.status()["workers"]
        return sum(w["calibrated_tokens_per_s"] is not None for w in rows) == len(NAMES)

    def task_in_hand(self, name: str, most: float) -> str | None:
        """Return the task of full size that a worker is in the middle of."""
        (row,) = (w for w in self._process.status()["workers"] if w["name"] == name)
        if not row["tokens_per_s"] or (row["predicted_s"] or 0.0) < 0.9 * ROUND_S:
            return None
        done = row["tokens_done"] / row["num_tokens"]
        return str(row["task_id"]) if 0.2 < done < most else None

    def is_accepted(self, task_id: str) -> bool:
        """Return whether a submission of a task was accepted."""
        query = "SELECT 1 FROM submissions WHERE task_id = ?"
        return bool(self._process.rows(query, task_id))

    def is_finished(self) -> bool:
        """Return whether the run is over."""
        return bool(self._process.status()["run"]["state"] == "finished")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("faults")
    manifest = make_corpus(folder / "corpus", num_files=60, words=1200)
    epoch = sum(shard.num_tokens for shard in manifest.train_shards())
    with (
        coordinator(folder, TOKEN_BUDGET=epoch, **SETTINGS) as process,
        workers(folder, process.url, *NAMES, **OFTEN) as running,
    ):
        yield asyncio.run(tell(folder, manifest, process, running))


async def tell(
    folder: Path,
    manifest: Manifest,
    process: CoordinatorProcess,
    running: list[Process],
) -> Story:
    to_stop, to_kill, to_throttle = running
    password = process.tell(ResetPassword()).rsplit(" ", 1)[1]
    async with chromium_page(folder / "profile") as page:
        watch = Watch(process, page)
        await watch.wait_for("all workers", watch.num_ready)
        await log_in(page, process.port, password)
        await page.run(WATCH)
        process.tell(Seed())
        began, had_s = time.monotonic(), cpu_s(to_throttle.pid)
        for name in NAMES:
            await watch.until_shown(name, "Computing")
        mid_task = partial(watch.task_in_hand, THROTTLED, 0.6)
        held = {THROTTLED: await watch.wait_for("a task to throttle", mid_task)}
        num_before = len(await watch.seen())
        a_tenth = (cpu_s(to_throttle.pid) - had_s) / (time.monotonic() - began) / 10.0
        with throttled(to_throttle, a_tenth):
            mid_task = partial(watch.task_in_hand, STOPPED, 1.0)
            held[STOPPED] = await watch.wait_for("a task to stop in", mid_task)
            with stopped(to_stop):
                mid_task = partial(watch.task_in_hand, KILLED, 1.0)
                held[KILLED] = await watch.wait_for("a task to be killed in", mid_task)
                to_kill.kill()
                is_back = partial(watch.is_accepted, held[THROTTLED])
                await watch.wait_for("the task of the throttled worker", is_back)
                await watch.until_shown(THROTTLED, "Slow", after=num_before)
                num_until_accepted = len(await watch.seen())
                await watch.until_shown(STOPPED, "Lost")
                await watch.until_shown(KILLED, "Lost")
        num_lost = len(await watch.seen())
        await watch.until_shown(STOPPED, "Computing", after=num_lost)
        await watch.wait_for("the end of the run", watch.is_finished)
        assert page.errors == []
        return Story(
            manifest=manifest,
            seen=await watch.seen(),
            num_before=num_before,
            num_until_accepted=num_until_accepted,
            held=held,
            **records(process),
        )


def records(process: CoordinatorProcess) -> dict[str, Any]:
    """Return what the database says of the run."""
    submitted = process.rows("SELECT task_id, worker_id, state FROM submissions")
    return {
        "submitted": {task: (worker, state) for task, worker, state in submitted},
        "trained": process.rows(
            "SELECT shard_id, start_token, tokens FROM submissions"
            " WHERE state != 'filtered' ORDER BY shard_id, start_token"
        ),
        "expired": [
            worker
            for (worker,) in process.rows(
                "SELECT json_extract(body_json, '$.worker_id') FROM events"
                " WHERE kind = 'lease.expired' ORDER BY 1"
            )
        ],
        "states": dict(
            process.rows(
                "SELECT state, count(*) FROM tasks WHERE kind = 'train' GROUP BY state"
            )
        ),
        "left": process.rows("SELECT coalesce(sum(num_tokens), 0) FROM ranges")[0][0],
    }


def numbers(pattern: str, text: str) -> list[int]:
    """Return the numbers of the sentence that evidence begins with."""
    found = re.match(pattern, text)
    assert found, text
    return [int(number) for number in found.groups()]


@pytest.mark.parametrize("name", NAMES)
def test_before_it_is_hit_each_worker_is_called_computing(story: Story, name) -> None:
    assert "Computing" in story.shown(name, until=story.num_before)
    assert "Lost" not in story.shown(name, until=story.num_before)
    for said in story.evidence(name, "Computing"):
        (share,) = numbers(r"(\d+) % of its task done\.", said)
        assert 0 <= share <= 100


@pytest.mark.parametrize("name", [STOPPED, KILLED])
def test_a_worker_that_is_stopped_or_killed_is_called_lost(story: Story, name) -> None:
    for said in story.evidence(name, "Lost"):
        silence_s, limit_s = numbers(r"No heartbeat for (\d+) s, limit (\d+) s\.", said)
        assert silence_s >= limit_s == 30


def test_a_worker_throttled_to_a_tenth_is_slow_and_keeps_its_lease(
    story: Story,
) -> None:
    span = {"after": story.num_before, "until": story.num_until_accepted}

    assert "Slow" in story.shown(THROTTLED, **span)
    assert not story.shown(THROTTLED, **span) & {"Lost", "Stuck"}
    said = [
        numbers(r"(\d+) % of its task done after (\d+) s, predicted (\d+) s\.", why)
        for why in story.evidence(THROTTLED, "Slow", **span)
    ]
    assert all(elapsed_s >= predicted_s for _share, elapsed_s, predicted_s in said)
    # Two fifths of it and more were left, for a tenth of the speed: it is not whole.
    assert max(share for share, _elapsed_s, _predicted_s in said) < 100
    assert story.submitted[story.held[THROTTLED]][0] == THROTTLED


def test_only_who_was_lost_loses_a_lease_and_others_do_its_task(story: Story) -> None:
    assert story.expired == [KILLED, STOPPED]
    assert story.submitted[story.held[KILLED]][0] != KILLED
    assert story.held[STOPPED] in story.submitted


def test_a_worker_that_goes_on_is_not_lost_any_more(story: Story) -> None:
    last = {row.name: row.verdict for row in story.seen}

    assert last[KILLED] == "Lost"
    assert "Lost" not in (last[STOPPED], last[THROTTLED])


def test_every_token_of_the_epoch_is_trained_exactly_once(story: Story) -> None:
    reached = {shard.shard_id: 0 for shard in story.manifest.train_shards()}

    for shard_id, start, tokens in story.trained:
        assert start == reached[shard_id]
        reached[shard_id] += tokens

    assert reached == {
        shard.shard_id: shard.num_tokens for shard in story.manifest.train_shards()
    }


def test_every_task_is_done_once_and_nothing_is_left(story: Story) -> None:
    assert story.states == {"done": len(story.submitted)}
    assert story.left == 0
