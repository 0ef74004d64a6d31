"""When will it be done: a guess with its window, or an honest reason why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Eta:
    """A moment with the earliest and latest likely one; None with a reason."""

    at: float | None
    earliest_at: float | None
    latest_at: float | None
    reason: str


def _unknown(reason: str) -> Eta:
    return Eta(at=None, earliest_at=None, latest_at=None, reason=reason)


def estimate(
    *,
    now: float,
    tokens_left: int | None,
    stop_at: float | None,
    rates: Sequence[float],
) -> Eta:
    """Return when the run ends by tokens or by time, whichever comes first.

    `rates` are recent tokens per second, oldest first; their spread is the window.
    """
    moving = sorted(rate for rate in rates if rate > 0)
    if tokens_left is None or not moving:
        if stop_at is not None:
            return Eta(
                at=stop_at,
                earliest_at=stop_at,
                latest_at=stop_at,
                reason="Stops at a set time.",
            )
        return _unknown(
            "No token budget is set." if moving else "Needs one measured round."
        )
    slow = moving[len(moving) // 10]
    middle = moving[len(moving) // 2]
    fast = moving[-1 - len(moving) // 10]
    due = [now + tokens_left / rate for rate in (middle, fast, slow)]
    if stop_at is not None and stop_at < due[0]:
        return Eta(
            at=stop_at,
            earliest_at=min(due[1], stop_at),
            latest_at=stop_at,
            reason="Stops at a set time, before the token budget is used up.",
        )
    return Eta(
        at=due[0],
        earliest_at=due[1],
        latest_at=due[2],
        reason=f"{tokens_left} tokens left at {middle:.0f} tokens/s.",
    )
