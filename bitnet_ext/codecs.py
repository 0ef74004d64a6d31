"""How a flat vector becomes payload bytes, and back; every byte is checked.

- `fp32`: the numbers themselves, little-endian
- `int8`: for each block of 256 numbers a float32 scale, all scales first, then one
  int8 for each number; a number is off by at most half a scale
- `ternary`: 1.66 bits a number, see `trits`; only worth it with error feedback

A payload that decodes holds finite numbers only, and nothing is returned or written
before all of it was looked at. With error feedback, what one payload rounds away is
part of the next.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext import _kernels, trits

#: Numbers that share a scale in an int8 payload; the last block may hold fewer.
BLOCK: Final = 256
#: Largest scale of an int8 block: decoded numbers stay far from overflow.
MAX_SCALE: Final = 2.0**100

Vector = NDArray[np.float32]
Bytes = bytes | bytearray | memoryview


class Codec(StrEnum):
    """The ways to write a flat vector; the number of one goes into a frame."""

    FP32 = "fp32"  #: lossless, 4 bytes a number
    INT8 = "int8"  #: 1 byte a number and 4 for each block of 256
    TERNARY = "ternary"  #: a fifth of a byte a number and 2 for each block of 256

    @property
    def number(self) -> int:
        """The byte that stands for it in a frame; never reused."""
        return _NUMBERS[self]


_NUMBERS: Final = {Codec.FP32: 1, Codec.INT8: 2, Codec.TERNARY: 3}


class PayloadError(ValueError):
    """Bytes that are no payload of their codec, or a vector that makes none."""


class NonFiniteError(PayloadError):
    """A number is NaN or infinite, or too large for the codec."""


def payload_bytes(codec: Codec, num_elements: int) -> int:
    """Return the length of the payload of that many numbers, in bytes."""
    if num_elements < 0:
        raise ValueError(f"num_elements must not be negative, got {num_elements}")
    match codec:
        case Codec.FP32:
            return 4 * num_elements
        case Codec.INT8:
            return num_elements + 4 * -(-num_elements // BLOCK)
        case Codec.TERNARY:
            return trits.num_bytes(num_elements)


def encode(codec: Codec, vector: Vector) -> bytes:
    """Return the payload of a float32 vector (n,).

    Raises NonFiniteError when a number is not finite or too large for the codec.
    """
    return _encode(codec, _flat(vector, "vector"), None, None)


def encode_with_feedback(
    codec: Codec, vector: Vector, residual: Vector | None
) -> tuple[bytes, Vector | None]:
    """Return the payload of `vector + residual`, and what it rounded away.

    All are float32 (n,); no residual means zeros. The inputs stay as they are: the
    new residual replaces the old one only once the payload has been accepted. It is
    None where the codec loses nothing. Raises NonFiniteError as `encode` does.
    """
    vector = _flat(vector, "vector")
    if residual is not None:
        residual = _flat(residual, "residual")
        if residual.shape != vector.shape:
            raise ValueError(
                f"residual must have {vector.size} numbers, got {residual.size}"
            )
    lost = None if codec is Codec.FP32 else np.empty_like(vector)
    return _encode(codec, vector, residual, lost), lost


def decode(codec: Codec, payload: Bytes, num_elements: int) -> Vector:
    """Return the numbers of a payload, float32 (n,): a new array, writable.

    Raises PayloadError when the length is wrong or a byte is one that no encoder
    writes (-128; five values above 242; a scale that is negative, subnormal or
    above MAX_SCALE), and
    NonFiniteError for a NaN or an infinity.
    """
    data = _checked(codec, payload, num_elements)
    match codec:
        case Codec.FP32:
            return data.view("<f4").astype(np.float32)
        case Codec.INT8:
            vector = np.zeros(num_elements, dtype=np.float32)
            _kernels.add_int8(data, 1.0, vector)
            return vector
        case Codec.TERNARY:
            vector = np.zeros(num_elements, dtype=np.float32)
            trits.add(data, 1.0, vector)
            return vector


def decode_add(codec: Codec, payload: Bytes, into: Vector, weight: float) -> None:
    """Add `weight` times the decoded numbers to `into`, float32 (n,), in place.

    Each step is one float32 operation, rounded once, with `weight` as a float32: the
    same bits on every CPU, and exactly the decoded numbers for weight 1 and zeros.
    `into` is untouched when the payload is refused; errors as in `decode`.
    """
    if not np.isfinite(np.float32(weight)):
        raise ValueError(f"weight must be finite, got {weight}")
    data = _checked(codec, payload, into.size)
    match codec:
        case Codec.FP32:
            _kernels.add_fp32(data, weight, into)
        case Codec.INT8:
            _kernels.add_int8(data, weight, into)
        case Codec.TERNARY:
            trits.add(data, weight, into)


def is_finite(vector: Vector) -> bool:
    """Return whether no number is NaN or infinite; float32 of any shape."""
    flat = _flat(vector.reshape(-1), "vector")
    return not _kernels.check_fp32(flat.view(np.uint8))


def to_bf16(vector: Vector) -> NDArray[np.uint16]:
    """Return the bf16 bits of float32 (n,): to nearest, halves to even; NaN stays."""
    vector = _flat(vector, "vector")
    bits = np.empty(vector.size, dtype=np.uint16)
    _kernels.to_bf16(vector, bits)
    return bits


def from_bf16(bits: NDArray[np.uint16]) -> Vector:
    """Return the float32 (n,) of bf16 bits; exact."""
    vector = np.empty(bits.size, dtype=np.float32)
    _kernels.from_bf16(np.ascontiguousarray(bits), vector)
    return vector


def _flat(vector: Vector, name: str) -> Vector:
    if vector.ndim != 1 or vector.dtype != np.float32:
        raise ValueError(
            f"{name} must be a float32 vector, got {vector.dtype} {vector.shape}"
        )
    return np.ascontiguousarray(vector)


def _encode(
    codec: Codec, vector: Vector, residual: Vector | None, lost: Vector | None
) -> bytes:
    match codec:
        case Codec.FP32:
            whole = vector if residual is None else vector + residual
            _check(_kernels.check_fp32(whole.view(np.uint8)), "vector")
            return whole.astype("<f4", copy=False).tobytes()
        case Codec.INT8:
            payload = np.empty(payload_bytes(codec, vector.size), dtype=np.uint8)
            status = _kernels.encode_int8(vector, residual, payload, lost)
            _check(status, "vector")
            return payload.tobytes()
        case Codec.TERNARY:
            payload = np.empty(payload_bytes(codec, vector.size), dtype=np.uint8)
            _check(trits.encode(vector, residual, payload, lost), "vector")
            return payload.tobytes()


def _checked(codec: Codec, payload: Bytes, num_elements: int) -> NDArray[np.uint8]:
    """Return the bytes of a payload that is wholly in order."""
    data = np.frombuffer(payload, dtype=np.uint8)
    if data.size != payload_bytes(codec, num_elements):
        raise PayloadError(
            f"payload must have {payload_bytes(codec, num_elements)} bytes for "
            f"{num_elements} numbers of {codec}, got {data.size}"
        )
    match codec:
        case Codec.FP32:
            _check(_kernels.check_fp32(data), "payload")
        case Codec.INT8:
            _check(_kernels.check_int8(data, num_elements), "payload")
        case Codec.TERNARY:
            _check(trits.check(data, num_elements), "payload")
    return data


# As `enum status` in kernels_core.h.
_NOT_FINITE, _TOO_LARGE = 2, 3


def _check(status: int, name: str) -> None:
    """Raise what a status of the kernels means."""
    if status == _NOT_FINITE:
        raise NonFiniteError(f"{name} must hold finite numbers only")
    if status == _TOO_LARGE:
        raise NonFiniteError(
            f"{name} must hold no number above 127 * {MAX_SCALE:.3g} in size"
        )
    if status:
        raise PayloadError(f"{name} holds a byte or a scale that is never written")
