"""Conversion of flat vectors to 16-bit floats and back: bf16 and fp16.

To nearest, halves to even; a NaN stays one. With `finite`, what would not come out
finite is refused in the same pass: a NaN, an infinity, or a number that is too large
for the narrow type.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.codecs import NonFiniteError, Vector, flat
from bitnet_ext.isa import kernels as _kernels
from bitnet_ext.memory import destination

Bits = NDArray[np.uint16]


class Half(StrEnum):
    """The two 16-bit floats."""

    BF16 = "bf16"  #: the upper half of a float32: its range, 8 bits of precision
    FP16 = "fp16"  #: IEEE half: up to 65504, 11 bits of precision


def to_half(
    kind: Half, vector: Vector, *, out: Bits | None = None, finite: bool = False
) -> Bits:
    """Return the bits of float32 (n,), uint16 (n,), in `out` where it is given.

    Raises NonFiniteError where `finite` forbids a number; `out` is then undefined.
    """
    vector = flat(vector, "vector")
    out = destination(out, vector.shape, np.uint16)
    status = _kernels.to_half(vector, out, kind is Half.BF16)
    if status and finite:
        raise NonFiniteError(f"vector must hold finite numbers that {kind} can hold")
    return out


def from_half(
    kind: Half, bits: Bits, *, out: Vector | None = None, finite: bool = False
) -> Vector:
    """Return the float32 (n,) of bits uint16 (n,); exact. As `to_half` otherwise."""
    if bits.ndim != 1 or bits.dtype != np.uint16:
        raise ValueError(f"bits must be a uint16 vector, got {bits.dtype} {bits.shape}")
    out = destination(out, bits.shape, np.float32)
    status = _kernels.from_half(np.ascontiguousarray(bits), out, kind is Half.BF16)
    if status and finite:
        raise NonFiniteError(f"bits must stand for finite numbers of {kind}")
    return out
