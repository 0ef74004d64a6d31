"""The guards of a round: which submissions are merged, and how much of each.

Pure rules on the submissions of one round, in the order in which they are merged:

- a norm that is large for its round is clipped
- what points against the rest of its round is left out, the worst first
- zeros among others are left out
- a worker that is left out again and again is to be quarantined

The mean is made of float32 operations, one number after the other; norms and products
of exact ones in float64, summed in a fixed order. So a round that is closed again is
judged the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

import numpy as np

from bitnet_ext.codecs import Bytes, Codec, Vector, decode_add, decode_dot
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
#: Once a run has warmed up, sizes are divided by no less than this share of its peak
#: rate: what codecs rounded away at higher rates comes with the last submissions.
LEAST_RATE_SHARE: Final = 0.2
#: And by no less than this one.
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

    The rate is that of `tokens` after `tokens_before`, those behind its base version.
    Local steps add up like a random walk, each as long as the rate lets it be. Where
    a schedule goes to zero the payload does not: it holds what was left of earlier
    ones. A gradient is a mean, whatever its tokens.
    """
    if plan.round_kind is RoundKind.GRADIENT:
        return norm
    ends = (tokens_before, tokens_before + tokens)
    rate = sum(learning_rate_at(plan, tokens_accepted) for tokens_accepted in ends) / 2
    if tokens_before >= plan.warmup_tokens:
        rate = max(rate, LEAST_RATE_SHARE * plan.learning_rate)
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
    rulings = _by_size([candidate.size for candidate in candidates], recent)
    mean = np.empty(num_elements, dtype=np.float32)
    while places := _left(rulings):
        weights = _weights(candidates, rulings, places)
        mean_norm = norm_of(_added_up(weights, read, mean), threads=threads)
        for place, weight in weights.items():
            norms = candidates[place].norm, mean_norm
            cosine = _cosine(read(place), mean, weight, norms)
            rulings[place] = replace(rulings[place], cosine=cosine)
        if not _drop_worst(rulings, places):
            return Judgement(rulings=rulings, mean=mean)
    return Judgement(rulings=rulings, mean=None)


def keeps_failing(left_out: Sequence[bool]) -> bool:
    """Return whether a worker is to be quarantined: 5 of its last 8 were left out."""
    return sum(left_out[-NUM_JUDGED:]) >= MOST_LEFT_OUT


def _by_size(sizes: Sequence[float], recent: Sequence[float]) -> list[Ruling]:
    """Return what sizes alone say of each submission."""
    reasons = map(_of_odd_size(sizes), sizes)
    return [
        Ruling(factor=factor, reason=reason)
        for factor, reason in zip(_factors(sizes, recent), reasons, strict=True)
    ]


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


def _left(rulings: Sequence[Ruling]) -> list[int]:
    """Return the places of what is left; none where that can't judge one another."""
    places = [place for place, ruling in enumerate(rulings) if ruling.reason is None]
    enough = len(places) >= FEWEST and 2 * len(places) > len(rulings)
    return places if enough else []


def _weights(
    candidates: Sequence[Candidate], rulings: Sequence[Ruling], places: Sequence[int]
) -> dict[int, float]:
    """Return by place how much of each is part of the mean, as it will be merged."""
    shares = merge_weights([candidates[place].tokens for place in places])
    return {
        place: share * rulings[place].factor
        for place, share in zip(places, shares, strict=True)
    }


def _added_up(weights: Mapping[int, float], read: Read, mean: Vector) -> Vector:
    """Return `mean` with what is left written over it, in order."""
    mean.fill(0)
    for place, weight in weights.items():
        decode_add(*read(place), mean, weight)
    return mean


def _drop_worst(rulings: list[Ruling], places: Sequence[int]) -> bool:
    """Leave out the one that is most against the rest; False: none is bad."""
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
    mean: Vector,
    weight: float,
    norms: tuple[float, float],
) -> float | None:
    """Return the cosine of a payload with the rest of a mean.

    `weight` of it is part of the mean; `norms` are its own and that of the mean. None
    where one of them is zeros, or a number overflows.
    """
    norm, length = norms
    if norm == 0.0 or not 0.0 < length < math.inf:
        return None
    product = decode_dot(*payload, mean)
    of_rest = length**2 - 2 * weight * product + (weight * norm) ** 2
    if not 0.0 < of_rest < math.inf:
        return None
    return (product - weight * norm**2) / (norm * math.sqrt(of_rest))
