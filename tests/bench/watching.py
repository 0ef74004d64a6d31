"""Who watches a coordinator under load: one open dashboard, one scrape of /metrics."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlencode

from tornado.httpclient import HTTPRequest
from tornado.websocket import websocket_connect

from tests.bench.talk import Connection

SCRAPE_S: Final = 15.0
_LAG: Final = "fleet_loop_lag_worst_seconds "


@dataclass(slots=True)
class Seen:
    """What watchers were sent; moments in Unix seconds."""

    #: When each message of the websocket came, and its bytes.
    messages: list[tuple[float, int]] = field(default_factory=list)
    #: When each scrape was sent, and seconds until it was answered.
    scrapes: list[tuple[float, float]] = field(default_factory=list)
    #: The worst lag of the event loop since the coordinator began, in seconds.
    lag_s: float = 0.0


async def watch(port: int, password: str, seen: Seen) -> None:
    """Log in, open the websocket, and read it until cancelled."""
    cookies = await _log_in(port, password)
    host = f"127.0.0.1:{port}"
    headers = {"Origin": f"http://{host}", "Cookie": cookies}
    socket = await websocket_connect(HTTPRequest(f"ws://{host}/ws", headers=headers))
    try:
        while (message := await socket.read_message()) is not None:
            seen.messages.append((time.time(), len(message.encode())))
    finally:
        socket.close()
    raise ConnectionError("the websocket of the dashboard was closed")


async def _log_in(port: int, password: str) -> str:
    """Return the cookies of a session."""
    connection = Connection(port)
    form = await connection.ask("GET", "/login")
    xsrf = form.headers["set-cookie"].partition(";")[0]
    fields = {"_xsrf": xsrf.partition("=")[2], "password": password}
    answer = await connection.ask(
        "POST",
        "/login",
        urlencode(fields).encode(),
        kind="application/x-www-form-urlencoded",
        more=f"Cookie: {xsrf}\r\n",
    )
    connection.close()
    if answer.status != 303:
        raise ConnectionError(f"the login answered {answer.status}")
    return f"{xsrf}; {answer.headers['set-cookie'].partition(';')[0]}"


async def scrape(port: int, key: str, seen: Seen) -> None:
    """Ask for the metrics again and again, until cancelled."""
    connection = Connection(port, **{"X-Api-Key": key})
    try:
        while True:
            sent_at = time.time()
            answer = await connection.ask("GET", "/metrics")
            seen.scrapes.append((sent_at, time.time() - sent_at))
            lines = answer.body.decode().splitlines()
            lags = [float(line[len(_LAG) :]) for line in lines if line.startswith(_LAG)]
            seen.lag_s = max([seen.lag_s, *lags])
            await asyncio.sleep(SCRAPE_S)
    finally:
        connection.close()
