"""The first weights of a run: seeded, scaled, never zero."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.layout import ModelShape, SegmentKind, num_params, segments

#: Standard deviation of a normal init (Radford et al. 2019).
STANDARD_DEVIATION: Final = 0.02


def initial_weights(shape: ModelShape, seed: int) -> NDArray[np.float32]:
    """Return a flat float32 vector in the order of the layout.

    Normal with deviation 0.02; norm gains 1; linears that write to the residual
    stream are divided by sqrt(2 * layers), so that its variance does not grow with
    depth. All-zero weights could never train: every gradient would be zero.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    flat = np.empty(num_params(shape), dtype=np.float32)
    for segment in segments(shape):
        place = flat[segment.offset : segment.offset + segment.size]
        if segment.kind is SegmentKind.NORM:
            place[:] = 1.0
            continue
        deviation = STANDARD_DEVIATION
        if segment.kind is SegmentKind.RESIDUAL:
            deviation /= math.sqrt(2 * shape.num_layers)
        random.standard_normal(dtype=np.float32, out=place)
        place *= np.float32(deviation)
    return flat
