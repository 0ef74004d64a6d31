"""Encoding into given memory: differences, feedback in place, large vectors."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_ext import reference
from bitnet_ext.codecs import (
    Codec,
    decode,
    encode,
    encode_into,
    encode_with_feedback,
    payload_bytes,
)

SIZES = [0, 1, 255, 256, 257, 1000, 4096]


def normal(size, seed=0):
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("codec", Codec)
def test_a_difference_is_encoded_as_if_it_had_been_made_before(codec, size):
    base, trained, residual = (normal(size, seed) for seed in range(3))
    payload = np.empty(payload_bytes(codec, size), dtype=np.uint8)
    lost = np.empty(size, dtype=np.float32)

    encode_into(codec, base, payload, minus=trained, residual=residual, lost=lost)

    before = encode_with_feedback(codec, base - trained, residual)
    assert payload.tobytes() == before[0]
    np.testing.assert_array_equal(lost, 0.0 if before[1] is None else before[1])


def test_what_is_lost_may_replace_the_residual():
    vector, residual = normal(700), normal(700, seed=1)
    payload = np.empty(payload_bytes(Codec.INT8, 700), dtype=np.uint8)
    _, due = encode_with_feedback(Codec.INT8, vector, residual)

    encode_into(Codec.INT8, vector, payload, residual=residual, lost=residual)

    np.testing.assert_array_equal(residual, due)


@pytest.mark.usefixtures("isa")
def test_numbers_half_a_step_off_are_rounded_as_the_quotient_is():
    # Steps of 0.1: ratios by the inverse fall on the other side of some halves.
    vector = (np.arange(-127, 128, 0.5) * np.float32(0.1)).astype(np.float32)

    assert encode(Codec.INT8, vector) == reference.encode_int8(vector)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shift", [0, 4, 13, 60])
def test_a_large_vector_is_written_past_the_caches_and_nowhere_else(shift):
    size = (9 << 20) + 137
    base, trained = normal(size), normal(size, seed=1)
    start = 64 + shift
    length = payload_bytes(Codec.INT8, size)
    memory = np.full(length + 200, 99, dtype=np.uint8)
    rest = np.full(size + 50, 99, dtype=np.float32)
    back = np.full(size + 50, 99, dtype=np.float32)
    payload, lost = memory[start : start + length], rest[shift % 32 :][:size]
    decoded = back[shift % 16 + 1 :][:size]

    encode_into(Codec.INT8, base, payload, minus=trained, lost=lost)
    decode(Codec.INT8, payload, size, out=decoded)

    np.testing.assert_array_equal(decoded, reference.decode_int8(payload, size))
    np.testing.assert_array_equal(lost, (base - trained) - decoded)
    assert np.abs(lost).max() <= 0.51 * np.abs(base - trained).max() / 127
    assert (memory[:start] == 99).all()
    assert (memory[start + length :] == 99).all()
    assert (rest[: shift % 32] == 99).all()
    assert (rest[shift % 32 + size :] == 99).all()
    assert (back[: shift % 16 + 1] == 99).all()
    assert (back[shift % 16 + 1 + size :] == 99).all()


@pytest.mark.parametrize(
    ("payload", "lost", "message"),
    [
        (np.empty(6, np.uint8), None, r"payload must be contiguous uint8 \(9,\)"),
        (np.empty(18, np.uint8)[::2], None, "payload must be contiguous"),
        (np.empty(9, np.uint8), np.empty(4, np.float32), r"lost must be .* \(5,\)"),
        (np.empty(9, np.uint8), np.empty(5), "lost must be contiguous float32"),
    ],
)
def test_memory_that_does_not_fit_is_refused(payload, lost, message):
    with pytest.raises(ValueError, match=message):
        encode_into(Codec.INT8, normal(5), payload, lost=lost)
