"""Ternary health: what the forward pass makes of the latent weights of each matrix."""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bitnet_ext.layout import ModelShape, Segment, segments
from bitnet_ext.operands import PackedTernary
from bitnet_ext.ternary import quantise_weight

Vector = NDArray[np.float32]


class MatrixHealth(Struct, frozen=True, kw_only=True):
    """One BitLinear weight, as the model uses it; shares are of its numbers."""

    #: Of its segment, `layers.0.q`.
    name: str
    #: Share of ternary values that are 0.
    zeros: float
    #: Mean of |w|, which the ternary values are multiplied by.
    scale: float
    #: Share of ternary values that are others than in the version before, and by how
    #: much the scale has grown since, as a share; None where there is no such version.
    flips: float | None
    drift: float | None


def examine(
    shape: ModelShape, weights: Vector, before: Vector | None
) -> list[MatrixHealth]:
    """Return the health of each ternary matrix, in layout order.

    `weights` and those of the version `before` are float32 (n,), as published. Takes
    the memory of one matrix.
    """
    return [
        _health(
            part.name,
            _quantised(part, weights),
            None if before is None else _quantised(part, before),
        )
        for part in segments(shape)
        if part.is_linear
    ]


def _quantised(part: Segment, flat: Vector) -> PackedTernary:
    """Return a matrix by the very quantiser of the forward pass."""
    weight_NK = flat[part.offset : part.offset + part.size].reshape(part.shape)
    return quantise_weight(weight_NK).forward


def _health(
    name: str, after: PackedTernary, before: PackedTernary | None
) -> MatrixHealth:
    values_NK = after.values()
    flips = drift = None
    if before is not None:
        flips = float(np.mean(values_NK != before.values()))
        drift = after.scale / before.scale - 1.0
    return MatrixHealth(
        name=name,
        zeros=float(np.mean(values_NK == 0)),
        scale=after.scale,
        flips=flips,
        drift=drift,
    )
