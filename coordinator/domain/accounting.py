"""What becomes of trained tokens: every one of them has a fate, and only one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Fate(StrEnum):
    """What became of tokens that a worker trained."""

    ACCEPTED = "accepted"  #: handed in, and part of a round that is not closed yet
    APPLIED = "applied"  #: part of a version
    FILTERED = "filtered"  #: handed in and left out: by a guard, or a hard reset
    SILENT = "silent"  #: its worker was not heard of any more: a crash, or no network
    STUCK = "stuck"  #: heartbeats came, but showed no progress
    OVERDUE = "overdue"  #: past the hard limit
    LATE = "late"  #: its round went on without it
    RELEASED = "released"  #: its worker gave the task back
    KICKED = "kicked"  #: an operator took the task away, or put its worker away
    FAILED = "failed"  #: its worker reported that it can't do the task
    RESET = "reset"  #: it was out when a hard reset ended the run


#: What was trained for nothing.
WASTED: Final = tuple(
    fate for fate in Fate if fate not in (Fate.ACCEPTED, Fate.APPLIED)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Tokens trained, by what became of them."""

    trained: int
    accepted: int
    applied: int
    #: By cause, without those that are zero.
    wasted: Mapping[str, int]


def tally(tokens: Mapping[str, int]) -> Tally:
    """Return the tally of tokens by fate."""
    return Tally(
        trained=sum(tokens.values()),
        accepted=tokens.get(Fate.ACCEPTED, 0),
        applied=tokens.get(Fate.APPLIED, 0),
        wasted={fate: tokens[fate] for fate in WASTED if tokens.get(fate)},
    )


def fate_of_expired(
    *,
    expires_at: float,
    hard_at: float | None,
    heartbeat_at: float,
    ttl_s: float,
    now: float,
) -> Fate:
    """Return why a lease has run out by `now`; its worker was heard of last then."""
    if hard_at is not None and hard_at <= expires_at:
        return Fate.OVERDUE
    return Fate.STUCK if heartbeat_at + ttl_s > now else Fate.SILENT
