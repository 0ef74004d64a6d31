"""Which points of a long run its charts get; pure arithmetic.

A run with a version each ten seconds has 60,000 after a week: a page that opens would
be sent 10 MB of them, and draws a thousand pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

#: All of the newest points, for figures that look back on a few ...
NUM_NEWEST: Final = 500
#: ... and of the older ones so many at most.
MOST_OLDER: Final = 2000

T = TypeVar("T")


def stride(num_points: int) -> int:
    """Return of how many older points one is shown.

    A power of two: what is shown of a longer run was shown before.
    """
    num_older = max(0, num_points - NUM_NEWEST)
    return 1 << (max(0, num_older - 1) // MOST_OLDER).bit_length()


def thinned(points: Sequence[T], keep: T | None) -> list[T]:
    """Return the newest points, one of each stride of the older ones, and `keep`."""
    every, all_from = stride(len(points)), len(points) - NUM_NEWEST
    return [
        point
        for place, point in enumerate(points)
        if place >= all_from or place % every == 0 or point is keep
    ]
