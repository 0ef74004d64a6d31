"""The payload of the `ternary` codec: 1.44 bits a number, in NumPy.

For each block of 256 numbers the size that its large ones share, as bf16; then, for
all blocks, a bit for each number, 1 where it is large; then 96 bits for each block, the
signs of its large numbers in order, 1 for minus. The lowest bit of a byte is the first.

A number is large when it exceeds 0.7 times the mean size in its block (Li et al. 2016,
1605.04711) and is among the 96 largest; of equals the first are. Every sum is of
doubles, in a tree of a fixed form: the same bytes on every CPU. `codecs` is the door;
nothing else calls this.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.isa import kernels as _kernels

BLOCK: Final = 256
#: Largest size of a block: decoded numbers stay far from overflow.
MAX_SIZE: Final = 2.0**100
#: Large numbers in a block at most, and bytes of their signs.
MOST_LARGE: Final = 96
_SIGN_BYTES: Final = MOST_LARGE // 8
_BLOCK_BYTES: Final = BLOCK // 8
_THRESHOLD: Final = np.float32(0.7)
#: Blocks that are worked on at a time, to spare memory.
_STRETCH_BLOCKS: Final = 1024
_STRETCH: Final = _STRETCH_BLOCKS * BLOCK
_SMALLEST: Final = np.finfo(np.float32).smallest_normal
_PLACES: Final = np.arange(MOST_LARGE)

Vector = NDArray[np.float32]
Payload = NDArray[np.uint8]
Flags = NDArray[np.bool_]

# As `enum status` in kernels_core.h.
_FINE, _NOT_FINITE, _TOO_LARGE, _MALFORMED = 0, 2, 3, 4


def num_bytes(num_elements: int) -> int:
    """Return the length of the payload of that many numbers."""
    num_blocks = _num_blocks(num_elements)
    return (2 + _SIGN_BYTES) * num_blocks + -(-num_elements // 8)


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
    sizes, bits, signs = _parts(payload, vector.size)
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
        large, size_B = _rounded(blocks, whole.size)
        if (size_B > MAX_SIZE).any():
            return _TOO_LARGE
        at = slice(start // BLOCK, start // BLOCK + len(blocks))
        negative = np.signbit(blocks[large])
        sizes[at] = size_B.view(np.uint32) >> 16
        num_bits = -(-whole.size // 8)
        bits[start // 8 :][:num_bits] = _packed(large)[:num_bits]
        signs[at] = _in_places(large, negative)
        if lost is not None:
            blocks[large] -= _values(large, negative, size_B)
            lost[part] = blocks.reshape(-1)[: whole.size]
    return _FINE


def check(payload: Payload, num_elements: int) -> int:
    """Return the status of a payload of the right length: is all of it as written?"""
    sizes, bits, signs = _parts(payload, num_elements)
    size_B = _sizes(sizes)
    if not np.isfinite(size_B).all():
        return _NOT_FINITE
    wrong = (sizes >= 0x8000) | ((size_B < _SMALLEST) & (sizes > 0))
    if (wrong | (size_B > MAX_SIZE)).any():
        return _MALFORMED
    if num_elements % 8 and bits[-1] >> num_elements % 8:
        return _MALFORMED
    counts = _counts(bits, len(sizes))
    if (counts > MOST_LARGE).any() or ((counts > 0) != (sizes > 0)).any():
        return _MALFORMED
    unused = np.packbits(counts[:, None] <= _PLACES, axis=1, bitorder="little")
    return _MALFORMED if (signs & unused).any() else _FINE


def add(payload: Payload, weight: float, into: Vector) -> None:
    """Add `weight` times the numbers of a sound payload to `into`, float32 (n,).

    The product is rounded once, and the sum once, as float32.
    """
    sizes, bits, signs = _parts(payload, into.size)
    size_B = _sizes(sizes) * np.float32(weight)
    for start in range(0, into.size, _STRETCH):
        part = into[start : start + _STRETCH]
        at = slice(start // BLOCK, start // BLOCK + _num_blocks(part.size))
        large = _unpacked(bits[start // 8 :][: -(-part.size // 8)])
        negative = np.unpackbits(signs[at], axis=1, bitorder="little")
        counts = large.sum(1)
        of_large = negative[counts[:, None] > _PLACES].astype(bool)
        part[large.reshape(-1)[: part.size]] += _values(large, of_large, size_B[at])


def _num_blocks(num_elements: int) -> int:
    return -(-num_elements // BLOCK)


def _parts(
    payload: Payload, num_elements: int
) -> tuple[NDArray[np.uint16], Payload, Payload]:
    """Return sizes (B,), bits (ceil(n / 8),) and signs (B, 12): views."""
    num_blocks = _num_blocks(num_elements)
    sizes, bits, signs = np.split(
        payload, (2 * num_blocks, 2 * num_blocks + -(-num_elements // 8))
    )
    return sizes.view("<u2"), bits, signs.reshape(num_blocks, _SIGN_BYTES)


def _sizes(bits: NDArray[np.uint16]) -> Vector:
    """Return the float32 of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(blocks: Vector, num_elements: int) -> tuple[Flags, Vector]:
    """Return which numbers are large, and the size of each block.

    `blocks` is (B, 256), the last filled up with zeros from `num_elements` on.
    """
    heights = np.abs(blocks)
    num_B = np.full(len(blocks), BLOCK)
    num_B[-1] = num_elements - BLOCK * (len(blocks) - 1)
    mean_B = (_sums(heights.astype(np.float64)) / num_B).astype(np.float32)
    large = heights > (_THRESHOLD * mean_B)[:, None]
    _keep_largest(large, heights)
    num_large_B = np.maximum(large.sum(1), 1)
    size_B = _sums(np.where(large, heights, 0.0)) / num_large_B
    size_B = _as_bf16(size_B.astype(np.float32))
    size_B[size_B < _SMALLEST] = 0.0
    large &= (size_B > 0)[:, None]
    return large, size_B


