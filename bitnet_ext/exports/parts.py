"""A model as named parts, one for each segment of the layout.

Embeddings and norms are float32; a linear weight is a `TernaryMatrix`, or float32 where
it is still the master weight.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.infer import TernaryMatrix
from bitnet_ext.layout import ModelShape, segments
from bitnet_ext.ternary import quantise_weight

Floats = NDArray[np.float32]
Parts = dict[str, Floats | TernaryMatrix]


def master_parts(shape: ModelShape, flat: Floats) -> Parts:
    """Return views of a flat vector, float32 in the order of the layout."""
    return {
        part.name: flat[part.offset : part.offset + part.size].reshape(part.shape)
        for part in segments(shape)
    }


def ternary_parts(shape: ModelShape, flat: Floats) -> Parts:
    """Return the parts of a flat vector, linear weights quantised as in training."""
    parts = master_parts(shape, flat)
    for part in segments(shape):
        weight = parts[part.name]
        if part.is_linear and not isinstance(weight, TernaryMatrix):
            packed = quantise_weight(weight).forward
            parts[part.name] = TernaryMatrix(packed.values(), packed.scale)
    return parts


def difference(due: Parts, found: Parts) -> str | None:
    """Return the name of the first part that is not what it should be, if one is not.

    Scales may differ by a rounding: some formats hold their inverse.
    """
    for name in sorted(due.keys() | found.keys()):
        if name not in due or name not in found or not _same(due[name], found[name]):
            return name
    return None


def _same(due: Floats | TernaryMatrix, found: Floats | TernaryMatrix) -> bool:
    if isinstance(due, TernaryMatrix) and isinstance(found, TernaryMatrix):
        return abs(found.scale / due.scale - 1) < 1e-6 and np.array_equal(
            due.values, found.values
        )
    if isinstance(due, TernaryMatrix) or isinstance(found, TernaryMatrix):
        return False
    return np.array_equal(due, found)
