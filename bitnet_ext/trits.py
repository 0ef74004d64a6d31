"""The payload of the `ternary` codec: 1.66 bits a number, in NumPy.

For each block of 256 numbers the size that its large ones share, all sizes first, as
bf16; then five numbers to a byte, each 0, plus or minus that size:

    byte = c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4,  c = 0 for 0, 1 for +, 2 for -

A number is large when it exceeds 0.7 times the mean size in its block (Li et al.
2016, 1605.04711). Every sum is of doubles, in a tree of a fixed form: the same bytes
on every CPU. `codecs` is the door; nothing else calls this.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.isa import kernels as _kernels

BLOCK: Final = 256
#: Largest size of a block: decoded numbers stay far from overflow.
MAX_SIZE: Final = 2.0**100
#: Numbers in a byte, and how many values a byte has.
PER_BYTE: Final = 5
NUM_BYTES: Final = 3**PER_BYTE
_THRESHOLD: Final = np.float32(0.7)
#: Whole blocks and whole bytes; what is worked on at a time, to spare memory.
_STRETCH: Final = BLOCK * PER_BYTE * 256
_SMALLEST: Final = np.finfo(np.float32).smallest_normal
_PLACES: Final = np.array([1, 3, 9, 27, 81], dtype=np.uint8)
#: The five values of each byte, as float32.
_VALUES: Final = np.array(
    [
        [(0.0, 1.0, -1.0)[byte // place % 3] for place in (1, 3, 9, 27, 81)]
        for byte in range(NUM_BYTES)
    ],
    dtype=np.float32,
)

Vector = NDArray[np.float32]
Payload = NDArray[np.uint8]

# As `enum status` in kernels_core.h.
_FINE, _NOT_FINITE, _TOO_LARGE, _MALFORMED = 0, 2, 3, 4


def num_bytes(num_elements: int) -> int:
    """Return the length of the payload of that many numbers."""
    return 2 * _num_blocks(num_elements) + -(-num_elements // PER_BYTE)


def encode(
    vector: Vector,
    minus: Vector | None,
    residual: Vector | None,
    payload: Payload,
    lost: Vector | None,
) -> int:
    """Write the payload of `vector - minus + residual`, and what it rounds away.

    All vectors are float32 (n,); `lost` may be `residual`. Returns a status: where it
    is not 0, what was written is void.
    """
    sizes = payload[: 2 * _num_blocks(vector.size)].view("<u2")
    packed = payload[2 * len(sizes) :]
    for start in range(0, vector.size, _STRETCH):
        part = slice(start, start + _STRETCH)
        whole = vector[part]
        # An overflow becomes an infinity, which is looked for right after.
        with np.errstate(over="ignore", invalid="ignore"):
            if minus is not None:
                whole = whole - minus[part]
            if residual is not None:
                whole = whole + residual[part]
        if _kernels.check_fp32(np.ascontiguousarray(whole).view(np.uint8)):
            return _NOT_FINITE
        blocks = np.pad(whole, (0, -whole.size % BLOCK)).reshape(-1, BLOCK)
        signs, size_B = _rounded(blocks, whole.size)
        if (size_B > MAX_SIZE).any():
            return _TOO_LARGE
        first = start // BLOCK
        sizes[first : first + len(size_B)] = size_B.view(np.uint32) >> 16
        trits = signs.reshape(-1)[: whole.size]
        first = start // PER_BYTE
        codes = _packed(trits)
        packed[first : first + len(codes)] = codes
        if lost is not None:
            decoded = (signs * size_B[:, None]).reshape(-1)[: whole.size]
            np.subtract(whole, decoded, out=lost[part])
    return _FINE


def check(payload: Payload, num_elements: int) -> int:
    """Return the status of a payload of the right length: is all of it as written?"""
    num_blocks = _num_blocks(num_elements)
    sizes, packed = payload[: 2 * num_blocks].view("<u2"), payload[2 * num_blocks :]
    size_B = _sizes(sizes)
    if not np.isfinite(size_B).all():
        return _NOT_FINITE
    wrong = (sizes >= 0x8000) | ((size_B < _SMALLEST) & (sizes > 0))
    if (wrong | (size_B > MAX_SIZE)).any() or (packed >= NUM_BYTES).any():
        return _MALFORMED
    used = num_elements % PER_BYTE
    if used and packed[-1] >= 3**used:
        return _MALFORMED
    return _FINE


def add(payload: Payload, weight: float, into: Vector) -> None:
    """Add `weight` times the numbers of a sound payload to `into`, float32 (n,).

    The product is rounded once, and the sum once, as float32.
    """
    num_blocks = _num_blocks(into.size)
    size_B = _sizes(payload[: 2 * num_blocks].view("<u2")) * np.float32(weight)
    packed = payload[2 * num_blocks :]
    for start in range(0, into.size, _STRETCH):
        part = into[start : start + _STRETCH]
        first = start // PER_BYTE
        codes = packed[first : first + -(-part.size // PER_BYTE)]
        values = _VALUES[codes].reshape(-1)[: part.size]
        first = start // BLOCK
        values *= np.repeat(size_B[first : first + _STRETCH // BLOCK], BLOCK)[
            : part.size
        ]
        part += values


def _num_blocks(num_elements: int) -> int:
    return -(-num_elements // BLOCK)


def _sizes(bits: NDArray[np.uint16]) -> Vector:
    """Return the float32 of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(blocks: Vector, num_elements: int) -> tuple[Vector, Vector]:
    """Return the values -1, 0, 1 as float32, and the size of each block.

    `blocks` is (B, 256), the last filled up with zeros from `num_elements` on.
    """
    heights = np.abs(blocks)
    num_B = np.full(len(blocks), BLOCK)
    num_B[-1] = num_elements - BLOCK * (len(blocks) - 1)
    mean_B = (_sums(heights.astype(np.float64)) / num_B).astype(np.float32)
    large = heights > (_THRESHOLD * mean_B)[:, None]
    num_large_B = np.maximum(large.sum(1), 1)
    size_B = _sums(np.where(large, heights, 0.0)) / num_large_B
    size_B = _as_bf16(size_B.astype(np.float32))
    size_B[size_B < _SMALLEST] = 0.0
    signs = np.where(large & (size_B > 0)[:, None], np.sign(blocks), np.float32(0))
    return signs, size_B


def _sums(sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum of each row of 256: halves onto halves."""
    while sizes.shape[1] > 1:
        half = sizes.shape[1] // 2
        sizes = sizes[:, :half] + sizes[:, half:]
    return sizes[:, 0]


def _as_bf16(vector: Vector) -> Vector:
    """Return the nearest numbers that bf16 has."""
    bits = np.empty(vector.size, dtype=np.uint16)
    _kernels.to_half(vector, bits, True)
    return _sizes(bits)


def _packed(trits: Vector) -> Payload:
    """Return five values to a byte; what is left of the last byte is zero."""
    codes = (trits + (trits < 0) * np.float32(3)).astype(np.uint8)
    rows = np.pad(codes, (0, -len(codes) % PER_BYTE)).reshape(-1, PER_BYTE)
    packed: Payload = (rows * _PLACES).sum(1, dtype=np.uint8)
    return packed
