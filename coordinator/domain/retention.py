"""Which versions keep their blobs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

#: Every version with a number divisible by this is kept for good.
MILESTONE: Final = 100


def versions_to_prune(
    kept: Sequence[int], *, newest: int, pinned: Collection[int], keep_last: int
) -> list[int]:
    """Return the versions that lose both blobs, oldest first.

    `kept` are those that still have them; `pinned` are in use: leased, waiting for
    an evaluation, the best, what the run may go back to, what the next scored one is
    compared with, the root of a live round.
    """
    return sorted(
        version
        for version in kept
        if version <= newest - keep_last
        and version % MILESTONE
        and version not in pinned
    )
