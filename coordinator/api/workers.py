"""Routes by which a worker registers, claims, keeps and returns tasks."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from tornado.web import RequestHandler

from bitnet_ext.wire.messages import (
    ClaimRequest,
    EvaluationRequest,
    FailRequest,
    HeartbeatRequest,
    LogsRequest,
    RegisterRequest,
    ReleaseRequest,
)
from coordinator.api.base import MAX_LOGS_BYTES, Api, ApiHandler
from coordinator.service.claiming import claim
from coordinator.service.evaluating import take_evaluation
from coordinator.service.renewing import heartbeat
from coordinator.service.returning import fail, release
from coordinator.service.roster import register, take_logs

#: How long a claim waits for work before it is answered with none, in seconds.
LONG_POLL_S: Final = 5.0


class RegisterHandler(ApiHandler):
    """`POST /register`."""

    async def post(self) -> None:
        """Answer with what a worker needs before its first claim."""
        self.answer(await register(self.api.fleet, self.body(RegisterRequest)))


class WorkHandler(ApiHandler):
    """`POST /work`."""

    def initialize(self, api: Api) -> None:
        """Take the collaborators of the route."""
        super().initialize(api)
        self._gone = False

    async def post(self) -> None:
        """Answer with a task, or with 204 after a while without one."""
        request = self.body(ClaimRequest)
        fleet = self.api.fleet
        loop = asyncio.get_running_loop()
        until = loop.time() + LONG_POLL_S
        while not (self._gone or fleet.is_stopping):
            # Before the claim: what rings while it is looked for counts.
            bell = asyncio.ensure_future(fleet.work.wait(until - loop.time()))
            try:
                task = await claim(fleet, request)
                if task is not None:
                    self.answer(task)
                    return
                if not await bell:
                    break
            finally:
                bell.cancel()
        self._answer_none()

    def on_connection_close(self) -> None:
        """Take no task for a worker that has hung up."""
        self._gone = True

    def _answer_none(self) -> None:
        if not self._gone:
            self.set_status(204)
            self.set_header("Retry-After", "1")
            self.finish()


class HeartbeatHandler(ApiHandler):
    """`POST /heartbeat`."""

    async def post(self) -> None:
        """Answer with what is left of the lease."""
        self.answer(await heartbeat(self.api.fleet, self.body(HeartbeatRequest)))


class ReleaseHandler(ApiHandler):
    """`POST /tasks/{task_id}/release`."""

    async def post(self, task_id: str) -> None:
        """Take the task back."""
        self.answer(await release(self.api.fleet, task_id, self.body(ReleaseRequest)))


class FailHandler(ApiHandler):
    """`POST /tasks/{task_id}/fail`."""

    async def post(self, task_id: str) -> None:
        """Take the reason down."""
        self.answer(await fail(self.api.fleet, task_id, self.body(FailRequest)))


class EvaluationHandler(ApiHandler):
    """`POST /tasks/{task_id}/evaluation`."""

    async def post(self, task_id: str) -> None:
        """Take the score of a version."""
        self.answer(
            await take_evaluation(self.api.fleet, task_id, self.body(EvaluationRequest))
        )


class LogsHandler(ApiHandler):
    """`POST /logs`."""

    max_body_bytes = MAX_LOGS_BYTES

    async def post(self) -> None:
        """Keep the records; answer 204."""
        await take_logs(self.api.fleet, self.body(LogsRequest))
        self.set_status(204)
        self.finish()


def worker_routes(api: Api) -> list[tuple[str, type[RequestHandler], dict[str, Any]]]:
    """Return the rows of the route table."""
    with_api = {"api": api}
    return [
        (r"/register", RegisterHandler, with_api),
        (r"/work", WorkHandler, with_api),
        (r"/heartbeat", HeartbeatHandler, with_api),
        (r"/tasks/([^/]+)/release", ReleaseHandler, with_api),
        (r"/tasks/([^/]+)/fail", FailHandler, with_api),
        (r"/tasks/([^/]+)/evaluation", EvaluationHandler, with_api),
        (r"/logs", LogsHandler, with_api),
    ]
