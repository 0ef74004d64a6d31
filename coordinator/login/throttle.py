"""Slows down guessing: ten tries at the password in fifteen minutes per address.

It is a window, not a lock. Who shares the operator's address, as through a tunnel, can
still take each try that becomes free.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict, deque
from typing import Final

MAX_TRIES: Final = 10
WINDOW_S: Final = 15 * 60.0
#: Addresses remembered at most; the one that tried longest ago goes first.
MAX_ADDRESSES: Final = 10_000


class LoginThrottle:
    """The recent tries of each address. Times are monotonic seconds, passed in."""

    def __init__(self) -> None:
        self._tries: OrderedDict[str, deque[float]] = OrderedDict()

    def take_try(self, address: str, at: float) -> float:
        """Count a try before it is looked at, so that parallel ones count too.

        Returns 0 when the try may go on; otherwise nothing is counted and the
        seconds until the next one may are returned.
        """
        key = _network(address)
        recent = self._tries.setdefault(key, deque(maxlen=MAX_TRIES))
        self._tries.move_to_end(key)
        if len(self._tries) > MAX_ADDRESSES:
            self._tries.popitem(last=False)
        if len(recent) == MAX_TRIES and at < recent[0] + WINDOW_S:
            return recent[0] + WINDOW_S - at
        recent.append(at)
        return 0.0

    def forgive(self, address: str) -> None:
        """Forget the tries of an address that has given the right password."""
        self._tries.pop(_network(address), None)


def _network(address: str) -> str:
    """Return what one household has: an IPv4 address, or the first 64 bits of IPv6."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address  # a unix socket has no address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
