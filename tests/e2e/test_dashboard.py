"""The dashboard in a real browser, under the real CSP, fed by the real websocket."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from coordinator.domain.ternary_health import MatrixHealth
from coordinator.domain.verdicts import WorkerFacts
from coordinator.live.hub import BACKLOG_MESSAGES
from coordinator.service.view import (
    BooksView,
    EtaView,
    EvaluationPoint,
    FleetUpdate,
    FleetView,
    LaneView,
    LastRoundView,
    RollbackView,
    RoundView,
    RunView,
    ServerView,
    TallyView,
    TasksView,
    TernaryView,
    TrainingView,
    VersionPoint,
    WorkerView,
)
from coordinator.store.tables import sessions
from tests.e2e.chromium import BROWSER, Page, chromium_page, log_in
from tests.integration.page_server import PASSWORD, PageServer, page_server

WEBUI = Path(__file__).parents[2] / "webui"
NOW = time.time()
TALLY = TallyView(trained=5000, accepted=500, applied=4000, wasted={"silent": 500})

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="chromium is not installed: the page is not tried out"
)


def worker(name: str, verdict: str) -> WorkerView:
    return WorkerView(
        worker_id=f"w-{name}",
        name=name,
        verdict=verdict,
        evidence="<b>not markup</b>",
        facts=WorkerFacts(
            heartbeat_age_s=0.0,
            heartbeat_s=5.0,
            tokens_done=500,
            num_tokens=1000,
            no_progress_s=0.0,
            elapsed_s=50.0,
            predicted_s=100.0,
            progress_age_s=1.0,
            cpu_s_since_progress=0.5,
            lease_lost_s=None,
            back_in_round=False,
            quarantine=None,
            draining=False,
            is_gone=verdict == "gone",
            has_stopped=False,
        ),
        phase="train",
        draining=False,
        cpu_model="A CPU",
        isa="AVX2",
        threads=8,
        heartbeat_at=NOW,
        heartbeat_s=5.0,
        task_id=f"t-{name}",
        tokens_done=500,
        num_tokens=1000,
        claimed_at=NOW - 50.0,
        predicted_s=100.0,
        tokens_per_s=10.0,
        calibrated_tokens_per_s=12.0,
        tokens_accepted=2000,
        tasks_done=2,
        tasks_failed=0,
        books=BooksView(
            spread=0.1, duration_ratio=1.0, duration_alarm=None, tally=TALLY
        ),
    )


def evaluation(version: int, bits: float) -> EvaluationPoint:
    return EvaluationPoint(
        version=version, tokens_total=1000, loss=bits * 0.7, bits_per_byte=bits
    )


def version(number: int) -> VersionPoint:
    return VersionPoint(
        version=number,
        at=NOW,
        tokens_total=1000 * number,
        num_submissions=2,
        train_loss=3.0 / number,
        tokens_per_s=20.0,
    )


def ternary() -> TernaryView:
    """Return the health of twelve layers."""
    names = ("q", "k", "v", "o", "gate", "up", "down")
    return TernaryView(
        version=2,
        before=1,
        matrices=[
            MatrixHealth(
                name=f"layers.{layer}.{name}",
                zeros=0.31 + 0.001 * layer,
                scale=0.02,
                flips=0.01 * (row + 1),
                drift=-0.001 * layer,
            )
            for layer in range(12)
            for row, name in enumerate(names)
        ],
    )


PACE = "Overhead 3 s of 100 s = 3 %. Fixed."
TRAINS = (
    "Learning rate 0.00147 (peak 0.002), first stage until 3 000 tokens. "
    "Weight decay 0.1. Local steps by Muon. "
    "Sent up: weight differences, int8; down: whole versions. "
    "Last round: 1 000 tokens, 40 local steps of its middle worker, 2.6 MB up."
)


def training() -> TrainingView:
    return TrainingView(
        round_kind="delta",
        aggregation="rounds",
        local_optimiser="muon",
        learning_rate=0.0014666,
        peak_rate=0.002,
        stage="first stage",
        stage_end_tokens=3000,
        second_stage_tokens=3000,
        constant_reason=None,
        weight_decay=0.1,
        codec="int8",
        broadcast="exact",
        last_round=LastRoundView(tokens=1000, payload_bytes=2_600_000, num_steps=40),
    )


def fleet() -> FleetView:
    eta = EtaView(at=NOW + 60, earliest_at=NOW + 50, latest_at=NOW + 90, reason="Soon.")
    return FleetView(
        package_version="0.1.0",
        insecure_http=False,
        missing=None,
        run=RunView(
            run_id="r1",
            state="running",
            preset="tiny",
            num_params=1,
            started_at=NOW - 60,
            stop_at=None,
            token_budget=10_000,
            tokens_accepted=4000,
            epoch=1,
            epoch_tokens=10_000,
            epoch_tokens_accepted=4000,
            newest_version=2,
            newest_version_at=NOW,
            best_version=2,
            gzip_bits_per_byte=2.5,
            tokens_per_s=20.0,
            eta=eta,
            tally=TALLY,
            loss_alarm=None,
            rollback=None,
            plan_changes=[],
            reset_from_version=None,
        ),
        training=training(),
        round=RoundView(
            round_id=2,
            base_version=2,
            state="open",
            opened_at=NOW - 50,
            first_claim_at=NOW - 50,
            round_s=100.0,
            round_reason=PACE,
            overhead_s=3.0,
            lanes=[
                LaneView(
                    worker_id="w-birch",
                    task_id="t-birch",
                    num_tokens=1000,
                    tokens_done=500,
                    claimed_at=NOW - 50,
                    predicted_s=100.0,
                    ended_at=None,
                    outcome=None,
                )
            ],
        ),
        tasks=TasksView(
            pending=0,
            leased=2,
            done=4,
            failed=0,
            soft_expired=0,
            stuck=0,
            range_tokens=5000,
            latest_failed=[],
        ),
        workers=[worker("alder", "computing"), worker("birch", "computing")],
        ternary=ternary(),
        server=ServerView(loop_lag_ms=1.0),
        versions=[version(1), version(2)],
        evaluations=[evaluation(1, 6.0), evaluation(2, 5.0)],
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    with page_server(tmp_path) as server:
        shutil.rmtree(tmp_path / "webui")
        shutil.copytree(WEBUI, tmp_path / "webui")

        async def take_snapshot() -> FleetView:
            return server.view

        server.view = fleet()
        server.take_snapshot = take_snapshot
        yield server


def publish(server: PageServer, kind: str, body: object, count: int = 1) -> None:
    def act() -> None:
        for _ in range(count):
            server.hub.publish(kind, body, server.clock.now())

    server.call(act)


def text(selector: str) -> str:
    return f"(document.querySelector('{selector}')?.textContent ?? '')"


async def switch_theme(page: Page) -> None:
    colour = "getComputedStyle(document.body).color"
    before = await page.run(colour)
    await page.run("dispatchEvent(new KeyboardEvent('keydown', {key: 't'}))")
    assert await page.run(colour) != before


async def shown(page: Page, selector: str) -> str:
    """Return the words of an element, with common spaces."""
    words = await page.run(text(selector))
    return words.replace("\xa0", " ").replace("\u2009", " ")


async def see_ternary_health(page: Page) -> None:
    words = await shown(page, ".ternary")
    for said in ("31.0 % to 32.1 %", "most in layer 12, down", "1.00 % to 7.00 %"):
        assert said in words
    assert await page.run("document.querySelectorAll('.heat i').length") == 3 * 12 * 7


async def see_the_second_stage_begin(server: PageServer, page: Page) -> None:
    said = "ariaLabel.includes('Second stage from v3 on.')"
    await page.until(f"document.querySelector('.chart').{said}")
    later = msgspec.structs.replace(
        training(), stage="second stage", stage_end_tokens=10_000, weight_decay=0.0
    )
    publish(server, "fleet.updated", FleetUpdate(training=later))
    await page.until(f"{text('.loss .key')}.includes('second stage until')")
    words = await shown(page, ".loss .key")
    assert "second stage until 10.0 k tokens. Weight decay 0. Local" in words


async def see_that_the_run_goes_back(server: PageServer, page: Page) -> None:
    rollback = RollbackView(
        version=None, at=None, from_version=3, from_loss=4.0, to_version=2, to_loss=3.5
    )
    run = msgspec.structs.replace(fleet().run, rollback=rollback)
    publish(server, "fleet.updated", FleetUpdate(run=run))
    await page.until(f"{text('.banner')}?.includes('The run goes back to v2.')")
    again = msgspec.structs.replace(version(4), train_loss=None, rolled_back_to=2)
    publish(server, "version.published", again)
    chart = "document.querySelector('.chart')"
    await page.until(f"{chart}.ariaLabel.includes('The run went from v3 back to v2.')")
    right = "new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true})"
    # The curves follow the words some frames later: until then there is no v4 to show.
    tip = f"{text('.tip')}?.includes('from v3 back to v2')"
    await page.until(f"{chart}.dispatchEvent({right}) && {tip}")


def test_the_page_shows_a_snapshot_follows_events_and_recovers(server, tmp_path):
    async def watch() -> None:
        async with chromium_page(tmp_path / "profile") as page:
            await log_in(page, server.port, PASSWORD)
            assert await page.run("document.title") == "tiny"
            await page.until(f"{text('.answer')}.includes('5.000 bits per byte')")
            await page.until(f"{text('.live')}.includes('Live')")
            await page.until("document.querySelector('.chart canvas')")
            assert await page.run(text(".why")) == "<b>not markup</b>"
            assert PACE in await page.run(text(".round .key"))
            assert await shown(page, ".loss .key") == TRAINS
            await see_ternary_health(page)

            await follow_events(page)
            await recover_from_a_lost_backlog(page)
            await switch_theme(page)
            assert page.errors == []

            await end_the_session(page)

    async def follow_events(page: Page) -> None:
        publish(server, "version.published", version(3))
        publish(server, "version.evaluated", evaluation(3, 4.0))
        lost = FleetUpdate(workers=[worker("birch", "lost")])
        publish(server, "fleet.updated", lost)

        await page.until(f"{text('.answer')}.includes('4.000 bits per byte')")
        await page.until("document.title === '1 lost: tiny'")
        await page.until(f"{text('.workers .verdict')}.includes('Lost')")
        assert "Worker birch is lost." in await page.run(text("#news"))
        await see_the_second_stage_begin(server, page)
        await see_that_the_run_goes_back(server, page)

    async def recover_from_a_lost_backlog(page: Page) -> None:
        server.view = msgspec.structs.replace(server.view, package_version="9.9.9")

        # In one go, so that the socket can't send any of them in between.
        publish(server, "fleet.updated", FleetUpdate(), count=BACKLOG_MESSAGES + 1)

        await page.until(f"{text('.foot')}.includes('9.9.9')")
        await page.until("document.title === 'tiny'")

    async def end_the_session(page: Page) -> None:
        server.store.write_now(lambda connection: connection.execute(sessions.delete()))
        server.call(server.feed.clients.recheck)

        await page.until("location.pathname === '/login'")
        assert await page.run("location.search") == "?next=%2Fadmin%2Fdashboard"

    asyncio.run(watch())


def test_who_is_stuck_is_news_and_who_is_gone_leaves_the_table(server, tmp_path):
    async def watch() -> None:
        async with chromium_page(tmp_path / "profile") as page:
            await log_in(page, server.port, PASSWORD)
            await page.until("document.querySelector('.workers tbody tr')")
            stuck = FleetUpdate(workers=[worker("birch", "stuck")])
            publish(server, "fleet.updated", stuck)
            await page.until("document.title === '1 stuck: tiny'")
            assert "Worker birch is stuck." in await page.run(text("#news"))
            assert "CPU s" in await page.run("document.querySelector('.why').title")

            gone = FleetUpdate(workers=[worker("birch", "gone")])
            publish(server, "fleet.updated", gone)
            rows = "document.querySelectorAll('.workers tbody tr').length"
            await page.until(f"{rows} === 1")
            assert "1 gone" in await page.run(text(".tally.gone"))
            assert page.errors == []

    asyncio.run(watch())


def test_no_width_scrolls_sideways_and_log_out_is_in_reach(server, tmp_path):
    async def look() -> None:
        async with chromium_page(tmp_path / "profile") as page:
            await log_in(page, server.port, PASSWORD)
            await page.until("document.querySelector('.chart canvas')")
            for width in (390, 720, 1100, 1280, 1440):
                await page.call(
                    "Emulation.setDeviceMetricsOverride",
                    width=width,
                    height=900,
                    deviceScaleFactor=1,
                    mobile=False,
                )
                await page.until(f"innerWidth === {width}")
                # The chart follows the new width some frames later.
                await page.until(
                    "document.documentElement.scrollWidth"
                    " <= document.documentElement.clientWidth"
                )

            await page.run("document.querySelector('.top form button').click()")
            await page.until("document.querySelector('#password')")

    asyncio.run(look())
