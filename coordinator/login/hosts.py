"""Which Host headers name this server; a page of a foreign name is refused.

Without this, a web page could point its own name at this machine (DNS rebinding)
and then read the dashboard as if it were its own.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from typing import Final

from tornado.httputil import HTTPServerRequest
from tornado.web import HTTPError

_HOST: Final = re.compile(
    r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::[0-9]{1,5})?", re.IGNORECASE | re.ASCII
)


def host_allowed(host_header: str | None, allowed: Collection[str]) -> bool:
    """Tell whether a Host header names this server.

    Args:
        host_header: `name`, `name:port`, `[ipv6]` or `[ipv6]:port`; None when the
            request had none.
        allowed: further names, in lower case and without port; an IPv6 address
            without brackets. Loopback is always allowed, and every name at every
            port, because a tunnel may end at any.
    """
    match = _HOST.fullmatch(host_header or "")
    if match is None:
        return False
    name = match["name"].lower().strip("[]")
    return name == "localhost" or name in allowed or _is_loopback(name)


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def refuse_foreign_host(request: HTTPServerRequest, allowed: Collection[str]) -> None:
    """Raise HTTPError 400 without a Host header, 421 for one that is not ours.

    The first thing that a handler does in prepare().
    """
    # Not request.host, which invents a name for a request that brought none.
    host = request.headers.get("Host")
    if not host:
        raise HTTPError(400)
    if not host_allowed(host, allowed):
        raise HTTPError(421)
