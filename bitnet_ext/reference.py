"""The plain NumPy twin of every kernel: slow, short, and the meaning of each.

Tests hold the kernels to these bit for bit; nothing else uses them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.codecs import BLOCK, Vector
from bitnet_ext.packing import PLANE, PLANES
from bitnet_ext.ternary import TOKENS, QuantisedRows
from bitnet_ext.trits import MOST_LARGE

#: Numbers that are summed at a time.
STEP_BLOCK = 4096
_LANES = 16
_SMALLEST = np.finfo(np.float32).smallest_normal


def absmean_scale(w_NK: NDArray[np.float32]) -> float:
    """Return the mean of |w|, at least 1e-5; NaN where it is not finite.

    The sum is of doubles in 16 lanes, so that its rounding is the same everywhere.
    """
    sizes = np.abs(w_NK.reshape(-1).astype(np.float64))
    if not sizes.size:
        return float(np.float32(1e-5))
    rows = np.pad(sizes, (0, -sizes.size % _LANES)).reshape(-1, _LANES)
    lanes = np.add.accumulate(rows, axis=0)[-1]
    mean = np.add.accumulate(lanes)[-1] / sizes.size
    if not np.isfinite(mean):
        return float("nan")
    return float(max(np.float32(mean), np.float32(1e-5)))


def ternary_values(w_NK: NDArray[np.float32]) -> NDArray[np.int8]:
    """Return w / scale rounded, halves to even, clipped to -1, 0, 1; int8 (N, K)."""
    scale = np.float32(absmean_scale(w_NK))
    if np.isnan(scale):
        return np.zeros(w_NK.shape, dtype=np.int8)
    values: NDArray[np.int8] = np.clip(np.rint(w_NK / scale), -1, 1).astype(np.int8)
    return values


def quantise_group(x: Vector) -> tuple[NDArray[np.int8], np.float32]:
    """Return int8 values (n,) and the scale of one group of numbers."""
    zeros = np.zeros(x.shape, dtype=np.int8)
    if not np.isfinite(x).all():
        return zeros, np.float32(np.nan)
    largest = np.abs(x).max(initial=np.float32(0))
    scale = largest / np.float32(127)
    if scale < _SMALLEST:
        return zeros, np.float32(0)
    return np.rint(x * (np.float32(127) / largest)).astype(np.int8), scale


def quantise_rows(x_MK: NDArray[np.float32], group: int) -> QuantisedRows:
    """Return the rows in groups of `group` columns."""
    num_rows, num_columns = x_MK.shape
    starts = range(0, num_columns, group)
    q = np.zeros((num_rows, num_columns), dtype=np.int8)
    scale = np.zeros((num_rows, len(starts)), dtype=np.float32)
    for row in range(num_rows):
        for g, start in enumerate(starts):
            part = slice(start, start + group)
            q[row, part], scale[row, g] = quantise_group(x_MK[row, part])
    return QuantisedRows(q, scale, group)


def matmul(
    rows: QuantisedRows,
    values_NK: NDArray[np.int8],
    scale: float,
    into: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Return the product as float32 (M, N): exact in a group, then group by group."""
    total = np.zeros((rows.q.shape[0], values_NK.shape[0]), dtype=np.float32)
    if into is not None:
        total = into
    for g in range(rows.scale.shape[1]):
        part = slice(g * rows.group, (g + 1) * rows.group)
        exact = rows.q[:, part].astype(np.int64) @ values_NK[:, part].T.astype(np.int64)
        scaled = exact.astype(np.float32) * (
            rows.scale[:, g : g + 1] * np.float32(scale)
        )
        total = scaled if g == 0 and into is None else total + scaled
    return total


def weight_gradient(
    dy_MN: NDArray[np.float32],
    rows: QuantisedRows,
    into_NK: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Return dy^T @ rows as float32 (N, K), added to `into` where it is given."""
    left = quantise_rows((dy_MN * rows.scale).T.copy(), TOKENS)
    return matmul(left, rows.q.T, 1.0, into_NK)


def pack(values_NK: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Return 2-bit codes, uint8 (N, ceil(K / 4)), of ternary values int8 (N, K)."""
    codes = np.array([0b00, 0b01, 0b10], dtype=np.uint8)[values_NK]
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 4)))
    first, second, third, fourth = (codes[:, place::4] for place in range(4))
    packed = first | second << 2 | third << 4 | fourth << 6
    return packed.astype(np.uint8)


