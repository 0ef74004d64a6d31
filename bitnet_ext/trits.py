"""The payload of the `ternary` codec: 1.44 bits a number.

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
#: Large numbers in a block at most.
MOST_LARGE: Final = 96

Vector = NDArray[np.float32]
Payload = NDArray[np.uint8]


def num_bytes(num_elements: int) -> int:
    """Return the length of the payload of that many numbers."""
    num_blocks = -(-num_elements // BLOCK)
    return (2 + MOST_LARGE // 8) * num_blocks + -(-num_elements // 8)


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
    return _kernels.encode_trits(vector, minus, residual, payload, lost)


def check(payload: Payload, num_elements: int) -> int:
    """Return the status of a payload of the right length: is all of it as written?"""
    return _kernels.check_trits(payload, num_elements)


def add(payload: Payload, weight: float, into: Vector) -> None:
    """Add `weight` times the numbers of a sound payload to `into`, float32 (n,).

    The product is rounded once, and the sum once, as float32.
    """
    _kernels.add_trits(payload, weight, into)


def dot(payload: Payload, vector: Vector) -> float:
    """Return the sum of products of a sound payload with a vector, float32 (n,)."""
    return _kernels.dot_trits(payload, vector)
