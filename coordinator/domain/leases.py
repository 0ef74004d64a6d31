"""How long a lease lasts, what counts as progress, and when a task is given up.

Two clocks (docs/states.md): `expires_at` moves on with every heartbeat that shows
progress; `hard_at` bounds the whole lease by measured training speed. What a worker
says of itself moves both only within bounds that are ours.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median
from typing import Final

HEARTBEATS_PER_TTL: Final = 6
MIN_TTL_S: Final = 30.0
#: A heartbeat that comes more intervals after the one before, and at least so many
#: seconds, ends a silence: the worker may have slept, so what came before the silence
#: proves nothing. A late heartbeat is none: with it a worker that hangs on a bad
#: network would never be called stuck.
GAP_HEARTBEATS: Final = 3
MIN_GAP_S: Final = 10.0
MAX_ATTEMPTS: Final = 5
#: So many leases of a task may come back without costing an attempt before a release
#: without a trained token costs one: else a task that every worker hands back at once
#: would go round for ever.
MAX_FREE_LEASES: Final = 5
MAX_BACKOFF_S: Final = 60.0
#: `hard_at` = claim + this many times the prediction + slack.
HARD_FACTOR: Final = 3.0
HARD_SLACK_S: Final = 60.0
#: A lease is hopeless where the rest, at so many times its pace so far, comes too late.
HOPE: Final = 2.0
#: A task is cut to last a round: where its prediction is so many, the speed is wrong.
MAX_ROUNDS: Final = 4.0
#: The most that an unmeasured worker gets by what it says of its own speed. Its first
#: task is a probe of a few local steps, or one pass over the held-out text: a box
#: that needs two hours for that is of no use to rounds of minutes. (At 1 token/s four
#: steps of 1,024 tokens take over one.)
MAX_UNMEASURED_S: Final = 7200.0
#: How long rising CPU time alone counts as progress, in measured step times ...
CPU_GRACE_STEPS: Final = 5.0
#: ... at least so long before the first step of a task, which needs some preparing ...
CPU_GRACE_FIRST_S: Final = 60.0
#: ... by the middle one of so many tasks ...
NUM_RECENT_TASKS: Final = 5
#: ... and before any step was measured.
CPU_GRACE_UNMEASURED_S: Final = 3600.0


def ttl_s(heartbeat_s: float) -> float:
    """Return how long a lease lives without progress."""
    return max(MIN_TTL_S, HEARTBEATS_PER_TTL * heartbeat_s)


def hard_at(claimed_at: float, predicted_s: float) -> float:
    """Return when a lease ends whatever its heartbeats say."""
    return claimed_at + HARD_FACTOR * predicted_s + HARD_SLACK_S


def first_hard_at(
    claimed_at: float,
    predicted_s: float | None,
    *,
    num_steps: int,
    round_s: float,
    fixed_size: bool,
) -> float:
    """Return the same at the claim; `predicted_s` goes by this worker's own speed.

    None: it was never measured. What the fleet would need says nothing of a box that
    may be a hundred times slower. A prediction counts for `MAX_ROUNDS` at most, else a
    worker that takes all it may would be given more for each task. Where the size was
    not cut to the round it counts for as long as that worker had before it was
    measured. A task of one step (`num_steps`) can't be cut to the round: it gets as
    many step times as a step may take, within what an unmeasured worker gets. Its
    worker is at work, or else called stuck, until then.
    """
    if predicted_s is None:
        return claimed_at + MAX_UNMEASURED_S
    most_s = MAX_ROUNDS * round_s
    if fixed_size:
        most_s = max(most_s, MAX_UNMEASURED_S)
    limit = hard_at(claimed_at, min(predicted_s, most_s))
    if num_steps > 1:
        return limit
    step_s = CPU_GRACE_STEPS * predicted_s + HARD_SLACK_S
    return max(limit, claimed_at + min(step_s, MAX_UNMEASURED_S))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What a worker said about one task at one moment."""

    tokens_done: int
    bytes_done: int
    #: CPU seconds of the worker's process.
    cpu_s: float
    #: Wall seconds of its latest local step; 0 before the first.
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One live lease: all that its two clocks go by. Moments are of the lease clock."""

    num_tokens: int
    claimed_at: float
    #: When tokens or bytes rose last.
    progress_at: float
    expires_at: float
    hard_at: float
    reported: Reported
    #: For how long the coordinator stood still since the claim.
    paused_s: float = 0.0
    #: When heartbeats began to come that show no progress, without a silence in
    #: between; None: the last one did.
    stalled_at: float | None = None


def ends_at(expires_at: float, hard_at: float | None) -> float:
    """Return when a lease is over, unless a heartbeat moves it on."""
    return expires_at if hard_at is None else min(expires_at, hard_at)


def renewed(
    lease: Lease,
    said: Reported,
    *,
    ttl_s: float,
    now: float,
    usual_step_s: float | None,
    head_room: float = HARD_FACTOR,
) -> Lease:
    """Return a live lease after a heartbeat at `now`.

    `usual_step_s` is how long a local step takes by earlier tasks of this worker; None
    before the first, where its own speed decides how long the task may take. Where it
    was measured, a hopeless lease ends after `head_room` times the prediction.
    """
    before = lease.reported
    # More tokens than there are would be progress without end.
    after = replace(said, tokens_done=min(said.tokens_done, lease.num_tokens))
    progress_at, expires_at = lease.progress_at, lease.expires_at
    stalled_at: float | None = now if lease.stalled_at is None else lease.stalled_at
    if shows_progress(
        before,
        after,
        since_advance_s=now - progress_at,
        advanced_after_s=progress_at - lease.claimed_at,
        usual_step_s=usual_step_s,
    ):
        expires_at, stalled_at = max(expires_at, now + ttl_s), None
    if advanced(before, after):
        progress_at = now
    if usual_step_s is None:
        limit = _own_limit(lease, after, now)
    else:
        limit = _limit(replace(lease, progress_at=progress_at), after, now, head_room)
    return replace(
        lease,
        progress_at=progress_at,
        expires_at=expires_at,
        hard_at=limit,
        # A count that went back is noise, such as a heartbeat that was overtaken.
        reported=Reported(
            tokens_done=max(before.tokens_done, after.tokens_done),
            bytes_done=max(before.bytes_done, after.bytes_done),
            cpu_s=max(before.cpu_s, after.cpu_s),
            step_s=after.step_s,
        ),
        stalled_at=stalled_at,
    )


def heard_again(lease: Lease, *, silence_s: float, heartbeat_s: float) -> Lease:
    """Return a live lease as a heartbeat finds it, `silence_s` after the last one.

    `heartbeat_s` is how often they are due. After a silence, heartbeats without
    progress are counted anew.
    """
    if silence_s > max(MIN_GAP_S, GAP_HEARTBEATS * heartbeat_s):
        return replace(lease, stalled_at=None)
    return lease


def measured_step_s(recent: Iterable[float], *, step_tokens: int) -> float | None:
    """Return how long a local step of a worker takes; None before any is known.

    `recent` is what a token took in each of its tasks, in seconds, newest first; what
    was downloaded and sent is no part of it. The middle one counts: a busy neighbour
    now and then does not.
    """
    newest = list(islice(recent, NUM_RECENT_TASKS))
    return step_tokens * median(newest) if newest else None


def resumed(lease: Lease, *, ttl_s: float, now: float, away_s: float) -> Lease:
    """Return a live lease after a pause of the coordinator that ends `now`.

    The pause, or what a jump of the clock over a restart makes of it, counts for
    nothing: the limit moves on by as much, and so does the grace of CPU time. Many
    short pauses add up to no more than themselves.
    """
    return replace(
        lease,
        progress_at=max(lease.progress_at, min(lease.progress_at + away_s, now)),
        expires_at=max(lease.expires_at, now + ttl_s),
        hard_at=lease.hard_at + max(0.0, away_s),
        paused_s=lease.paused_s + max(0.0, away_s),
        stalled_at=None,
    )


def no_progress_s(stalled_at: float | None, *, heartbeat_at: float) -> float:
    """Return for how long heartbeats have come that show no progress.

    From the first of them after a silence: of that nobody knows what it was. One
    heartbeat after a worker slept, or its network was away, proves nothing.
    """
    return 0.0 if stalled_at is None else max(0.0, heartbeat_at - stalled_at)


def _own_limit(lease: Lease, after: Reported, now: float) -> float:
    """Return when the lease of a worker that nobody has measured yet ends for good.

    Its own speed decides, anew at each heartbeat, but only within two hours. Before its
    first token, the limit is the one of the claim; once all are done it stays.
    """
    if lease.reported.tokens_done >= lease.num_tokens:
        return lease.hard_at
    predicted = predicted_from_progress(
        num_tokens=lease.num_tokens,
        tokens_done=after.tokens_done,
        elapsed_s=now - lease.claimed_at,
    )
    if predicted is None:
        return lease.hard_at
    # Where pauses have moved the limit on, they still count for nothing.
    most = max(lease.claimed_at + MAX_UNMEASURED_S, lease.hard_at)
    return min(hard_at(lease.claimed_at, predicted), most)


def _limit(lease: Lease, after: Reported, now: float, head_room: float) -> float:
    """Return when the lease of a measured worker ends for good: at once, if hopeless.

    Not before it has taken `head_room` times its prediction, and the slack.
    """
    began_at = lease.claimed_at + lease.paused_s + HARD_SLACK_S
    patience_s = (lease.hard_at - began_at) * head_room / HARD_FACTOR
    if now < began_at + patience_s or not _is_hopeless(lease, after.tokens_done):
        return lease.hard_at
    return min(lease.hard_at, now)


def _is_hopeless(lease: Lease, tokens_done: int) -> bool:
    """Return whether a task can't be done in time, not even at `HOPE` times its pace.

    Before its first token nobody knows; once all are done, only the upload is left.
    The slack is for the download, which is no part of the pace.
    """
    if not 0 < tokens_done < lease.num_tokens:
        return False
    spent_s = lease.progress_at - lease.claimed_at - lease.paused_s - HARD_SLACK_S
    left_s = spent_s / tokens_done * (lease.num_tokens - tokens_done) / HOPE
    return lease.progress_at + left_s > lease.hard_at


def shows_progress(
    before: Reported,
    after: Reported,
    *,
    since_advance_s: float,
    advanced_after_s: float,
    usual_step_s: float | None,
) -> bool:
    """Return whether a heartbeat proves that the task advances.

    The last rise of tokens or bytes was `advanced_after_s` after the claim, and is
    `since_advance_s` old. CPU time alone counts only for a while: a worker that spins
    for ever must not keep its lease. (Nor is a hung one ever quite without CPU time:
    its heartbeat takes some.)
    """
    if advanced(before, after):
        return True
    grace_s = CPU_GRACE_UNMEASURED_S
    if usual_step_s is not None:
        grace_s = max(CPU_GRACE_FIRST_S, CPU_GRACE_STEPS * usual_step_s)
    if before.tokens_done > 0:
        # No step takes longer than all that came before its end.
        grace_s = CPU_GRACE_STEPS * min(after.step_s, advanced_after_s)
    return after.cpu_s > before.cpu_s and since_advance_s < grace_s


def advanced(before: Reported, after: Reported) -> bool:
    """Return whether tokens were trained or bytes were moved."""
    return (
        after.tokens_done > before.tokens_done or after.bytes_done > before.bytes_done
    )


def predicted_from_progress(
    *, num_tokens: int, tokens_done: int, elapsed_s: float
) -> float | None:
    """Return the whole time of a task by its own speed so far; None before a token."""
    if tokens_done <= 0 or elapsed_s <= 0:
        return None
    return num_tokens * elapsed_s / tokens_done


def release_is_free(*, num_leases: int, attempt: int, tokens_done: int) -> bool:
    """Return whether a task that is released gets its attempt back.

    `num_leases`, `attempt`: leases and attempts so far, both with the one that ends.
    """
    return tokens_done > 0 or num_leases - attempt < MAX_FREE_LEASES


def backoff_s(attempt: int, jitter: float) -> float:
    """Return how long a failed task rests; `jitter` in [0, 1] spreads the herd."""
    return jitter * min(2.0**attempt, MAX_BACKOFF_S)


def lease_id(server_secret: bytes, task_id: str, number: int, claim_id: str) -> str:
    """Return the 128-bit right to a task, as 32 hex digits.

    HMAC-SHA256 over task, number of the lease and claim: a repeated claim computes
    it again, and nobody else can.
    """
    text = f"{task_id}\n{number}\n{claim_id}".encode()
    return hmac.new(server_secret, text, hashlib.sha256).digest()[:16].hex()


def lease_hash(lease: str) -> str:
    """Return what is stored of a lease id."""
    return hashlib.sha256(lease.encode()).hexdigest()
