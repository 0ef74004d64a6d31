"""The guards of a round: which submissions are merged, and how much of each.

Pure rules on the submissions of one round, in the order in which they are merged:

- a norm that is large for its round is clipped
- what points against the rest of its round is left out, the worst first
- zeros among others are left out
- a worker that is left out again and again is to be quarantined

Norms and cosines are made of float32 operations, one number after the other, and of
sums in float64 in a fixed order. So a round that is closed again is judged the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

import numpy as np

from bitnet_ext.codecs import Bytes, Codec, Vector, decode_add
from bitnet_ext.fused import norm_of
from bitnet_ext.wire.verdicts import RoundKind
from coordinator.domain.outer_step import merge_weights
from coordinator.domain.plan import TrainingPlan, learning_rate_at

#: A submission is clipped to so many times the size that is usual.
CLIP: Final = 2.0
#: A round as a whole is clipped to so many times the size that was usual before it.
ROUND_CLIP: Final = 5.0
#: So many submissions can judge one another.
FEWEST: Final = 3
#: Applied submissions that say what is usual, and the fewest that say anything.
NUM_RECENT: Final = 32
FEWEST_RECENT: Final = 8
#: Beyond so many times the usual size of its round it is left out instead.
TOO_LARGE: Final = 20.0
#: Left out where its cosine with the rest of its round is below zero and below the
#: median of its round by so many spreads (median absolute deviations, at least so
#: much each): gradients of a few sequences point against the rest now and then.
SPREADS: Final = 4.0
LEAST_SPREAD: Final = 0.05
#: A worker is quarantined once so many of its last so many were left out.
MOST_LEFT_OUT: Final = 5
NUM_JUDGED: Final = 8
#: Held-out loss has risen once so many scores in a row are above the best before
#: them by more than this share.
RISE: Final = 0.03
NUM_RISEN: Final = 3
#: So small next to the usual size, it counts as zeros.
NOTHING: Final = 1e-6
#: A rate of zero is this one, where sizes are divided by it.
_LEAST_RATE: Final = 1e-12

#: Returns codec and payload of a submission by its place in the round.
Read = Callable[[int], tuple[Codec, Bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One submission of a round, before it is judged."""

    tokens: int
    #: Euclidean length of its numbers.
    norm: float
    #: The length in units that compare (`size_of`).
    size: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruling:
    """What the guards say of one submission."""

    #: Of its numbers; below 1 where they are clipped.
    factor: float = 1.0
    #: With the rest of its round; None where too few were there to tell.
    cosine: float | None = None
    #: Why it is left out; None: it is merged.
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the guards say of a round."""

    #: In the order of its submissions.
    rulings: Sequence[Ruling]
    #: What is merged, added up in order: each times its share and its factor, float32
    #: (n,). None where too few are left to judge one another.
    mean: Vector | None


def size_of(
    norm: float, plan: TrainingPlan, *, tokens_before: int, tokens: int, num_steps: int
) -> float:
    """Return a norm in units that do not change with task size and learning rate.

    Local steps add up like a random walk, each as long as the rate lets it be. A
    gradient is a mean, whatever its tokens.
    """
    if plan.round_kind is RoundKind.GRADIENT:
        return norm
    ends = (tokens_before, tokens_before + tokens)
    rate = sum(learning_rate_at(plan, tokens_accepted) for tokens_accepted in ends) / 2
    return norm / (max(rate, _LEAST_RATE) * math.sqrt(max(num_steps, 1)))


def judge(
    candidates: Sequence[Candidate],
    recent: Sequence[float],
    read: Read,
    *,
    num_elements: int,
    threads: int = 1,
) -> Judgement:
    """Return the ruling on each submission; at least one of a round is merged.

    `recent` are sizes of the last submissions that were applied. `read` is called
    for rounds of `FEWEST` or more only. Raises PayloadError as `decode_add` does.
    """
    sizes = [candidate.size for candidate in candidates]
    rulings = [
        Ruling(factor=factor, reason=reason)
        for factor, reason in zip(
            _factors(sizes, recent), map(_of_odd_size(sizes), sizes), strict=True
        )
    ]
    memory = _Memory(num_elements, threads)
    while places := _left(rulings):
        if not _drop_worst(candidates, rulings, places, read, memory):
            return Judgement(rulings=rulings, mean=memory.mean)
    return Judgement(rulings=rulings, mean=None)


def keeps_failing(left_out: Sequence[bool]) -> bool:
    """Return whether a worker is to be quarantined: 5 of its last 8 were left out."""
    return sum(left_out[-NUM_JUDGED:]) >= MOST_LEFT_OUT


def _of_odd_size(sizes: Sequence[float]) -> Callable[[float], str | None]:
    """Return what says why a submission of a size is left out, None: it is not."""
    usual = median(sizes)

    def reason(size: float) -> str | None:
        if size <= NOTHING * usual and any(sizes):
            return "zeros only"
        if len(sizes) >= FEWEST and size > TOO_LARGE * usual > 0.0:
            return f"{size / usual:.3g} times the usual norm of its round"
        return None

    return reason


def _factors(sizes: Sequence[float], recent: Sequence[float]) -> list[float]:
    """Return what the numbers of each submission are multiplied by, at most 1."""
    usual = median(recent) if len(recent) >= FEWEST_RECENT else math.inf
    typical = usual
    if len(sizes) >= FEWEST:
        typical = min(median(sizes), ROUND_CLIP * usual)
    limit = CLIP * typical
    return [limit / size if 0.0 < limit < size else 1.0 for size in sizes]


def has_risen(losses: Sequence[float]) -> bool:
    """Return whether held-out loss has risen; `losses` of versions, oldest first."""
    before, last = losses[:-NUM_RISEN], losses[-NUM_RISEN:]
    return bool(before) and min(last) > (1.0 + RISE) * min(before)


class _Memory:
    """Two vectors to work in."""

    def __init__(self, num_elements: int, threads: int) -> None:
        self.mean, self.both = (
            np.empty(num_elements, dtype=np.float32) for _ in range(2)
        )
        self.threads = threads

    def norm(self, vector: Vector) -> float:
        return norm_of(vector, threads=self.threads)


def _left(rulings: Sequence[Ruling]) -> list[int]:
    """Return the places of what is left; none where that can't judge one another."""
    places = [place for place, ruling in enumerate(rulings) if ruling.reason is None]
    enough = len(places) >= FEWEST and 2 * len(places) > len(rulings)
    return places if enough else []


