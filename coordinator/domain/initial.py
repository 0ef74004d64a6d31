"""The first weights of a run: seeded, scaled, never zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.layout import ModelShape, Segment, SegmentKind, segments

#: Standard deviation of a normal init (Radford et al. 2019).
STANDARD_DEVIATION: Final = 0.02


def initial_weights(shape: ModelShape, seed: int) -> NDArray[np.float32]:
    """Return a flat float32 vector in the order of the layout."""
    return initial_vector(segments(shape), shape.num_layers, seed)


def initial_vector(
    parts: Sequence[Segment], num_layers: int, seed: int
) -> NDArray[np.float32]:
    """Return the float32 vector of these segments, one after the other.

    Normal with deviation 0.02; norm gains 1; linears that write to the residual
    stream are divided by sqrt(2 * layers), so that its variance does not grow with
    depth. All-zero weights could never train: every gradient would be zero.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    flat = np.empty(sum(segment.size for segment in parts), dtype=np.float32)
    for segment in parts:
        place = flat[segment.offset : segment.offset + segment.size]
        if segment.kind is SegmentKind.NORM:
            place[:] = 1.0
            continue
        deviation = STANDARD_DEVIATION
        if segment.kind is SegmentKind.RESIDUAL:
            deviation /= math.sqrt(2 * num_layers)
        random.standard_normal(dtype=np.float32, out=place)
        place *= np.float32(deviation)
    return flat
