"""The coordinator's outer step, from payloads to new weights, in one pass.

The weighted mean G of the submissions, Nesterov momentum and the search for what is
not finite go over the vectors once, in blocks of 4,096 numbers. Each number goes
through the same float32 operations in the same order, on every CPU and for every
number of threads:

    G         <- mean + share * decoded        one submission after the other
    momentum  <- decay * momentum + G
    weights   <- weights - rate * (decay * momentum + G)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from bitnet_ext.codecs import Bytes, Codec, Vector, check_status, flat, of_length
from bitnet_ext.isa import kernels as _kernels
from bitnet_ext.memory import check_contiguous

#: Submissions that one step takes; what is more goes into `mean` first.
MOST_PARTS: Final = _kernels.most_parts()
#: Codecs that it reads; the numbers of any other go into `mean` first.
IN_ONE_PASS: Final = frozenset((Codec.FP32, Codec.INT8))


@dataclass(frozen=True, slots=True)
class Part:
    """One submission: its payload, and the factor of its numbers."""

    codec: Codec
    payload: Bytes
    share: float


@dataclass(frozen=True, slots=True)
class Step:
    """What is the same for all numbers of one step."""

    rate: float
    decay: float
    #: At most this many are used.
    threads: int = 1


def outer_step(
    before: tuple[Vector, Vector],
    parts: Sequence[Part],
    step: Step,
    *,
    after: tuple[Vector, Vector],
    mean: Vector | None = None,
) -> bool:
    """Write new weights and momentum to `after`; return whether they are finite.

    `before` and `after` are weights and momentum, float32 (n,); `after` must be other
    memory. `mean` is what was added up before, None for nothing. Raises PayloadError
    or NonFiniteError for a payload that is not in order, as `decode` does; `after` is
    then undefined. Raises ValueError for a codec that is not among `IN_ONE_PASS`.
    """
    for part in parts:
        if part.codec not in IN_ONE_PASS:
            raise ValueError(f"codec must be fp32 or int8, got {part.codec}")
    weights, momentum = flat(before[0], "weights"), flat(before[1], "momentum")
    for name, vector in zip(("new weights", "new momentum"), after, strict=True):
        check_contiguous(vector, name, weights.shape, np.float32)
    payloads = [of_length(part.codec, part.payload, weights.size) for part in parts]
    status, overflows = _kernels.outer_step(
        payloads,
        [part.codec is Codec.INT8 for part in parts],
        np.array([part.share for part in parts], dtype=np.float32),
        mean,
        (weights, momentum),
        step.rate,
        step.decay,
        after,
        step.threads,
    )
    check_status(status, "payload")
    return not overflows
