"""What to call a worker, decided from measured facts, with the number that decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bitnet_ext.wire.verdicts import Verdict

#: Silence of this many heartbeats (and at least MIN_SILENCE_S) means lost.
SILENT_HEARTBEATS: Final = 6
MIN_SILENCE_S: Final = 30.0
#: Heartbeats without progress for this share of that mean stuck. Before its lease
#: ends, so that the word is there to be seen.
STUCK_SHARE: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """All that a verdict is drawn from."""

    heartbeat_age_s: float
    heartbeat_s: float
    #: Tokens done and due of the task that it holds; None when it holds none.
    tokens_done: int | None
    num_tokens: int | None
    #: How long heartbeats have come that did not renew the lease.
    no_progress_s: float
    #: How long it has held the task, and how long that should take; None: unknown.
    elapsed_s: float
    predicted_s: float | None
    #: It has a finished claim in the round that is still open.
    back_in_round: bool
    #: Why it gets no work; None where it does.
    quarantine: str | None


def silence_limit_s(heartbeat_s: float) -> float:
    """Return the age of a heartbeat beyond which a worker counts as lost."""
    return max(MIN_SILENCE_S, SILENT_HEARTBEATS * heartbeat_s)


def heard_at(heartbeat_at: float, *, now: float, away_s: float) -> float:
    """Return when a worker was heard last, after a pause of the coordinator.

    The pause, or what a jump of the clock over a restart makes of it, is no silence:
    nobody was there to hear.
    """
    return max(heartbeat_at, min(heartbeat_at + away_s, now))


def verdict(facts: WorkerFacts) -> tuple[Verdict, str]:
    """Return the verdict and one sentence of evidence. First match wins."""
    limit = silence_limit_s(facts.heartbeat_s)
    if facts.heartbeat_age_s > limit:
        return Verdict.LOST, (
            f"No heartbeat for {facts.heartbeat_age_s:.0f} s, limit {limit:.0f} s."
        )
    if facts.quarantine is not None:
        return Verdict.QUARANTINED, f"Gets no work: {facts.quarantine}."
    if facts.tokens_done is not None and facts.num_tokens:
        return _at_work(facts, facts.tokens_done, facts.num_tokens)
    if facts.back_in_round:
        return Verdict.WAITING, "Its work of this round is back; the round is open."
    return Verdict.IDLE, "Holds no task."


def _at_work(
    facts: WorkerFacts, tokens_done: int, num_tokens: int
) -> tuple[Verdict, str]:
    limit = STUCK_SHARE * silence_limit_s(facts.heartbeat_s)
    share = 100.0 * tokens_done / num_tokens
    if facts.no_progress_s > limit:
        return Verdict.STUCK, (
            f"Heartbeats without progress for {facts.no_progress_s:.0f} s, "
            f"limit {limit:.0f} s; {share:.0f} % of its task done."
        )
    if facts.predicted_s is not None and facts.elapsed_s > facts.predicted_s:
        return Verdict.SLOW, (
            f"{share:.0f} % of its task done after {facts.elapsed_s:.0f} s, "
            f"predicted {facts.predicted_s:.0f} s."
        )
    return Verdict.COMPUTING, f"{share:.0f} % of its task done."
