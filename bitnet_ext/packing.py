"""Packing of ternary values: 2 bits each, or five to a byte.

`pack` writes rows of four to a byte, lowest bits first:

| code | value |
|---|---|
| 0b00 | 0 |
| 0b01 | +1 |
| 0b10 | -1 |
| 0b11 | never written, refused |

Each row starts on a byte of its own; what is left of its last byte is zero.

`pack3` writes a flat vector in blocks of 320 values, which are five planes of 64: byte
i of a block stands for the values i, 64 + i, ..., 256 + i. With v the number from 0 to
242 whose base-3 digits are these values plus one, the first plane first, the byte is
ceil(v * 256 / 243): then the digits are what carries out of a byte when it is tripled,
again and again. 13 bytes are never written, and refused. The last block may hold r
values: its planes are ceil(r / 5) wide, and what they lack counts as zeros.

So in both forms a matrix or a vector has exactly one packed form.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.isa import kernels as _kernels
from bitnet_ext.memory import destination

VALUES_PER_BYTE: Final = 4
#: Values in a byte, and bytes of a whole block, of `pack3`.
PLANES: Final = 5
PLANE: Final = 64

Values = NDArray[np.int8]
Packed = NDArray[np.uint8]


class PackingError(ValueError):
    """Values that are not ternary, or bytes that no packing writes."""


def packed_width(num_columns: int) -> int:
    """Return how many bytes a row of that many values takes."""
    return -(-num_columns // VALUES_PER_BYTE)


def packed3_bytes(num_values: int) -> int:
    """Return how many bytes `pack3` makes of that many values."""
    return -(-num_values // PLANES)


def pack(values_NK: Values, *, out: Packed | None = None) -> Packed:
    """Return the packed rows, uint8 (N, ceil(K / 4)), of values int8 (N, K).

    They go into `out` where it is given. Raises PackingError when a value is not
    -1, 0 or 1; `out` is then undefined.
    """
    if values_NK.ndim != 2 or values_NK.dtype != np.int8:
        raise PackingError(
            f"values must be int8 (N, K), got {values_NK.dtype} {values_NK.shape}"
        )
    num_rows, num_columns = values_NK.shape
    out = destination(out, (num_rows, packed_width(num_columns)), np.uint8)
    if _kernels.pack2(np.ascontiguousarray(values_NK), out):
        raise _not_ternary(values_NK)
    return out


def unpack(packed_NB: Packed, num_columns: int, *, out: Values | None = None) -> Values:
    """Return the values, int8 (N, K), of packed rows uint8 (N, ceil(K / 4)).

    They go into `out` where it is given. Raises PackingError for the fourth code,
    for a last byte whose rest is not zero (`out` is then undefined), and for rows of
    another width.
    """
    if packed_NB.ndim != 2 or packed_NB.dtype != np.uint8:
        raise PackingError(
            f"packed must be uint8 (N, B), got {packed_NB.dtype} {packed_NB.shape}"
        )
    num_rows, width = packed_NB.shape
    if num_columns < 0 or width != packed_width(num_columns):
        raise PackingError(
            f"packed rows must have {packed_width(num_columns)} bytes for "
            f"{num_columns} columns, got {width}"
        )
    out = destination(out, (num_rows, num_columns), np.int8)
    if _kernels.unpack2(np.ascontiguousarray(packed_NB), out):
        raise PackingError("packed holds a code or a padding that is never written")
    return out


def pack3(values: Values, *, out: Packed | None = None) -> Packed:
    """Return the bytes, uint8 (ceil(n / 5),), of values int8 (n,).

    As `pack` otherwise.
    """
    if values.ndim != 1 or values.dtype != np.int8:
        raise PackingError(
            f"values must be int8 (n,), got {values.dtype} {values.shape}"
        )
    out = destination(out, (packed3_bytes(values.size),), np.uint8)
    if _kernels.pack3(np.ascontiguousarray(values), out):
        raise _not_ternary(values)
    return out


def unpack3(packed: Packed, num_values: int, *, out: Values | None = None) -> Values:
    """Return the values, int8 (n,), of bytes uint8 (ceil(n / 5),).

    Raises PackingError for a byte that is never written, for one that stands for
    more than zeros past the end, and for another length. As `unpack` otherwise.
    """
    if packed.ndim != 1 or packed.dtype != np.uint8:
        raise PackingError(
            f"packed must be uint8 (b,), got {packed.dtype} {packed.shape}"
        )
    if num_values < 0 or packed.size != packed3_bytes(num_values):
        raise PackingError(
            f"packed must have {packed3_bytes(num_values)} bytes for {num_values} "
            f"values, got {packed.size}"
        )
    out = destination(out, (num_values,), np.int8)
    if _kernels.unpack3(np.ascontiguousarray(packed), out):
        raise PackingError("packed holds a byte or a padding that is never written")
    return out


def _not_ternary(values: Values) -> PackingError:
    worst = values[np.abs(values.astype(np.int16)) > 1][0]
    return PackingError(f"values must be -1, 0 or 1, got {worst}")
