"""`/health` for anybody; `/ready`, `/status` and `/metrics` for those who may read."""

from __future__ import annotations

from typing import Any

from tornado.web import RequestHandler

from coordinator.api.base import Api, ApiHandler, StatusHandler
from coordinator.service.view import FleetView


class HealthHandler(ApiHandler):
    """`GET /health`: alive, and nothing else."""

    async def prepare(self) -> None:
        """Let everybody in."""

    async def get(self) -> None:
        """Answer a constant."""
        self.answer({"status": "alive"})


class ReadyHandler(StatusHandler):
    """`GET /ready`: whether workers can get work."""

    async def get(self) -> None:
        """Answer 200 when there is a run, 503 with what is missing before."""
        view = await self.api.feed.snapshot()
        if view.run is None:
            self.answer({"ready": False, "missing": view.missing}, status=503)
            return
        self.answer({"ready": True, "missing": view.missing})


class FleetHandler(StatusHandler):
    """`GET /status`: the view of the page as JSON."""

    async def get(self) -> None:
        """Answer with everything, history included."""
        self.answer(await self.api.feed.snapshot())


class MetricsHandler(StatusHandler):
    """`GET /metrics`: Prometheus text."""

    async def get(self) -> None:
        """Answer with one line for each figure."""
        view = await self.api.feed.snapshot()
        self.set_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.finish(metrics_text(view, worst_lag_s=self.api.lag.worst_ever_s))


def metrics_text(view: FleetView, *, worst_lag_s: float) -> str:
    """Return the figures in the Prometheus text format."""
    figures: list[tuple[str, str, float]] = [
        ("fleet_loop_lag_seconds", "gauge", view.server.loop_lag_ms / 1000.0),
        ("fleet_loop_lag_worst_seconds", "gauge", worst_lag_s),
        ("fleet_workers_registered", "gauge", len(view.workers)),
    ]
    if view.run is not None:
        figures += [
            ("fleet_tokens_accepted_total", "counter", view.run.tokens_accepted),
            ("fleet_version_newest", "gauge", view.run.newest_version),
            ("fleet_tokens_per_second", "gauge", view.run.tokens_per_s or 0.0),
        ]
    if view.tasks is not None:
        figures += [
            (f"fleet_tasks_{state}", "gauge", getattr(view.tasks, state))
            for state in ("pending", "leased", "done", "failed")
        ]
    if view.evaluations:
        newest = view.evaluations[-1]
        figures.append(("fleet_heldout_loss_nats", "gauge", newest.loss))
        figures.append(("fleet_heldout_bits_per_byte", "gauge", newest.bits_per_byte))
    return "".join(
        f"# TYPE {name} {kind}\n{name} {value}\n" for name, kind, value in figures
    )


def status_routes(api: Api) -> list[tuple[str, type[RequestHandler], dict[str, Any]]]:
    """Return the rows of the route table."""
    with_api = {"api": api}
    return [
        (r"/health", HealthHandler, with_api),
        (r"/ready", ReadyHandler, with_api),
        (r"/status", FleetHandler, with_api),
        (r"/metrics", MetricsHandler, with_api),
    ]
