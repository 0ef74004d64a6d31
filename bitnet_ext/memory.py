"""Where results go: memory that the caller gives, or new memory at a cache line."""

from __future__ import annotations

from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

#: Bytes of a cache line.
_LINE: Final = 64

Number = TypeVar("Number", bound=np.generic)


def aligned(count: int, dtype: type[Number]) -> NDArray[Number]:
    """Return memory that starts on a cache line: no load of a kernel takes two."""
    size = count * np.dtype(dtype).itemsize
    raw = np.empty(size + _LINE, dtype=np.uint8)
    start = -raw.__array_interface__["data"][0] % _LINE
    return raw[start : start + size].view(dtype)


def destination(
    out: NDArray[Number] | None, shape: tuple[int, ...], dtype: type[Number]
) -> NDArray[Number]:
    """Return `out`, or new memory where it is None; never a copy of what was given.

    Raises ValueError when `out` has another shape or type or is not contiguous.
    """
    if out is None:
        count = 1
        for size in shape:
            count *= size
        return aligned(count, dtype).reshape(shape)
    check_contiguous(out, "out", shape, dtype)
    return out


def check_contiguous(
    array: NDArray[Any], name: str, shape: tuple[int, ...], dtype: type[np.generic]
) -> None:
    """Raise ValueError, naming the array, unless a kernel can write to it."""
    fits = array.shape == shape and array.dtype == dtype and array.flags.c_contiguous
    if not fits:
        raise ValueError(
            f"{name} must be contiguous {np.dtype(dtype)} {shape}, "
            f"got {array.dtype} {array.shape}"
        )
