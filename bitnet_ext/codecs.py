"""How a flat vector becomes payload bytes, and back; every byte is checked.

- `fp32`: the numbers themselves, little-endian
- `int8`: for each block of 256 numbers a float32 scale, all scales first, then one
  int8 for each number; a number is off by at most half a scale
- `ternary`: 1.44 bits a number, see `trits`; only worth it with error feedback

A payload that decodes holds finite numbers only, and nothing is returned or written
before all of it was looked at. With error feedback, what one payload rounds away is
part of the next. `encode_into` does all of it in one pass, and allocates nothing.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext import trits
from bitnet_ext.isa import kernels as _kernels
from bitnet_ext.memory import aligned, check_contiguous, destination

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
    TERNARY = "ternary"  #: a bit a number and 14 bytes for each block of 256

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
    payload = aligned(payload_bytes(codec, vector.size), np.uint8)
    encode_into(codec, vector, payload)
    return payload.tobytes()


def encode_with_feedback(
    codec: Codec, vector: Vector, residual: Vector | None
) -> tuple[bytes, Vector | None]:
    """Return the payload of `vector + residual`, and what it rounded away.

    All are float32 (n,); no residual means zeros. The inputs stay as they are: the
    new residual replaces the old one only once the payload has been accepted. It is
    None where the codec loses nothing. Raises NonFiniteError as `encode` does.
    """
    lost = None if codec is Codec.FP32 else aligned(vector.size, np.float32)
    payload = aligned(payload_bytes(codec, vector.size), np.uint8)
    encode_into(codec, vector, payload, residual=residual, lost=lost)
    return payload.tobytes(), lost


def encode_into(
    codec: Codec,
    vector: Vector,
    payload: NDArray[np.uint8],
    *,
    minus: Vector | None = None,
    residual: Vector | None = None,
    lost: Vector | None = None,
) -> None:
    """Write the payload of `vector - minus + residual` to `payload`, uint8.

    All vectors are float32 (n,); what is None is left out. `lost` gets what is
    rounded away, and may be `residual` itself. Raises NonFiniteError as `encode`
    does; `payload` and `lost` are then undefined. Raises ValueError for another
    length or type.
    """
    vector = flat(vector, "vector")
    minus = _like(minus, vector, "minus")
    residual = _like(residual, vector, "residual")
    length = payload_bytes(codec, vector.size)
    check_contiguous(payload, "payload", (length,), np.uint8)
    if lost is not None:
        check_contiguous(lost, "lost", vector.shape, np.float32)
    match codec:
        case Codec.FP32:
            _write_fp32(vector, minus, residual, payload)
            check_status(_kernels.check_fp32(payload), "vector")
            if lost is not None:
                lost.fill(0)
        case Codec.INT8:
            status = _kernels.encode_int8(vector, minus, residual, payload, lost)
            check_status(status, "vector")
        case Codec.TERNARY:
            status = trits.encode(vector, minus, residual, payload, lost)
            check_status(status, "vector")


def fp32_payload(vector: Vector) -> memoryview:
    """Return what `encode` gives for `fp32`, without a copy: a view of the vector."""
    vector = flat(vector, "vector")
    check_status(_kernels.check_fp32(vector.view(np.uint8)), "vector")
    return vector.view(np.uint8).data.toreadonly()


def decode(
    codec: Codec, payload: Bytes, num_elements: int, *, out: Vector | None = None
) -> Vector:
    """Return the numbers of a payload, float32 (n,): in `out`, or in a new array.

    Raises PayloadError when the length is wrong or a byte is one that no encoder
    writes (-128; a sign that stands for nothing; a scale that is negative, subnormal or
    above MAX_SCALE), and NonFiniteError for a NaN or an infinity; `out` is then
    undefined.
    """
    data = of_length(codec, payload, num_elements)
    out = destination(out, (num_elements,), np.float32)
    match codec:
        case Codec.FP32:
            check_status(_kernels.check_fp32(data), "payload")
            out.view(np.uint8)[:] = data
        case Codec.INT8:
            check_status(_kernels.decode_int8(data, out), "payload")
        case Codec.TERNARY:
            check_status(trits.check(data, num_elements), "payload")
            out.fill(0)
            trits.add(data, 1.0, out)
    return out


def decode_add(codec: Codec, payload: Bytes, into: Vector, weight: float) -> None:
    """Add `weight` times the decoded numbers to `into`, float32 (n,), in place.

    Each step is one float32 operation, rounded once, with `weight` as a float32: the
    same bits on every CPU, and exactly the decoded numbers for weight 1 and zeros.
    `into` is untouched when the payload is refused; errors as in `decode`.
    """
    if not np.isfinite(np.float32(weight)):
        raise ValueError(f"weight must be finite, got {weight}")
    data = checked(codec, payload, into.size)
    match codec:
        case Codec.FP32:
            _kernels.add_fp32(data, weight, into)
        case Codec.INT8:
            _kernels.add_int8(data, weight, into)
        case Codec.TERNARY:
            trits.add(data, weight, into)


def decode_dot(codec: Codec, payload: Bytes, vector: Vector) -> float:
    """Return the inner product of the decoded numbers and `vector`, float32 (n,).

    Products are exact in float64, and summed there in blocks of 4096, each in 16
    lanes: the same bits on every CPU. Not finite where a number of `vector` isn't.
    Errors as in `decode`.
    """
    vector = flat(vector, "vector")
    data = checked(codec, payload, vector.size)
    match codec:
        case Codec.FP32:
            return _kernels.dot_fp32(data, vector)
        case Codec.INT8:
            return _kernels.dot_int8(data, vector)
        case Codec.TERNARY:
            return trits.dot(data, vector)


def is_finite(vector: Vector) -> bool:
    """Return whether no number is NaN or infinite; float32 of any shape."""
    numbers = flat(vector.reshape(-1), "vector")
    return not _kernels.check_fp32(numbers.view(np.uint8))


def flat(vector: Vector, name: str) -> Vector:
    """Return a vector as kernels read it; raises ValueError for another type."""
    if vector.ndim != 1 or vector.dtype != np.float32:
        raise ValueError(
            f"{name} must be a float32 vector, got {vector.dtype} {vector.shape}"
        )
    return np.ascontiguousarray(vector)


def _like(vector: Vector | None, other: Vector, name: str) -> Vector | None:
    if vector is None:
        return None
    vector = flat(vector, name)
    if vector.shape != other.shape:
        raise ValueError(f"{name} must have {other.size} numbers, got {vector.size}")
    return vector


def _write_fp32(
    vector: Vector,
    minus: Vector | None,
    residual: Vector | None,
    payload: NDArray[np.uint8],
) -> None:
    if minus is not None:
        vector = vector - minus
    if residual is not None:
        vector = vector + residual
    payload[:] = vector.astype("<f4", copy=False).view(np.uint8)


def of_length(codec: Codec, payload: Bytes, num_elements: int) -> NDArray[np.uint8]:
    """Return the bytes of a payload; raises PayloadError for another length."""
    data = np.frombuffer(payload, dtype=np.uint8)
    if data.size != payload_bytes(codec, num_elements):
        raise PayloadError(
            f"payload must have {payload_bytes(codec, num_elements)} bytes for "
            f"{num_elements} numbers of {codec}, got {data.size}"
        )
    return data


def checked(codec: Codec, payload: Bytes, num_elements: int) -> NDArray[np.uint8]:
    """Return the bytes of a payload that is wholly in order; errors as in `decode`."""
    data = of_length(codec, payload, num_elements)
    match codec:
        case Codec.FP32:
            check_status(_kernels.check_fp32(data), "payload")
        case Codec.INT8:
            check_status(_kernels.check_int8(data, num_elements), "payload")
        case Codec.TERNARY:
            check_status(trits.check(data, num_elements), "payload")
    return data


# As `enum status` in kernels_core.h.
_NOT_FINITE, _TOO_LARGE = 2, 3


def check_status(status: int, name: str) -> None:
    """Raise what a status of the kernels means."""
    if status == _NOT_FINITE:
        raise NonFiniteError(f"{name} must hold finite numbers only")
    if status == _TOO_LARGE:
        raise NonFiniteError(
            f"{name} must hold no number above 127 * {MAX_SCALE:.3g} in size"
        )
    if status:
        raise PayloadError(f"{name} holds a byte or a scale that is never written")
