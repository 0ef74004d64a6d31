"""The virtual fleet: who is in it, and what everything costs in virtual seconds.

One step on one window takes a second on a worker of speed 1. Arithmetic outside the
products of a step is charged at a quarter of that step's rate of FLOP, because the
products run in int8 and the rest does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tests.sim.net import SEQ_LEN

#: FLOP of one number of the flat vector in one go; divisions and roots count as one.
ADAMW: Final = 14
NESTEROV: Final = 6
#: Adding one gradient to another.
ACCUMULATE: Final = 1
#: Decoding and adding one number of a payload, and encoding one.
DECODE: Final = 3
ENCODE: Final = 6
#: Decoding a number and multiplying it, by itself for a norm or by the mean's.
PRODUCT: Final = 2
#: Adding a number to the mean by which it is judged, and comparing it with that.
JUDGE: Final = DECODE + PRODUCT
#: Share of the step's rate of FLOP at which all of these run.
OPTIMISER_RATE: Final = 0.25
#: A heartbeat, and how long a lease outlives the last one.
HEARTBEAT_S: Final = 5.0
TTL_S: Final = 30.0
#: A process that died is back after so long.
RESTART_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A virtual fleet. Every figure of the simulator belongs to one."""

    speeds: tuple[float, ...] = (1.0, 1.0, 1.5, 2.0, 2.0, 3.0, 3.5, 4.0)
    #: A task takes up to this share longer than its speed says.
    jitter: float = 0.15
    #: Share of tasks whose worker dies on the way.
    deaths: float = 0.05
    #: Of each worker, both ways; the coordinator's own link is not the bottleneck.
    link_bytes_per_s: float = 100e6 / 8
    #: Of one request and its answer.
    round_trip_s: float = 0.02

    @property
    def mean_speed(self) -> float:
        """Speed of a worker as they are on average; the coordinator's box has it."""
        return sum(self.speeds) / len(self.speeds)

    def transfer_s(self, num_bytes: int) -> float:
        """Return how long one request with so many bytes takes."""
        return self.round_trip_s + num_bytes / self.link_bytes_per_s

    def optimiser_s(self, flop: float, *, num_params: int, speed: float) -> float:
        """Return how long arithmetic of an optimiser takes on a box of that speed."""
        step_flop = 6 * num_params * SEQ_LEN
        return flop / (step_flop * speed * OPTIMISER_RATE)
