"""When will it be done: a guess with its window, or an honest reason why not.

The guess goes by the last rounds, so its window is as long as rounds are. Where they
say too little, or things that no longer hold, there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

#: Rounds that the guess is made from: at least, and at most.
MIN_ROUNDS: Final = 5
NUM_ROUNDS: Final = 20
#: Twenty in each of as many windows tell enough, however short these are.
MANY_ARRIVALS: Final = 400
#: The speed of the fleet has changed where the newer half of these differs so much.
MOST_CHANGE: Final = 1.5
#: No guess where a fast round is so many times as fast as a slow one ...
MOST_SPREAD: Final = 4.0
#: ... or none was closed for so many usual rounds, and at least a minute.
MOST_SILENCE: Final = 5.0
MIN_SILENCE_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Eta:
    """A moment with the earliest and latest likely one; None with a reason."""

    at: float | None
    earliest_at: float | None
    latest_at: float | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """A round that became a version, at `at` (Unix seconds)."""

    at: float
    tokens: int
    #: Since its first claim.
    seconds: float

    @property
    def rate(self) -> float:
        """Return its tokens per second."""
        return self.tokens / max(self.seconds, 1e-3)


def windows(arrivals: Sequence[tuple[float, int]], seconds: float) -> list[Closed]:
    """Return what arrived, as if it had come in rounds of at least so many seconds.

    `arrivals` are (Unix seconds, tokens), oldest first; the first only begins the
    first window. From `MANY_ARRIVALS` on windows may be shorter, to be `NUM_ROUNDS`.
    """
    found: list[Closed] = []
    if not arrivals:
        return found
    began_at, sum_tokens = arrivals[0][0], 0
    if len(arrivals) >= MANY_ARRIVALS:
        seconds = min(seconds, (arrivals[-1][0] - began_at) / NUM_ROUNDS)
    for at, tokens in arrivals[1:]:
        sum_tokens += tokens
        # Without a token it says nothing: a version may be an earlier one again.
        if sum_tokens and at - began_at >= seconds:
            found.append(Closed(at=at, tokens=sum_tokens, seconds=at - began_at))
            began_at, sum_tokens = at, 0
    return found


def estimate(
    *,
    now: float,
    tokens_left: int | None,
    stop_at: float | None,
    rounds: Sequence[Closed],
    round_s: float,
) -> Eta:
    """Return when the run ends by tokens or by time, whichever comes first.

    `rounds` are the last ones, oldest first; the spread of their rates is the window.
    The open one has `round_s`, which may be more than they had.
    """
    if tokens_left is None:
        return _unknown("No token budget is set.", stop_at)
    window = _steady(rounds[-NUM_ROUNDS:])
    reason = _doubt(now, window, round_s)
    if reason is not None:
        return _unknown(reason, stop_at)
    slow, middle, fast = _rates(window)
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
        reason=f"{tokens_left} tokens left at {middle:.0f} tokens/s, by the last "
        f"{len(window)} rounds ({slow:.0f} to {fast:.0f}).",
    )


def _unknown(reason: str, stop_at: float | None) -> Eta:
    if stop_at is not None:
        reason = f"Stops at a set time. {reason}"
    return Eta(at=stop_at, earliest_at=stop_at, latest_at=stop_at, reason=reason)


def _steady(rounds: Sequence[Closed]) -> Sequence[Closed]:
    """Return the rounds since the speed of the fleet changed last, if it did."""
    while len(rounds) >= 2 * MIN_ROUNDS and _change(rounds) > MOST_CHANGE:
        rounds = rounds[len(rounds) // 2 :]
    return rounds


def _change(rounds: Sequence[Closed]) -> float:
    """Return how many times as fast one half of the rounds is as the other."""
    half = len(rounds) // 2
    before, after = (_rates(part)[1] for part in (rounds[:half], rounds[half:]))
    return max(before / after, after / before)


def _rates(rounds: Sequence[Closed]) -> tuple[float, float, float]:
    """Return the rates of a slow, the middle and a fast one of the rounds."""
    rates = sorted(one.rate for one in rounds)
    tenth = len(rates) // 10
    return rates[tenth], rates[len(rates) // 2], rates[-1 - tenth]


def _doubt(now: float, rounds: Sequence[Closed], round_s: float) -> str | None:
    """Return why these rounds do not tell when the run ends; None: they do."""
    if len(rounds) < MIN_ROUNDS:
        return f"Needs {MIN_ROUNDS} closed rounds, there are {len(rounds)}."
    usual_s = max(round_s, sorted(one.seconds for one in rounds)[len(rounds) // 2])
    silence_s = now - rounds[-1].at
    if silence_s > max(MIN_SILENCE_S, MOST_SILENCE * usual_s):
        return (
            f"No round was closed for {silence_s:.0f} s, and one takes {usual_s:.0f} s."
        )
    slow, _middle, fast = _rates(rounds)
    if _change(rounds) > MOST_CHANGE:
        half = len(rounds) // 2
        before, after = _rates(rounds[:half])[1], _rates(rounds[half:])[1]
        return (
            f"The fleet has changed: {before:.0f} tokens/s some rounds ago, "
            f"{after:.0f} in the last {len(rounds) - half}."
        )
    if fast > MOST_SPREAD * slow:
        return (
            f"The last {len(rounds)} rounds are too far apart: {slow:.0f} to "
            f"{fast:.0f} tokens/s."
        )
    return None