def unpack(packed_NB: NDArray[np.uint8], num_columns: int) -> NDArray[np.int8]:
    """Return the values, int8 (N, K), of sound 2-bit codes."""
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)
    codes = (packed_NB[:, :, None] >> shifts) & 3
    flat = codes.reshape(packed_NB.shape[0], packed_NB.shape[1] * 4)[:, :num_columns]
    values: NDArray[np.int8] = np.array([0, 1, -1], dtype=np.int8)[flat]
    return values


def pack3(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Return base-3 codes, uint8 (ceil(n / 5),), of ternary values int8 (n,)."""
    parts = []
    for start in range(0, values.size, PLANES * PLANE):
        block = values[start : start + PLANES * PLANE].astype(int)
        block = np.pad(block, (0, -block.size % PLANES)).reshape(PLANES, -1)
        number = 3 ** np.arange(PLANES)[::-1] @ (block + 1)
        parts.append(-(-number * 256 // 243))
    return np.concatenate([np.zeros(0), *parts]).astype(np.uint8)


def unpack3(packed: NDArray[np.uint8], num_values: int) -> NDArray[np.int8]:
    """Return the values of sound base-3 codes, int8 (n,)."""
    parts = []
    for start in range(0, packed.size, PLANE):
        rest, planes = packed[start : start + PLANE].astype(int), []
        for _ in range(PLANES):
            planes.append(3 * rest // 256 - 1)
            rest = 3 * rest % 256
        parts.append(np.concatenate(planes))
    return np.concatenate([np.zeros(0), *parts])[:num_values].astype(np.int8)


def encode_int8(vector: Vector) -> bytes:
    """Return the int8 payload of finite numbers (n,)."""
    blocks = [
        quantise_group(vector[start : start + BLOCK])
        for start in range(0, vector.size, BLOCK)
    ]
    scales = b"".join(scale.astype("<f4").tobytes() for _, scale in blocks)
    return scales + b"".join(q.tobytes() for q, _ in blocks)


def decode_int8(payload: bytes, num_elements: int) -> Vector:
    """Return the numbers (n,) of a sound int8 payload."""
    num_blocks = -(-num_elements // BLOCK)
    scales = np.frombuffer(payload, "<f4", num_blocks)
    q = np.frombuffer(payload, np.int8, num_elements, 4 * num_blocks)
    return np.repeat(scales, BLOCK)[:num_elements] * q.astype(np.float32)


def encode_ternary(vector: Vector) -> bytes:
    """Return the ternary payload of finite numbers (n,)."""
    sizes, large, minus = [], [], []
    for start in range(0, vector.size, BLOCK):
        size, values = ternary_block(vector[start : start + BLOCK])
        sizes.append(int(to_bf16(np.array([size], dtype=np.float32))[0]))
        large += [value != 0 for value in values]
        signs = [value < 0 for value in values if value]
        minus += signs + [False] * (MOST_LARGE - len(signs))
    return np.array(sizes, dtype="<u2").tobytes() + _bits(large) + _bits(minus)


def _bits(flags: list[bool]) -> bytes:
    """Return eight flags to a byte, lowest bits first."""
    return bytes(
        sum(flag << place for place, flag in enumerate(flags[start : start + 8]))
        for start in range(0, len(flags), 8)
    )


def ternary_block(x: Vector) -> tuple[np.float32, list[int]]:
    """Return the size that the large numbers of a block share, and -1, 0, 1 each."""
    heights = np.abs(x)
    mean = np.float32(_tree_sum(heights) / len(x))
    large = heights > np.float32(0.7) * mean
    in_order = sorted(np.flatnonzero(large), key=lambda i: (-heights[i], i))
    large[in_order[MOST_LARGE:]] = False
    mean_large = _tree_sum(np.where(large, heights, 0)) / max(1, int(large.sum()))
    bits = to_bf16(np.array([mean_large], dtype=np.float32))
    size = from_bf16(bits)[0]
    if size < _SMALLEST:
        return np.float32(0), [0] * len(x)
    return size, [
        int(np.sign(one)) if big else 0 for one, big in zip(x, large, strict=True)
    ]


def _tree_sum(sizes: Vector) -> float:
    """Return the sum of at most 256 doubles: halves onto halves, however few."""
    rest = [float(size) for size in sizes] + [0.0] * (BLOCK - len(sizes))
    while len(rest) > 1:
        half = len(rest) // 2
        rest = [rest[i] + rest[i + half] for i in range(half)]
    return rest[0]


def decode_ternary(payload: bytes, num_elements: int) -> Vector:
    """Return the numbers (n,) of a sound ternary payload."""
    num_blocks = -(-num_elements // BLOCK)
    sizes = from_bf16(np.frombuffer(payload, "<u2", num_blocks))
    end = len(payload) - num_blocks * MOST_LARGE // 8
    large, minus = (
        [bool(byte >> place & 1) for byte in part for place in range(8)]
        for part in (payload[2 * num_blocks : end], payload[end:])
    )
    numbers = np.zeros(num_elements, dtype=np.float32)
    for block in range(num_blocks):
        signs = iter(minus[MOST_LARGE * block :])
        for i in range(BLOCK * block, min(BLOCK * (block + 1), num_elements)):
            if large[i]:
                numbers[i] = -sizes[block] if next(signs) else sizes[block]
    return numbers


def decode_add(decoded: Vector, into: Vector, weight: float) -> Vector:
    """Return into + weight * decoded, two float32 roundings for each number."""
    return into + np.float32(weight) * decoded


def decode_dot(decoded: Vector, vector: Vector) -> float:
    """Return the inner product: 16 lanes of doubles for each 4096 numbers."""
    products, total = decoded.astype(np.float64) * vector, 0.0
    for start in range(0, products.size, STEP_BLOCK):
        block = products[start : start + STEP_BLOCK]
        rows = np.pad(block, (0, -block.size % _LANES)).reshape(-1, _LANES)
        lanes = np.add.accumulate(rows, axis=0)[-1]
        total += float(np.add.accumulate(lanes)[-1])
    return total


def outer_step(
    weights: Vector,
    momentum: Vector,
    mean: Vector,
    *,
    rate: float,
    decay: float,
) -> tuple[Vector, Vector]:
    """Return new weights and new momentum, each operation rounded to float32."""
    new_momentum = momentum * np.float32(decay) + mean
    step = (new_momentum * np.float32(decay) + mean) * np.float32(rate)
    return weights - step, new_momentum


def to_bf16(vector: Vector) -> NDArray[np.uint16]:
    """Return the nearest bf16 bits, halves to even; a NaN gets the quiet bit."""
    bits = vector.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    quiet = bits >> 16 | 0x40
    return np.where(np.isnan(vector), quiet, rounded).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> Vector:
    """Return the numbers of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_fp16(vector: Vector) -> NDArray[np.uint16]:
    """Return the nearest fp16 bits, halves to even; a NaN gets the quiet bit."""
    with np.errstate(all="ignore"):
        rounded = vector.astype(np.float16).view(np.uint16)
    bits = vector.view(np.uint32)
    quiet = bits >> 16 & 0x8000 | 0x7E00 | bits >> 13 & 0x3FF
    return np.where(np.isnan(vector), quiet, rounded).astype(np.uint16)


def from_fp16(bits: NDArray[np.uint16]) -> Vector:
    """Return the numbers of fp16 bits; a NaN gets the quiet bit."""
    halves, wide = bits.view(np.float16), bits.astype(np.uint32)
    with np.errstate(all="ignore"):
        numbers = halves.astype(np.float32).view(np.uint32)
    quiet = (wide & 0x8000) << 16 | 0x7FC00000 | (wide & 0x3FF) << 13
    return np.where(np.isnan(halves), quiet, numbers).astype(np.uint32).view(np.float32)
