"""A fleet under a virtual clock, without training: leases, sizes and verdicts.

The rules are the coordinator's own functions (`coordinator.domain`), and so is its
lease clock. Written anew here are only the book-keeping around them, which the
coordinator does in SQL, and the workers with all that happens to them.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from bitnet_ext.wire.verdicts import Verdict
from coordinator.domain import leases, sizing
from coordinator.domain.leases import Lease, Reported
from coordinator.domain.throughput import Trained, head_room
from coordinator.domain.verdicts import WorkerFacts, heard_at, verdict
from coordinator.service.sweeping import CLOCK_S, SWEEP_S
from coordinator.store.system import LeaseClock
from tests.sim.boxes import (
    BEAT_CPU_S,
    FAST,
    SEQ_LEN,
    SLOW,
    STEP_TOKENS,
    THREADS,
    Work,
)
from tests.sim.happenings import (
    FROZEN,
    LASTS,
    RATES,
    SLOWED,
    Back,
    Box,
    Detected,
    Fault,
    Held,
    Seen,
)

ROUND_S: Final = 600.0
HEARTBEAT_S: Final = 5.0
#: After so many tasks no growth limit holds a worker's size back any more.
SETTLED: Final = 6
#: Making the next version.
CLOSE_S: Final = 1.0
#: Pauses and restarts of the coordinator, and jumps of its wall clock, per hour.
COORDINATOR_FAULTS: Final = 0.5


class Fleet:
    """One run: `hours` of virtual time of all workers."""

    def __init__(
        self,
        *,
        seed: int,
        num_boxes: int = 60,
        rates: dict[Fault, float] | None = None,
    ) -> None:
        self._rng = np.random.default_rng(seed)
        speeds = [1.0, *np.geomspace(10.0, 1000.0, num_boxes - 1).tolist()]
        self._boxes = [
            Box(i, speed, SLOW if i % 4 == 1 else FAST)
            for i, speed in enumerate(speeds)
        ]
        self._rates = RATES if rates is None else rates
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self.t = 0.0
        self._wall_jump = 1e9
        self._clock = self._new_clock(0.0)
        self._blocked_until = 0.0
        self._round = 0
        self._first_claim_at: float | None = None
        self._closed_to_claims = False
        self._live: list[Held] = []
        self._back: deque[Back] = deque()
        self.seen = Seen()

    def run(self, hours: float) -> Seen:
        """Let the fleet work for so many virtual hours each."""
        for box in self._boxes:
            self._later(float(self._rng.uniform(0, 5)), self._ask, box, box.life)
            self._plan_fault(box)
        self._plan_coordinator_fault()
        end = hours * 3600.0
        while self._events and self._events[0][0] < end:
            self.t, _, act, arguments = heapq.heappop(self._events)
            act(*arguments)
        self.seen.hours = hours * len(self._boxes)
        return self.seen

    # The coordinator

    def _new_clock(self, high_water: float) -> LeaseClock:
        return LeaseClock(
            high_water,
            wall=lambda: self.t + self._wall_jump,
            monotonic=lambda: self.t,
        )

    def _ask(self, box: Box, life: int) -> None:
        """Claim a task, as the coordinator's `claim` does."""
        if self._busy(self._ask, box, life):
            return
        if life != box.life or (box.held is not None and not box.held.over):
            return
        now = box.heartbeat_at = self._clock.now()
        if self._closed_to_claims or box.joined == self._round:
            return
        started = now if self._first_claim_at is None else self._first_claim_at
        seconds = sizing.seconds_left(ROUND_S, round_age_s=now - started)
        size = sizing.task_tokens(
            box.tokens_per_s,
            seconds=seconds,
            batch_tokens=STEP_TOKENS,
            seq_len=SEQ_LEN,
            largest=max((one.tokens for one in box.recent), default=None),
        )
        num_tokens, attempt = self._take(size)
        self._first_claim_at = started
        box.joined = self._round
        self._lease(box, num_tokens, attempt, now, seconds)

    def _take(self, size: int) -> tuple[int, int]:
        """Return tokens of a task and its attempt: given-back work that fits first."""
        waiting = [b for b in self._back if b.round_number != self._round]
        pieces = [
            sizing.GivenBack(
                num_tokens=b.num_tokens,
                num_rounds=None if b.round_number < 0 else self._round - b.round_number,
            )
            for b in waiting
        ]
        place = sizing.chosen(pieces, size, quorum=1.0)
        if place is None:
            return size, 1
        back = waiting[place]
        self._back.remove(back)
        if back.killed_at is not None:
            self.seen.leased_again_s.append(self.t - back.killed_at)
        # The tail becomes a range again; ranges never run out here.
        return sizing.divided(back.num_tokens, size), back.attempt + 1

    def _lease(
        self, box: Box, num_tokens: int, attempt: int, now: float, meant_s: float
    ) -> None:
        known = [b.tokens_per_s for b in self._boxes if b.tokens_per_s]
        predicted = sizing.predicted_s(
            num_tokens,
            box.tokens_per_s,
            fleet=sum(known) / len(known) if known else None,
        )
        ttl_s, own = leases.ttl_s(HEARTBEAT_S), predicted if box.tokens_per_s else None
        lease = Lease(
            num_tokens=num_tokens,
            claimed_at=now,
            progress_at=now,
            expires_at=now + ttl_s,
            hard_at=leases.first_hard_at(
                now,
                own,
                num_steps=-(-num_tokens // STEP_TOKENS),
                round_s=ROUND_S,
                fixed_size=False,
            ),
            reported=Reported(tokens_done=0, bytes_done=0, cpu_s=0.0, step_s=0.0),
        )
        work = Work(
            self._rng,
            num_tokens=num_tokens,
            tokens_per_s=box.speed,
            link=box.link,
            slowed=bool(self._rng.random() < SLOWED),
            stop_after_s=sizing.stop_after_s(
                meant_s=meant_s,
                predicted_s=own,
                limit_s=lease.hard_at - now,
                fixed_size=False,
            ),
        )
        held = Held(
            box=box,
            lease=lease,
            predicted_s=predicted,
            work=work,
            started=self.t,
            own_end=self.t + ttl_s,
            attempt=attempt,
        )
        box.held = held
        self._live.append(held)
        self._watch(held)
        self._later(self.t + work.total_s, self._hand_in, held, box.life)
        self._beat_later(box, HEARTBEAT_S)

    def _watch(self, held: Held) -> None:
        """Look at a lease again when it could be over, at a sweep."""
        ends = self._ends_at(held)
        due = self.t + max(0.0, ends - self._clock.now())
        self._later((due // SWEEP_S + 1) * SWEEP_S, self._sweep, held)

    @staticmethod
    def _ends_at(held: Held) -> float:
        return leases.ends_at(held.lease.expires_at, held.lease.hard_at)

    def _sweep(self, held: Held) -> None:
        if held.over or self._busy(self._sweep, held):
            return
        ends = self._ends_at(held)
        if ends > self._clock.now():
            self._watch(held)
        else:
            self._expire(held)

    def _expire(self, held: Held) -> None:
        box = held.box
        self._count_lost(held)
        self._learn(held, held.lease.reported.tokens_done, held.lease.progress_at)
        killed_at = held.fault_at if held.fault is Fault.KILL else None
        if killed_at is not None:
            after_s = self.t - killed_at
            seen = self.seen.graced_s if held.graced else self.seen.free_again_s
            seen.append(after_s)
        if held.attempt >= leases.MAX_ATTEMPTS:
            self.seen.given_up += 1
        else:
            self._back.append(
                Back(held.lease.num_tokens, killed_at, held.attempt, self._round)
            )
        self._end(held)
        if box.held is held and box.fault is None and held.fault is Fault.KILL:
            self._ask(box, box.life)

    def _count_lost(self, held: Held) -> None:
        if held.fault is None and self._was_out_of_touch(held):
            held.fault = Fault.PARTITION
        cause = "alive" if held.fault is None else str(held.fault)
        if held.fault is Fault.PARTITION:
            self.seen.partitions_lost += 1
        elif held.fault is None:
            lease = held.lease
            clock = "hard_at" if lease.hard_at <= lease.expires_at else "expires_at"
            age_s = self._clock.now() - lease.claimed_at
            self.seen.alive_lost.append(
                f"{clock} after {age_s:.0f} s at {held.box.speed:.0f} tokens/s, "
                f"{lease.reported.tokens_done} of {lease.num_tokens} tokens"
            )
        self._waste(held, cause)

    def _was_out_of_touch(self, held: Held) -> bool:
        """Return whether a pause or gap and a slow network outlasted a TTL."""
        silent_s = self._clock.now() - held.box.heartbeat_at
        return held.gap and silent_s >= leases.ttl_s(HEARTBEAT_S)

    def _waste(self, held: Held, cause: str) -> None:
        until = held.fault_at if held.fault in (Fault.KILL, *FROZEN) else self.t
        done = held.work.tokens(until - held.started - held.slept)
        self.seen.trained += done
        self.seen.wasted[cause] = self.seen.wasted.get(cause, 0) + done

    def _end(self, held: Held) -> None:
        """Note that a lease is over; close the round with the last one."""
        held.over = True
        self._live.remove(held)
        if self._live:
            return
        if not self._closed_to_claims:  # nobody handed anything in: it starts over
            self._first_claim_at = None
            for box in self._boxes:
                box.joined = -1
            self._back = deque(
                Back(b.num_tokens, b.killed_at, b.attempt, -1) for b in self._back
            )
            self._invite(self.t)
            return
        self._later(self.t + CLOSE_S, self._open)

    def _open(self) -> None:
        if self._busy(self._open):
            return
        self.seen.num_rounds += 1
        self._round += 1
        self._first_claim_at, self._closed_to_claims = None, False
        self._invite(self.t)

    def _invite(self, at: float) -> None:
        for box in self._boxes:
            if box.fault is None:
                delay = float(self._rng.uniform(0.0, 1.0))
                self._later(at + delay, self._ask, box, box.life)

    def _hand_in(self, held: Held, life: int) -> None:
        """Accept what a worker has finished."""
        box = held.box
        if life != box.life or held.dropped or self._busy(self._hand_in, held, life):
            return
        held.dropped = True
        now = self._clock.now()
        if held.over or self._ends_at(held) <= now:
            if not held.over:
                self._expire(held)
            self._ask(box, box.life)
            return
        box.heartbeat_at = now
        lease, num_tokens = held.lease, held.work.num_tokens
        actual_s = self.t - held.started
        self.seen.task_s.append(actual_s)
        self.seen.trained += num_tokens
        # What is left of the task becomes a range; ranges never run out here.
        self.seen.parts += num_tokens < lease.num_tokens
        if box.num_done >= SETTLED:
            self.seen.settled_task_s.append(actual_s)
        if box.num_done >= 3 and held.predicted_s:
            self.seen.ratios.append(
                actual_s * lease.num_tokens / num_tokens / held.predicted_s
            )
        box.num_done += 1
        box.token_s.appendleft(held.work.compute_s / num_tokens)
        self._learn(held, num_tokens, now)
        self._closed_to_claims = True
        self._end(held)

    @staticmethod
    def _learn(held: Held, tokens: int, progress_at: float) -> None:
        held.box.learn(
            Trained(
                tokens=tokens,
                seconds=progress_at - held.lease.claimed_at,
                num_tokens=held.lease.num_tokens,
                predicted_s=held.predicted_s,
            )
        )

    def _busy(self, act: Callable[..., None], *arguments: Any) -> bool:
        """Put off what reaches a coordinator that stands still."""
        if self.t < self._blocked_until:
            self._later(self._blocked_until, act, *arguments)
            return True
        return False

    def _plan_coordinator_fault(self) -> None:
        wait_s = float(self._rng.exponential(3600.0 / COORDINATOR_FAULTS))
        self._later(self.t + wait_s, self._coordinator_fault)

    def _coordinator_fault(self) -> None:
        """Jump the wall clock; then stand still, or start anew."""
        self._wall_jump += float(self._rng.uniform(-3600.0, 3600.0))
        lasts_s = float(self._rng.uniform(11.0, 18.0))
        restarts = bool(self._rng.random() < 0.5)
        self._blocked_until = self.t + lasts_s
        kept = self._clock.now() - float(self._rng.uniform(0.0, CLOCK_S))
        # What the clock has stamped is stored too, as `store.clock` knows.
        stamped = max(box.heartbeat_at for box in self._boxes)
        before = max(kept, stamped) if restarts else None
        self._later(self._blocked_until, self._wake, before, lasts_s)
        self._plan_coordinator_fault()

    def _wake(self, high_water: float | None, away_s: float) -> None:
        if high_water is not None:
            self._clock = self._new_clock(high_water)
            away_s = self._clock.now() - high_water
        now = self._clock.now()
        for held in self._live:
            held.lease = leases.resumed(
                held.lease, ttl_s=leases.ttl_s(HEARTBEAT_S), now=now, away_s=away_s
            )
            held.graced = held.fault is not None
            self._watch(held)
        for box in self._boxes:
            box.heartbeat_at = heard_at(box.heartbeat_at, now=now, away_s=away_s)

    # The workers

    def _beat_later(self, box: Box, wait_s: float) -> None:
        """Send a heartbeat after `wait_s`; it arrives a little later."""
        sent = self.t + wait_s
        self._later(sent + self._delay(box), self._beat, box, box.life, sent)

    def _delay(self, box: Box) -> float:
        delay = float(self._rng.exponential(box.link.delay_s))
        return min(delay, box.link.most_delay_s)

    def _beat(self, box: Box, life: int, sent: float) -> None:
        held = box.held
        # What was on its way when the process stopped arrives all the same.
        on_its_way = box.fault in (Fault.NAP, Fault.STOP) and sent <= box.fault_at
        if life != box.life and not on_its_way:
            return
        if held is None or held.dropped or self._busy(self._beat, box, life, sent):
            return
        self.seen.heartbeats += 1
        box.beats += 1
        now = self._clock.now()
        if held.over or self._ends_at(held) <= now:
            self._lose(held)  # by how long it was silent before this heartbeat
            box.heartbeat_at = now
            return
        gap_s, box.heartbeat_at, held.gap = now - box.heartbeat_at, now, False
        held.lease = leases.renewed(
            leases.heard_again(held.lease, silence_s=gap_s, heartbeat_s=HEARTBEAT_S),
            self._said(held, sent),
            ttl_s=leases.ttl_s(HEARTBEAT_S),
            now=now,
            usual_step_s=self._usual_step_s(held),
            head_room=head_room(box.spread),
        )
        if held.fault is None:
            word = self._verdict(box, held, gap_s)
            self.seen.called_slow += word is Verdict.SLOW
            self.seen.slow_called_stuck += word is Verdict.STUCK
            self.seen.alive_called_lost += word is Verdict.LOST
        held.own_end = max(held.own_end, sent + held.lease.expires_at - now)
        if life == box.life:
            self._beat_later(box, HEARTBEAT_S + self._delay(box))

    @staticmethod
    def _usual_step_s(held: Held) -> float | None:
        box, step_tokens = held.box, min(STEP_TOKENS, held.lease.num_tokens)
        return leases.measured_step_s(
            box.token_s, step_tokens=step_tokens
        ) or sizing.step_s(box.tokens_per_s, batch_tokens=step_tokens)

    def _said(self, held: Held, at: float) -> Reported:
        box = held.box
        extra_cpu_s = BEAT_CPU_S * box.beats
        until = at
        if box.fault in FROZEN:
            until = min(at, box.fault_at)
            if box.fault is Fault.SPIN:
                extra_cpu_s += THREADS * (at - until)
        return held.work.said(until - held.started - held.slept, extra_cpu_s)

    def _verdict(self, box: Box, held: Held, age_s: float) -> Verdict:
        lease, now = held.lease, self._clock.now()
        return verdict(
            WorkerFacts(
                heartbeat_age_s=age_s,
                heartbeat_s=HEARTBEAT_S,
                tokens_done=None if held.over else lease.reported.tokens_done,
                num_tokens=None if held.over else lease.num_tokens,
                progress_age_s=now - lease.progress_at,
                cpu_s_since_progress=None,
                lease_lost_s=0.0 if held.over else None,
                back_in_round=False,
                quarantine=None,
                draining=False,
                is_gone=False,
                has_stopped=False,
                no_progress_s=leases.no_progress_s(
                    lease.stalled_at, heartbeat_at=box.heartbeat_at
                ),
                elapsed_s=now - lease.claimed_at - lease.paused_s,
                predicted_s=held.predicted_s,
            )
        )[0]

    def _lose(self, held: Held) -> None:
        """Let a worker learn that its lease is lost: it drops the work and asks."""
        box = held.box
        if box.fault in FROZEN:  # nobody there to drop it
            self._beat_later(box, HEARTBEAT_S)
            return
        held.dropped = True
        if not held.over:
            self._expire(held)
        self._ask(box, box.life)

    def _plan_fault(self, box: Box) -> None:
        total = sum(self._rates.values())
        if total:
            wait_s = float(self._rng.exponential(3600.0 / total))
            self._later(self.t + wait_s, self._befall, box)

    def _befall(self, box: Box) -> None:
        kinds = list(self._rates)
        weights = np.array([self._rates[kind] for kind in kinds])
        kind = kinds[int(self._rng.choice(len(kinds), p=weights / weights.sum()))]
        self.seen.faults[kind] = self.seen.faults.get(kind, 0) + 1
        box.fault, box.fault_at = kind, self.t
        held = box.held
        busy = held is not None and not held.over and not held.dropped
        if busy and held is not None and kind not in (Fault.NAP, Fault.GAP):
            held.fault, held.fault_at = kind, self.t
        elif busy and held is not None:
            held.gap = True
        if kind in FROZEN:
            self._freeze(box, held if busy else None)
            return
        box.life += 1
        if kind is Fault.STOP and busy:
            self._look(box, held, box.life, self.t)
        lasts_s = float(self._rng.uniform(*LASTS[kind]))
        self._later(self.t + lasts_s, self._recover, box, kind, self.t)

    def _freeze(self, box: Box, held: Held | None) -> None:
        if held is None:  # nothing to hang in
            box.fault = None
            self._plan_fault(box)
            return
        # The heartbeat thread goes on; what was to be handed in never will be.
        box.life += 1
        self._beat_later(box, float(self._rng.uniform(0.0, HEARTBEAT_S)))
        self._look(box, held, box.life, self.t)

    def _look(self, box: Box, held: Held | None, life: int, since: float) -> None:
        """Look at a stuck worker each second until it is called what it is."""
        if held is None or life != box.life:
            return
        word = self._verdict(box, held, self._clock.now() - box.heartbeat_at)
        called = word in (Verdict.STUCK, Verdict.LOST)
        if called or held.over:
            self.seen.detected.append(
                Detected(
                    fault=held.fault,
                    step_s=held.lease.reported.step_s
                    or min(STEP_TOKENS, held.lease.num_tokens) / box.speed,
                    after_s=self.t - since,
                    called=called,
                    was_measured=box.tokens_per_s is not None,
                )
            )
        elif not self._busy(self._look, box, held, life, since):
            self._later(self.t + 1.0, self._look, box, held, life, since)
        if held.fault in FROZEN and (called or held.over):
            # Somebody sees it, and starts the process anew.
            wait_s = float(self._rng.uniform(60.0, 300.0))
            self._later(self.t + wait_s, self._restart, box, box.life)

    def _restart(self, box: Box, life: int) -> None:
        if life == box.life:
            box.life += 1
            self._recover(box, Fault.KILL, self.t)

    def _recover(self, box: Box, kind: Fault, since: float) -> None:
        held = box.held
        box.fault = None
        self._plan_fault(box)
        if kind in (Fault.NAP, Fault.STOP):
            box.life += 1
            if held is not None:
                held.slept += self.t - since
        if held is None or held.dropped or kind is Fault.KILL:
            if held is not None:
                held.dropped = True
            box.beats = 0
            self._ask(box, box.life)
            return
        if self.t >= held.own_end and not self._is_finished(held):
            # Its own clock says that the lease is lost: with what else went on, it
            # was out of touch for a TTL.
            held.fault, held.dropped = held.fault or Fault.PARTITION, True
            self._ask(box, box.life)
            return
        ends = held.started + held.slept + held.work.total_s
        self._later(max(self.t, ends), self._hand_in, held, box.life)
        self._beat_later(box, 0.0)

    def _is_finished(self, held: Held) -> bool:
        return self.t - held.started - held.slept >= held.work.total_s

    def _later(self, at: float, act: Callable[..., None], *arguments: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, self._count, act, arguments))
