"""What befalls a virtual fleet, who is in it, and what is counted of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from coordinator.domain.leases import Lease
from coordinator.domain.throughput import NUM_RECENT, Trained, measured
from tests.sim.boxes import Link, Work


class Fault(StrEnum):
    """What happens to a worker."""

    KILL = "kill"  #: the process is gone, and comes back after a while
    NAP = "nap"  #: stopped for less than a TTL
    STOP = "stop"  #: stopped (SIGSTOP) for much longer
    HANG = "hang"  #: heartbeats go on at 0 % CPU
    SPIN = "spin"  #: heartbeats go on at 100 % CPU, without a token
    GAP = "gap"  #: no network for less than a TTL
    PARTITION = "partition"  #: no network for longer than a TTL


#: How often each happens to a worker, per hour, and how many seconds it lasts.
RATES: Final = {
    Fault.KILL: 0.20,
    Fault.NAP: 0.10,
    Fault.STOP: 0.01,
    Fault.HANG: 0.01,
    Fault.SPIN: 0.01,
    Fault.GAP: 0.10,
    Fault.PARTITION: 0.01,
}
LASTS: Final = {
    Fault.KILL: (20.0, 120.0),
    Fault.NAP: (2.0, 12.0),
    Fault.STOP: (150.0, 600.0),
    Fault.GAP: (2.0, 12.0),
    Fault.PARTITION: (60.0, 300.0),
}
#: Share of tasks during which a neighbour takes most of the box.
SLOWED: Final = 0.01
#: What makes a worker stop that still has heartbeats; somebody restarts it.
FROZEN: Final = (Fault.HANG, Fault.SPIN)


@dataclass(eq=False, slots=True)
class Held:
    """A task with its lease, as coordinator and worker see it."""

    box: Box
    lease: Lease
    predicted_s: float | None
    work: Work
    #: Work time is `now - started - slept`, in seconds of the simulation.
    started: float
    slept: float = 0.0
    #: When the worker takes the lease for lost, by its own clock.
    own_end: float = 0.0
    #: The lease is over for the coordinator.
    over: bool = False
    #: The worker works no more on it.
    dropped: bool = False
    #: What befell the worker while it held this.
    fault: Fault | None = None
    fault_at: float = 0.0
    #: A pause or gap under a TTL befell it since its last heartbeat.
    gap: bool = False
    #: 1 for new work, more for what came back.
    attempt: int = 1
    #: The coordinator paused after the fault.
    graced: bool = False


@dataclass(eq=False, slots=True)
class Box:
    """One worker."""

    number: int
    speed: float
    link: Link
    tokens_per_s: float | None = None
    spread: float | None = None
    #: What its last leases came to, newest first.
    recent: deque[Trained] = field(default_factory=lambda: deque(maxlen=NUM_RECENT))
    heartbeat_at: float = 0.0
    held: Held | None = None
    joined: int = -1  #: the last round that it has claimed in
    num_done: int = 0
    #: How long a token took in each of its tasks, the newest first.
    token_s: deque[float] = field(default_factory=deque)
    #: Raised whenever what was planned for the process no longer holds.
    life: int = 0
    beats: int = 0
    fault: Fault | None = None
    fault_at: float = 0.0

    def learn(self, trained: Trained) -> None:
        """Measure its speed anew after a lease has ended."""
        if trained.tokens:
            self.recent.appendleft(trained)
            found = measured(self.recent)
            if found is not None:
                self.tokens_per_s, self.spread = found.tokens_per_s, found.spread


@dataclass(frozen=True, slots=True)
class Back:
    """A stretch that came back, when its worker was killed, and its attempts so far."""

    num_tokens: int
    killed_at: float | None
    attempt: int
    round_number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected:
    """How a worker that stood still was found out."""

    fault: Fault | None
    #: Its latest step; before the first, what one takes on the average.
    step_s: float
    after_s: float
    #: False where its lease ended first, and nobody called it stuck or lost.
    called: bool
    was_measured: bool


@dataclass(slots=True)
class Seen:
    """What a simulation has counted. Times in seconds."""

    hours: float = 0.0
    num_rounds: int = 0
    heartbeats: int = 0
    alive_lost: list[str] = field(default_factory=list)
    partitions_lost: int = 0
    task_s: list[float] = field(default_factory=list)
    #: The same without the first tasks of each worker.
    settled_task_s: list[float] = field(default_factory=list)
    #: Actual over predicted time, after the third task of a worker.
    ratios: list[float] = field(default_factory=list)
    trained: int = 0
    wasted: dict[str, int] = field(default_factory=dict)
    detected: list[Detected] = field(default_factory=list)
    called_slow: int = 0
    slow_called_stuck: int = 0
    alive_called_lost: int = 0
    free_again_s: list[float] = field(default_factory=list)
    #: The same where the coordinator paused meanwhile, and gave grace.
    graced_s: list[float] = field(default_factory=list)
    leased_again_s: list[float] = field(default_factory=list)
    given_up: int = 0
    #: Tasks that were handed in before their end.
    parts: int = 0
    faults: dict[str, int] = field(default_factory=dict)
