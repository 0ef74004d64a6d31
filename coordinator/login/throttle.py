"""Slows down guessing: after five quick tries at the password, one every three seconds.

A try that comes too early waits for its turn, a few seconds at most, and is looked at
then. So guesses never lock out the operator who shares their address, as everybody
does through a tunnel.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from typing import Final

#: Tries that need not wait, where the address has been quiet.
FREE_TRIES: Final = 5
INTERVAL_S: Final = 3.0
#: With a longer wait than this a try is refused: as many as fit wait at one time.
MAX_WAIT_S: Final = 15.0
#: Addresses remembered at most; the one that tried longest ago goes first.
MAX_ADDRESSES: Final = 10_000


class LoginThrottle:
    """When each address may try next. Times are monotonic seconds, passed in."""

    def __init__(self) -> None:
        #: When an address has all its free tries again.
        self._quiet_at: OrderedDict[str, float] = OrderedDict()

    def take_turn(self, address: str, at: float) -> float | None:
        """Return the seconds that a try has to wait until it is looked at.

        None where too many wait already; such a try takes no turn.
        """
        key = _network(address)
        quiet_at = max(self._quiet_at.get(key, at), at)
        wait_s = max(0.0, quiet_at - at - (FREE_TRIES - 1) * INTERVAL_S)
        if wait_s > MAX_WAIT_S:
            return None
        self._quiet_at[key] = quiet_at + INTERVAL_S
        self._quiet_at.move_to_end(key)
        if len(self._quiet_at) > MAX_ADDRESSES:
            self._quiet_at.popitem(last=False)
        return wait_s

    def forgive(self, address: str) -> None:
        """Forget the tries of an address that has given the right password."""
        self._quiet_at.pop(_network(address), None)


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
