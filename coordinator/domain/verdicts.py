"""What to call a worker, decided from measured facts, with the number that decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bitnet_ext.wire.verdicts import Verdict

#: Silence of this many heartbeats (and at least MIN_SILENCE_S) means lost.
SILENT_HEARTBEATS: Final = 6
MIN_SILENCE_S: Final = 30.0
#: Heartbeats without progress for this share of that mean stuck: from the third of
#: them on, and before its lease ends, so that the word is there to be seen.
STUCK_SHARE: Final = 0.3
#: So many heartbeats past its prediction a worker is slow: that knows nothing of how
#: old the last one is.
SLOW_HEARTBEATS: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """All that a verdict is drawn from."""

    #: How long it has been silent, as far as there was a coordinator to hear it.
    heartbeat_age_s: float
    #: How often heartbeats are due.
    heartbeat_s: float
    #: Tokens done and due of the task that it holds; None when it holds none.
    tokens_done: int | None
    num_tokens: int | None
    #: For how long heartbeats have come that show no progress, from the first of them.
    no_progress_s: float
    #: How long it has held the task, less what the coordinator was away, and how
    #: long that should take; None: unknown.
    elapsed_s: float
    predicted_s: float | None
    #: How long ago tokens or bytes of the task rose last, and the CPU seconds that its
    #: process has used since, by its heartbeats; None: no task, or not known.
    progress_age_s: float | None
    cpu_s_since_progress: float | None
    #: How long ago the lease ended that its heartbeats still name; None: they do not.
    lease_lost_s: float | None
    #: It has a finished claim in the round that is still open.
    back_in_round: bool
    #: Why it gets no work; None where it does.
    quarantine: str | None
    #: It gets no more tasks, as an operator asked.
    draining: bool
    #: An operator has put it away, and it has not come back.
    is_gone: bool
    #: Its process has said that it stops, and that it holds no task.
    has_stopped: bool


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
    """Return the verdict and its evidence in a sentence or two. First match wins."""
    if facts.is_gone:
        return Verdict.GONE, _when_back(facts)
    if facts.has_stopped:
        return Verdict.GONE, "Stopped. Comes back when its process starts again."
    word, evidence = _of_the_fleet(facts)
    if facts.draining and word is not Verdict.DRAINING:
        evidence += " Drain asked."
    return word, evidence


def _when_back(facts: WorkerFacts) -> str:
    if facts.draining:
        return "Put away. Comes back when its process starts again."
    return "Put away. Comes back when it is heard again."


def _of_the_fleet(facts: WorkerFacts) -> tuple[Verdict, str]:
    limit = silence_limit_s(facts.heartbeat_s)
    if facts.heartbeat_age_s > limit:
        return Verdict.LOST, (
            f"No heartbeat for {facts.heartbeat_age_s:.0f} s, limit {limit:.0f} s."
        )
    if facts.quarantine is not None:
        return Verdict.QUARANTINED, f"Gets no work: {facts.quarantine}."
    if facts.tokens_done is not None and facts.num_tokens:
        return _at_work(facts, facts.tokens_done, facts.num_tokens)
    if facts.lease_lost_s is not None:
        return Verdict.STUCK, (
            f"Lost its lease {facts.lease_lost_s:.0f} s ago, and has not let go of the "
            "task."
        )
    if facts.draining:
        return Verdict.DRAINING, "Holds no task, and gets none."
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
            f"limit {limit:.0f} s; {share:.0f} % of its task done.{_cpu(facts)}"
        )
    slack_s = SLOW_HEARTBEATS * facts.heartbeat_s
    if facts.predicted_s is not None and facts.elapsed_s >= facts.predicted_s + slack_s:
        return Verdict.SLOW, (
            f"{share:.0f} % of its task done after {facts.elapsed_s:.0f} s, "
            f"predicted {facts.predicted_s:.0f} s."
        )
    if facts.draining:
        return Verdict.DRAINING, f"{share:.0f} % of its task done; gets no other."
    return Verdict.COMPUTING, f"{share:.0f} % of its task done."


def _cpu(facts: WorkerFacts) -> str:
    if facts.cpu_s_since_progress is None:
        return ""
    return f" {facts.cpu_s_since_progress:.1f} CPU s without a token or a byte."
