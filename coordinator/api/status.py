"""`/health` for anybody; `/ready`, `/status` and `/metrics` for those who may read."""

from __future__ import annotations

from typing import Any

from tornado.web import RequestHandler

from coordinator.api.base import Api, ApiHandler, StatusHandler
from coordinator.api.metrics import metrics_text


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
        view = await self.api.feed.glance()
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
        view = await self.api.feed.glance()
        self.set_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.finish(metrics_text(view, worst_lag_s=self.api.lag.worst_ever_s))


def status_routes(api: Api) -> list[tuple[str, type[RequestHandler], dict[str, Any]]]:
    """Return the rows of the route table."""
    with_api = {"api": api}
    return [
        (r"/health", HealthHandler, with_api),
        (r"/ready", ReadyHandler, with_api),
        (r"/status", FleetHandler, with_api),
        (r"/metrics", MetricsHandler, with_api),
    ]
