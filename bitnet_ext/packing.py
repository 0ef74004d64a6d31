"""2-bit packing of ternary values: four to a byte, lowest bits first.

| code | value |
|---|---|
| 0b00 | 0 |
| 0b01 | +1 |
| 0b10 | -1 |
| 0b11 | never written, refused |

Each row starts on a byte of its own; what is left of its last byte is zero. So a
matrix has exactly one packed form.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext import _kernels

VALUES_PER_BYTE: Final = 4


class PackingError(ValueError):
    """Values that are not ternary, or bytes that no packing writes."""


def packed_width(num_columns: int) -> int:
    """Return how many bytes a row of that many values takes."""
    return -(-num_columns // VALUES_PER_BYTE)


def pack(values_NK: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Return the packed rows, uint8 (N, ceil(K / 4)), of values int8 (N, K).

    Raises PackingError when a value is not -1, 0 or 1.
    """
    if values_NK.ndim != 2 or values_NK.dtype != np.int8:
        raise PackingError(
            f"values must be int8 (N, K), got {values_NK.dtype} {values_NK.shape}"
        )
    values_NK = np.ascontiguousarray(values_NK)
    num_rows, num_columns = values_NK.shape
    packed = np.empty((num_rows, packed_width(num_columns)), dtype=np.uint8)
    if _kernels.pack(values_NK, packed):
        worst = values_NK[np.abs(values_NK.astype(np.int16)) > 1][0]
        raise PackingError(f"values must be -1, 0 or 1, got {worst}")
    return packed


def unpack(packed_NB: NDArray[np.uint8], num_columns: int) -> NDArray[np.int8]:
    """Return the values, int8 (N, K), of packed rows uint8 (N, ceil(K / 4)).

    Raises PackingError for the fourth code, for a last byte whose rest is not zero,
    and for rows of another width.
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
    values = np.empty((num_rows, num_columns), dtype=np.int8)
    if _kernels.unpack(np.ascontiguousarray(packed_NB), values):
        raise PackingError("packed holds a code or a padding that is never written")
    return values
