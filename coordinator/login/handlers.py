"""The pages over HTTP: login, logout, dashboard, static files.

Every answer carries the security headers, and every request is first checked for
its Host header and, where it changes something, for its XSRF token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from tornado.web import RequestHandler, StaticFileHandler

from coordinator.login.door import Door
from coordinator.login.hosts import refuse_foreign_host
from coordinator.login.sessions import Operator

HOME_PATH: Final = "/admin/dashboard"
STATIC_FOLDERS: Final = ("css", "js", "vendor")
_PAGE_PATH: Final = re.compile(r"/admin(?:/[a-z0-9-]+)+", re.ASCII)
_SAFE_METHODS: Final = ("GET", "HEAD", "OPTIONS")

#: 'self' in connect-src covers the websocket of the same host and port (CSP 3;
#: Chromium 71, Safari 16, Firefox), so no host name needs to be written here.
CSP: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "font-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
SECURITY_HEADERS: Final = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What the pages work with."""

    door: Door
    #: Names by which this server may be asked for besides loopback, lower case.
    allowed_hosts: frozenset[str]
    #: Holds the templates, and css/, js/ and vendor/ for everybody to read.
    webui_folder: Path


class PageHandler(RequestHandler):
    """What every page has in common."""

    # Tornado makes handlers through initialize(), not through a constructor.
    def initialize(self, site: Site) -> None:
        """Take the collaborators of the route."""
        self.site = site

    def set_default_headers(self) -> None:
        """Set the security headers, on errors too."""
        _set_security_headers(self)
        self.set_header("Cache-Control", "no-store")

    async def prepare(self) -> None:
        """Refuse a foreign host, then a change without the token of our own form.

        Raises HTTPError 400, 421 or 403.
        """
        refuse_foreign_host(self.request, self.site.allowed_hosts)
        # Here and not by the application's `xsrf_cookies`, which would ask the
        # workers for the token as well, and before the host is checked.
        if self.request.method not in _SAFE_METHODS:
            self.check_xsrf_cookie()

    def get_template_path(self) -> str:
        """Return the folder of the templates."""
        return str(self.site.webui_folder)


class AdminPage(PageHandler):
    """A page for operators; everybody else is sent to the login."""

    #: Set before get() or post() runs.
    operator: Operator

    async def prepare(self) -> None:
        """Find out who asks; a stranger is sent to the login and back afterwards."""
        await super().prepare()
        operator = await self.site.door.current_operator(self)
        if operator is None:
            self.redirect(f"/login?next={quote(self.request.path)}")
            return
        self.operator = operator


class HomeHandler(PageHandler):
    """`/` leads to the dashboard."""

    def get(self) -> None:
        """Answer 302."""
        self.redirect(HOME_PATH)


class LoginHandler(PageHandler):
    """`/login`: the form, and what it sends."""

    async def get(self) -> None:
        """Show the form; an operator who is in already goes straight on."""
        next_path = local_path(self.get_query_argument("next", HOME_PATH))
        if await self.site.door.current_operator(self) is not None:
            self.redirect(next_path)
            return
        self._show_form(next_path, error="")

    async def post(self) -> None:
        """Answer 303 with a session, 403 for a wrong password, 429 for too many."""
        next_path = local_path(self.get_body_argument("next", HOME_PATH))
        password = self.get_body_argument("password", "", strip=False)
        refused = await self.site.door.log_in(self, password)
        if refused is None:
            self.redirect(next_path, status=303)
            return
        message = refused.message
        self.set_status(403)
        if refused.retry_after_s is not None:
            wait_s = math.ceil(refused.retry_after_s)
            self.set_status(429)
            self.set_header("Retry-After", str(wait_s))
            message = f"{message} Try again in {wait_s} s."
        self._show_form(next_path, error=message)

    def _show_form(self, next_path: str, error: str) -> None:
        self.render(
            "login.html", xsrf=self.xsrf_token, error=error, next_path=next_path
        )


class LogoutHandler(PageHandler):
    """`/logout`: ends the session."""

    async def post(self) -> None:
        """Answer 303 to the login, whoever asks."""
        await self.site.door.log_out(self)
        self.redirect("/login", status=303)


class DashboardHandler(AdminPage):
    """`/admin/dashboard`: the page; its numbers come over the websocket."""

    def get(self) -> None:
        """Answer with the page."""
        self.render("dashboard.html", xsrf=self.xsrf_token)


class StaticFiles(StaticFileHandler):
    """Scripts, styles and vendored libraries: the same for everybody."""

    def initialize(self, site: Site, folder: str) -> None:  # type: ignore[override]
        """Take the collaborators of the route; nothing outside `folder` is served."""
        super().initialize(path=str(site.webui_folder / folder))
        self._site = site

    def set_default_headers(self) -> None:
        """Set the security headers, on errors too."""
        _set_security_headers(self)

    def prepare(self) -> None:
        """Refuse a foreign host. Raises HTTPError 400 or 421."""
        refuse_foreign_host(self.request, self._site.allowed_hosts)

    def set_extra_headers(self, path: str) -> None:
        """Let the browser ask each time whether the file has changed."""
        self.set_header("Cache-Control", "no-cache")


def local_path(wished: str) -> str:
    """Return where to go after the login: the wish when it is a page of ours.

    Anything else, such as another site, becomes the dashboard.
    """
    return wished if _PAGE_PATH.fullmatch(wished) else HOME_PATH


def page_routes(site: Site) -> Sequence[tuple[str, type[RequestHandler], Any]]:
    """Return the rows of the route table."""
    with_site = {"site": site}
    return [
        (r"/", HomeHandler, with_site),
        (r"/login", LoginHandler, with_site),
        (r"/logout", LogoutHandler, with_site),
        (HOME_PATH, DashboardHandler, with_site),
        *(
            (rf"/static/{folder}/(.+)", StaticFiles, {"site": site, "folder": folder})
            for folder in STATIC_FOLDERS
        ),
    ]


def page_settings(*, secure: bool) -> dict[str, Any]:
    """Return the settings that the Tornado application needs for these pages."""
    return {
        "cross_origin_protection": True,
        "xsrf_cookie_name": "__Host-bitnet_xsrf" if secure else "bitnet_xsrf",
        "xsrf_cookie_kwargs": {
            "httponly": True,
            "secure": secure,
            "samesite": "Lax",
        },
    }


def _set_security_headers(handler: RequestHandler) -> None:
    handler.clear_header("Server")
    for name, value in SECURITY_HEADERS.items():
        handler.set_header(name, value)
