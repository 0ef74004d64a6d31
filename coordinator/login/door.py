"""The one door: who is this request from? Pages, websocket and API ask only here.

Today the answer comes from a password and a session cookie. Another way to log in
replaces this file and the login page, nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from tornado.web import RequestHandler

from coordinator.domain.seams import Clock, Rng
from coordinator.login.passwords import BusyError, PasswordChecker
from coordinator.login.sessions import (
    ABSOLUTE_S,
    Operator,
    begin_session,
    find_operator,
    forget_session,
)
from coordinator.login.throttle import INTERVAL_S, LoginThrottle
from coordinator.store.sessions import Database

log = logging.getLogger(__name__)

_ADMIN: Final = Operator("admin")


@dataclass(frozen=True, slots=True)
class LoginRefused:
    """Why nobody was let in."""

    message: str
    #: Seconds until another try is looked at; None when at once.
    retry_after_s: float | None = None


_TOO_MANY: Final = LoginRefused("Too many tries at once.", retry_after_s=INTERVAL_S)


class Door:
    """Lets operators in and out, and tells who is in."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        rng: Rng,
        *,
        secure: bool,
        mark: str,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._pause = pause
        self._db = db
        self._clock = clock
        self._rng = rng
        self._passwords = PasswordChecker(db)
        self._throttle = LoginThrottle()
        self._on_logout: list[Callable[[], None]] = []
        self.secure = secure
        # A browser takes a __Host- cookie only over https and only from this very
        # host, so nobody next door can plant one.
        prefix = "__Host-" if secure else ""
        # Cookies are kept by host, not by port: `mark` tells coordinators apart.
        self.cookie_name = f"{prefix}bitnet_session_{mark}"

    def on_logout(self, act: Callable[[], None]) -> None:
        """Call `act` whenever a session has just ended."""
        self._on_logout.append(act)

    async def current_operator(self, handler: RequestHandler) -> Operator | None:
        """Return who asks, and note the use of the session; None for a stranger."""
        return await self._find(handler, touch=True)

    async def watching_operator(self, handler: RequestHandler) -> Operator | None:
        """Do the same, without noting a use.

        For what a page does by itself: a dashboard left open is not somebody there.
        """
        return await self._find(handler, touch=False)

    async def _find(self, handler: RequestHandler, *, touch: bool) -> Operator | None:
        cookie = handler.get_cookie(self.cookie_name)
        return await find_operator(self._db, cookie, at=self._clock.wall(), touch=touch)

    async def log_in(
        self, handler: RequestHandler, password: str
    ) -> LoginRefused | None:
        """Check a password and set the session cookie; say why not otherwise.

        After a few quick tries from an address this waits for its turn.
        """
        address = str(handler.request.remote_ip)
        refused = await self._judge(address, password)
        if refused is not None:
            return refused
        self._throttle.forgive(address)
        cookie = await begin_session(
            self._db,
            _ADMIN,
            old_cookie=handler.get_cookie(self.cookie_name),
            at=self._clock.wall(),
            rng=self._rng,
        )
        handler.set_cookie(
            self.cookie_name,
            cookie,
            max_age=int(ABSOLUTE_S),
            httponly=True,
            secure=self.secure,
            samesite="Lax",
        )
        self._tell_logout()  # the session that the browser held before has ended
        log.info("logged in", extra={"event": "login.succeeded", "address": address})
        return None

    async def _judge(self, address: str, password: str) -> LoginRefused | None:
        wait_s = self._throttle.take_turn(address, self._clock.monotonic())
        if wait_s is None:
            return _TOO_MANY
        if wait_s > 0:
            await self._pause(wait_s)
        try:
            is_right = await self._passwords.is_right(password)
        except BusyError:
            return _TOO_MANY
        if is_right:
            return None
        log.warning(
            "wrong password", extra={"event": "login.failed", "address": address}
        )
        return LoginRefused("Wrong password.")

    async def log_out(self, handler: RequestHandler) -> None:
        """End the session of a request, here and in the browser."""
        await forget_session(self._db, handler.get_cookie(self.cookie_name))
        handler.clear_cookie(
            self.cookie_name, httponly=True, secure=self.secure, samesite="Lax"
        )
        self._tell_logout()

    def _tell_logout(self) -> None:
        for act in self._on_logout:
            act()
