"""The rules of the system that this one replaces, for the figure next to ours.

Tasks are sized by a synthetic calibration, for 600 s. A lease is 1.5 times what the
last eight accepted tasks of the last half hour predict, plus a minute; without any,
twice the 600 s. No heartbeat renews it, and what comes after its end is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np

TARGET_S: Final = 600.0
#: Calibrated over real tokens per second: 4,750 next to about 30.
TOO_HOPEFUL: Final = 160.0
JITTER: Final = 0.10
WINDOW_S: Final = 1800.0
WINDOW_TASKS: Final = 8


def lease_s(num_tokens: float, accepted: Sequence[tuple[float, float]]) -> float:
    """Return how long a lease lasts; `accepted` holds (tokens, seconds) of tasks."""
    if not accepted:
        return max(60.0, 2.0 * TARGET_S)
    tokens, seconds = (sum(column) for column in zip(*accepted, strict=True))
    return max(60.0, num_tokens / (tokens / seconds) * 1.5 + 60.0)


def expired_share(
    speeds: Sequence[float], *, hours: float, too_hopeful: float, seed: int
) -> float:
    """Return the share of leases that end before their work; each worker `hours`."""
    rng = np.random.default_rng(seed)
    num_leases = num_expired = 0
    for speed in speeds:
        now, accepted = 0.0, deque[tuple[float, float, float]](maxlen=WINDOW_TASKS)
        num_tokens = TARGET_S * too_hopeful * speed
        while now < hours * 3600.0:
            known = [(n, s) for at, n, s in accepted if now - at < WINDOW_S]
            granted_s = lease_s(num_tokens, known)
            needed_s = num_tokens / speed * max(0.5, rng.normal(1.0, JITTER))
            num_leases += 1
            now += needed_s  # a worker learns nothing before it submits
            if needed_s > granted_s:
                num_expired += 1
            else:
                accepted.append((now, num_tokens, needed_s))
    return num_expired / num_leases
