"""A headless Chromium with one page, driven over its own debugging protocol.

Every wait has a time-out. Nothing is installed for this: it needs `chromium` on the
path and talks to it with Tornado's websocket client.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tornado.httpclient import AsyncHTTPClient
from tornado.websocket import WebSocketClientConnection, websocket_connect

TIMEOUT_S = 20.0
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--remote-debugging-port=0",
]


class PageLeft(Exception):
    """The page went away, or is not there yet, while it was asked something."""


class Page:
    """The one tab of a browser; `errors` collects what its console complained about."""

    def __init__(self, connection: WebSocketClientConnection) -> None:
        self._connection = connection
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.errors: list[str] = []
        self.reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while (text := await self._connection.read_message()) is not None:
            message = json.loads(text)
            if "id" in message:
                self._answers.pop(message["id"]).set_result(message)
            else:
                self._note(message.get("method"), message.get("params", {}))

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(
                f"{params['entry']['text']} {params['entry'].get('url')}"
            )

    async def call(
        self, method: str, timeout_s: float = TIMEOUT_S, **params: Any
    ) -> dict[str, Any]:
        """Send one command and return its result."""
        number = next(self._ids)
        answer = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        message = {"id": number, "method": method, "params": params}
        await self._connection.write_message(json.dumps(message))
        async with asyncio.timeout(timeout_s):
            got = await answer
        if "error" in got:
            raise PageLeft(got["error"]["message"])
        return got["result"]

    async def run(self, script: str, timeout_s: float = TIMEOUT_S) -> Any:
        """Return the value of a script; a promise is waited for."""
        got = await self.call(
            "Runtime.evaluate",
            timeout_s,
            expression=script,
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    async def until(self, script: str, timeout_s: float = TIMEOUT_S) -> None:
        """Return once a script gives something true, also on a page yet to come."""
        look = f"""new Promise((done) => {{
            const look = () => ({script}) ? done() : setTimeout(look, 20);
            look();
        }})"""
        async with asyncio.timeout(timeout_s):
            while True:
                with contextlib.suppress(PageLeft):
                    await self.run(look, timeout_s)
                    return

    async def open(self, address: str) -> None:
        """Go to an address; the next `until` waits for what is there."""
        await self.call("Page.navigate", url=address)


@contextlib.asynccontextmanager
async def chromium_page(folder: Path) -> AsyncIterator[Page]:
    """Run a browser with its profile in `folder` as long as the block runs."""
    assert BROWSER is not None
    process = await asyncio.create_subprocess_exec(
        BROWSER,
        *_FLAGS,
        f"--user-data-dir={folder}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        connection = await websocket_connect(await _tab_address(process))
        page = Page(connection)
        for domain in ("Page", "Runtime", "Log"):
            await page.call(f"{domain}.enable")
        yield page
        connection.close()
        await page.reader
    finally:
        process.kill()
        await process.wait()


async def log_in(page: Page, port: int, password: str) -> None:
    """Open the dashboard of a server on loopback, through its login page."""
    await page.open(f"http://127.0.0.1:{port}/admin/dashboard")
    await page.until("document.querySelector('#password')")
    await page.run(
        f"document.querySelector('#password').value = '{password}';"
        "document.querySelector('form').submit()"
    )
    await page.until("document.querySelector('.workers tbody tr')")


async def _tab_address(process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(TIMEOUT_S):
        while not (match := re.search(rb"ws://([^/]+)/", line := await _line(process))):
            assert line, "chromium ended without naming its debugging port"
    host = match[1].decode()
    answer = await AsyncHTTPClient().fetch(f"http://{host}/json/list")
    (tab,) = [tab for tab in json.loads(answer.body) if tab["type"] == "page"]
    return str(tab["webSocketDebuggerUrl"])


async def _line(process: asyncio.subprocess.Process) -> bytes:
    assert process.stderr is not None
    return await process.stderr.readline()
