"""What to call a worker, decided from measured facts, with the number that decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bitnet_ext.wire.verdicts import Verdict

#: Silence of this many heartbeats (and at least MIN_SILENCE_S) means lost.
SILENT_HEARTBEATS: Final = 6
MIN_SILENCE_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """All that a verdict is drawn from."""

    heartbeat_age_s: float
    heartbeat_s: float
    #: Tokens done and due of the task that it holds; None when it holds none.
    tokens_done: int | None
    num_tokens: int | None
    #: It has a finished claim in the round that is still open.
    back_in_round: bool
    #: Why it gets no work; None where it does.
    quarantine: str | None


def silence_limit_s(heartbeat_s: float) -> float:
    """Return the age of a heartbeat beyond which a worker counts as lost."""
    return max(MIN_SILENCE_S, SILENT_HEARTBEATS * heartbeat_s)


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
        share = 100.0 * facts.tokens_done / facts.num_tokens
        return Verdict.COMPUTING, f"{share:.0f} % of its task done."
    if facts.back_in_round:
        return Verdict.WAITING, "Its work of this round is back; the round is open."
    return Verdict.IDLE, "Holds no task."