def _keep_largest(large: Flags, heights: Vector) -> None:
    """Leave the MOST_LARGE highest of each block, of equals the first."""
    crowded = np.flatnonzero(large.sum(1) > MOST_LARGE)
    heights = heights[crowded]
    last = BLOCK - MOST_LARGE
    bound = np.partition(heights, last, axis=1)[:, last, None]
    kept = heights >= bound
    ties = np.flatnonzero(kept.sum(1) > MOST_LARGE)
    if len(ties):
        above, equal = heights[ties] > bound[ties], heights[ties] == bound[ties]
        room = MOST_LARGE - above.sum(1, keepdims=True)
        kept[ties] = above | (equal & (equal.cumsum(1) <= room))
    large[crowded] = kept


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


def _values(large: Flags, negative: Flags, size_B: Vector) -> Vector:
    """Return the large numbers of all blocks in order, as they decode."""
    sizes = np.repeat(size_B, large.sum(1))
    return np.where(negative, -sizes, sizes)


def _in_places(large: Flags, negative: Flags) -> Payload:
    """Return the signs of the large numbers, each block in its own bytes."""
    places = np.zeros((len(large), MOST_LARGE), dtype=np.bool_)
    places[large.sum(1)[:, None] > _PLACES] = negative
    return np.packbits(places, axis=1, bitorder="little")


def _packed(large: Flags) -> Payload:
    return np.packbits(large.reshape(-1), bitorder="little")


def _unpacked(bits: Payload) -> Flags:
    """Return the bits of whole blocks, (B, 256); what the last one lacks is False."""
    whole = np.pad(bits, (0, -bits.size % _BLOCK_BYTES))
    return np.unpackbits(whole, bitorder="little").reshape(-1, BLOCK).astype(bool)


def _counts(bits: Payload, num_blocks: int) -> NDArray[np.int64]:
    """Return how many bits of each block are 1."""
    whole = np.pad(bits, (0, -bits.size % _BLOCK_BYTES))
    ones = np.bitwise_count(whole).reshape(num_blocks, _BLOCK_BYTES)
    counts: NDArray[np.int64] = ones.sum(1, dtype=np.int64)
    return counts
