"""When a round stops waiting for work that is still out; pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

#: Once its quorum is back a round waits for the rest this share of its round time.
GRACE_SHARE: Final = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedWork:
    """One claim of a round, as far as it goes."""

    num_tokens: int
    #: When it came back or was given up; None while it is out.
    ended_at: float | None
    #: Whether a submission was accepted.
    is_back: bool
    #: Whether its worker was never measured: no size could suit it.
    is_probe: bool


def stops_waiting_at(
    claimed: Sequence[ClaimedWork], *, quorum: float, round_s: float
) -> float | None:
    """Return when a round goes on without what is out; None: not as things are.

    The grace period begins when `quorum` of all tokens claimed is back; a quorum of 1
    waits for everything. A probe is always waited for: a slow worker would otherwise
    be left out, never be measured, and be left out again.
    """
    if quorum >= 1.0 or any(c.is_probe and c.ended_at is None for c in claimed):
        return None
    due = quorum * sum(claim.num_tokens for claim in claimed)
    backs = sorted(
        (claim.ended_at, claim.num_tokens)
        for claim in claimed
        if claim.is_back and claim.ended_at is not None
    )
    num_back = 0
    for ended_at, num_tokens in backs:
        num_back += num_tokens
        if num_back >= due:
            probes = [c.ended_at for c in claimed if c.is_probe and c.ended_at]
            return max([ended_at + GRACE_SHARE * round_s, *probes])
    return None