def _drop_worst(
    candidates: Sequence[Candidate],
    rulings: list[Ruling],
    places: Sequence[int],
    read: Read,
    memory: _Memory,
) -> bool:
    """Set the cosines of what is left, and leave the worst out; False: none is bad."""
    shares = merge_weights([candidates[place].tokens for place in places])
    weights = [
        share * rulings[place].factor
        for place, share in zip(places, shares, strict=True)
    ]
    memory.mean.fill(0)
    for place, weight in zip(places, weights, strict=True):
        decode_add(*read(place), memory.mean, weight)
    length = memory.norm(memory.mean)
    for place, weight in zip(places, weights, strict=True):
        norm = candidates[place].norm
        cosine = _cosine(read(place), norm, weight, length, memory)
        rulings[place] = replace(rulings[place], cosine=cosine)
    known = {place: rulings[place].cosine for place in places}
    cosines = {place: cosine for place, cosine in known.items() if cosine is not None}
    if not cosines:
        return False
    worst = min(cosines, key=cosines.__getitem__)
    if cosines[worst] >= _lowest(list(cosines.values())):
        return False
    reason = f"against the rest of its round: cosine {cosines[worst]:.2f}"
    rulings[worst] = replace(rulings[worst], reason=reason)
    return True


def _lowest(cosines: Sequence[float]) -> float:
    """Return the cosine below which a submission is out of line in its round."""
    middle = median(cosines)
    spread = median([abs(cosine - middle) for cosine in cosines])
    return min(0.0, middle - SPREADS * max(spread, LEAST_SPREAD))


def _cosine(
    payload: tuple[Codec, Bytes],
    norm: float,
    weight: float,
    length: float,
    memory: _Memory,
) -> float | None:
    """Return the cosine of a payload with the rest of a mean.

    `norm` is its own, `length` that of the mean, `weight` of it is part of the mean.
    None where one of them is zeros, or a number overflows. The product m'y is that of
    |m + c y|^2 = |m|^2 + c^2 |y|^2 + 2 c m'y, with c so that both are as long.
    """
    scale = np.float32(length / norm) if norm > 0.0 else np.float32(0.0)
    if not 0.0 < scale < math.inf or length == math.inf:
        return None
    np.copyto(memory.both, memory.mean)
    decode_add(*payload, memory.both, float(scale))
    own = float(scale) * norm
    product = (memory.norm(memory.both) ** 2 - length**2 - own**2) / (2 * float(scale))
    of_rest = length**2 - 2 * weight * product + (weight * norm) ** 2
    if not 0.0 < of_rest < math.inf:
        return None
    return (product - weight * norm**2) / (norm * math.sqrt(of_rest))
