"""Payloads: round trips, bounds, error feedback, and the NumPy twins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext import reference
from bitnet_ext.codecs import (
    BLOCK,
    MAX_SCALE,
    Codec,
    NonFiniteError,
    PayloadError,
    decode,
    decode_add,
    decode_dot,
    encode,
    encode_with_feedback,
    fp32_payload,
    is_finite,
    payload_bytes,
)
from bitnet_ext.isa import active_isa, choose_isa, supported_isas

SIZES = [0, 1, 255, 256, 257, 1000, 4096]


def normal(size, seed=0):
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


def steps(payload, size):
    """Return the scale of each number of an int8 payload."""
    scales = np.frombuffer(payload, "<f4", -(-size // BLOCK))
    return np.repeat(scales, BLOCK)[:size].astype(np.float64)


vectors = st.lists(st.floats(-1e6, 1e6, width=32), max_size=600).map(
    lambda numbers: np.array(numbers, dtype=np.float32)
)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("codec", Codec)
def test_a_payload_has_the_length_that_was_announced(codec, size):
    payload = encode(codec, normal(size))

    assert type(payload) is bytes
    assert len(payload) == payload_bytes(codec, size)
    assert decode(codec, payload, size).shape == (size,)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("size", SIZES)
def test_int8_equals_its_twin(size):
    vector = normal(size)

    payload = encode(Codec.INT8, vector)

    assert payload == reference.encode_int8(vector)
    np.testing.assert_array_equal(
        decode(Codec.INT8, payload, size), reference.decode_int8(payload, size)
    )


@given(vectors)
def test_fp32_loses_nothing(vector):
    payload = encode(Codec.FP32, vector)

    assert payload == vector.tobytes()
    assert decode(Codec.FP32, payload, vector.size).tobytes() == vector.tobytes()


@given(vectors)
def test_int8_is_at_most_half_a_step_off(vector):
    payload = encode(Codec.INT8, vector)

    off = np.abs(decode(Codec.INT8, payload, vector.size) - vector.astype(np.float64))
    # A step below the smallest normal float is sent as 0.
    limit = steps(payload, vector.size) * (0.5 + 1e-5) + 127 * 1.2e-38
    assert (off <= limit).all()
    assert payload == reference.encode_int8(vector)


@given(vectors)
def test_a_decoded_payload_encodes_to_the_same_numbers(vector):
    first = decode(Codec.INT8, encode(Codec.INT8, vector), vector.size)

    second = decode(Codec.INT8, encode(Codec.INT8, first), vector.size)

    np.testing.assert_allclose(second, first, rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("codec", Codec)
def test_a_decoded_vector_is_writable_and_its_own(codec):
    payload = bytearray(encode(codec, normal(300)))

    vector = decode(codec, memoryview(payload), 300)
    before = vector.copy()
    payload[:] = bytes(len(payload))
    vector += 0.0

    np.testing.assert_array_equal(vector, before)


@pytest.mark.parametrize("codec", Codec)
def test_a_payload_may_start_at_any_address(codec):
    payload = encode(codec, normal(300))

    shifted = memoryview(b"x" + payload)[1:]

    np.testing.assert_array_equal(
        decode(codec, shifted, 300), decode(codec, payload, 300)
    )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("size", SIZES)
def test_the_residual_is_exactly_what_was_not_sent(size):
    vector, residual = normal(size), normal(size, seed=1) * np.float32(0.01)
    copies = vector.copy(), residual.copy()

    payload, lost = encode_with_feedback(Codec.INT8, vector, residual)

    whole = vector + residual
    assert payload == reference.encode_int8(whole)
    np.testing.assert_array_equal(lost, whole - decode(Codec.INT8, payload, size))
    np.testing.assert_array_equal(vector, copies[0])
    np.testing.assert_array_equal(residual, copies[1])


def test_no_residual_means_zeros():
    vector = normal(700)

    without = encode_with_feedback(Codec.INT8, vector, None)
    zeros = encode_with_feedback(Codec.INT8, vector, np.zeros_like(vector))

    assert without[0] == zeros[0] == encode(Codec.INT8, vector)
    np.testing.assert_array_equal(without[1], zeros[1])


def test_fp32_sends_an_old_residual_and_leaves_none():
    vector, residual = normal(9), normal(9, seed=1)

    payload, lost = encode_with_feedback(Codec.FP32, vector, residual)

    np.testing.assert_array_equal(decode(Codec.FP32, payload, 9), vector + residual)
    assert lost is None


def test_feedback_makes_up_for_rounding_over_many_rounds():
    # Far below half a step beside the large number: alone it would never arrive.
    vector = np.full(256, 0.001, dtype=np.float32)
    vector[0] = 1.0
    total, residual = np.zeros(256, dtype=np.float32), None

    for _ in range(200):
        payload, residual = encode_with_feedback(Codec.INT8, vector, residual)
        decode_add(Codec.INT8, payload, total, 1.0)

    assert decode(Codec.INT8, encode(Codec.INT8, vector), 256)[1] == 0.0
    np.testing.assert_allclose(total, 200 * vector, rtol=0.03)


def test_a_residual_of_another_length_is_refused():
    with pytest.raises(ValueError, match="residual must have 5 numbers, got 4"):
        encode_with_feedback(Codec.INT8, normal(5), normal(4))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 255, 299])
def test_a_number_that_is_not_finite_is_not_encoded(codec, bad, place):
    vector, residual = normal(300), np.zeros(300, dtype=np.float32)
    vector[place] = bad

    with pytest.raises(NonFiniteError, match="vector must hold finite numbers"):
        encode(codec, vector)
    with pytest.raises(NonFiniteError):
        encode_with_feedback(codec, residual, vector)


def test_a_number_too_large_for_int8_is_not_encoded():
    largest = np.float32(127 * MAX_SCALE)
    fits = np.full(3, largest, dtype=np.float32)

    payload = encode(Codec.INT8, fits)

    np.testing.assert_array_equal(decode(Codec.INT8, payload, 3), fits)
    with pytest.raises(NonFiniteError, match=r"above 127 \* 1.27e\+30"):
        encode(Codec.INT8, fits * np.float32(1.01))


@pytest.mark.parametrize("codec", Codec)
def test_adding_to_zeros_with_weight_one_is_decoding(codec):
    payload, into = encode(codec, normal(777)), np.zeros(777, dtype=np.float32)

    decode_add(codec, payload, into, 1.0)

    np.testing.assert_array_equal(into, decode(codec, payload, 777))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("size", SIZES)
def test_adding_rounds_twice_and_fuses_nothing(codec, size):
    payload, start = encode(codec, normal(size)), normal(size, seed=1)
    into = start.copy()

    decode_add(codec, payload, into, 1 / 3)

    decoded = decode(codec, payload, size)
    expected = reference.decode_add(decoded, start, 1 / 3)
    assert into.tobytes() == expected.tobytes()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("size", [*SIZES, 4097, 20_003])
def test_a_product_is_that_of_the_decoded_numbers_to_the_bit(codec, size):
    payload, vector = encode(codec, normal(size)), normal(size, seed=1)
    copy = vector.copy()

    product = decode_dot(codec, payload, vector)

    decoded = decode(codec, payload, size)
    assert product == reference.decode_dot(decoded, vector)
    assert product == pytest.approx(np.dot(decoded.astype(float), vector), abs=1e-9)
    np.testing.assert_array_equal(vector, copy)


anything = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.sampled_from(Codec), vectors, st.lists(anything, max_size=40))
def test_a_product_is_the_same_on_any_numbers_and_variant(codec, vector, others):
    other = np.resize(np.array(others or [0], dtype=np.float32), vector.size)
    payload = encode(codec, vector)
    decoded = decode(codec, payload, vector.size)
    due = reference.decode_dot(decoded, other)

    before = active_isa()
    found = []
    for name in supported_isas():
        choose_isa(name)
        found.append(decode_dot(codec, payload, other))
    choose_isa(before)
    assert found == [due] * len(found)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("codec", Codec)
def test_a_product_may_start_at_any_address(codec):
    payload, vector = encode(codec, normal(5000)), normal(5003)
    due = reference.decode_dot(decode(codec, payload, 5000), vector[3:])

    shifted = memoryview(b"x" + payload)[1:]

    assert decode_dot(codec, shifted, vector[3:]) == due


@pytest.mark.usefixtures("isa")
def test_products_of_the_largest_numbers_do_not_overflow():
    most = np.full(5000, np.finfo(np.float32).max)

    product = decode_dot(Codec.FP32, encode(Codec.FP32, most), -most)

    assert product == pytest.approx(-5000 * float(most[0]) ** 2)


@pytest.mark.parametrize("codec", Codec)
def test_a_product_with_what_is_not_finite_is_not_finite(codec):
    vector = normal(300)
    vector[7] = np.inf

    assert not np.isfinite(decode_dot(codec, encode(codec, normal(300)), vector))


def test_a_product_of_other_lengths_or_with_a_bad_byte_is_refused():
    payload = bytearray(encode(Codec.INT8, normal(600)))

    with pytest.raises(PayloadError, match="must have 611 bytes for 599 numbers"):
        decode_dot(Codec.INT8, payload, normal(599))
    payload[-1] = 128
    with pytest.raises(PayloadError, match="never written"):
        decode_dot(Codec.INT8, payload, normal(600))


@pytest.mark.parametrize("weight", [np.nan, np.inf, 1e39])
def test_a_weight_that_is_not_finite_is_refused(weight):
    into = np.zeros(3, dtype=np.float32)

    with (
        np.errstate(over="ignore"),
        pytest.raises(ValueError, match="weight must be finite"),
    ):
        decode_add(Codec.FP32, encode(Codec.FP32, normal(3)), into, weight)

    assert not into.any()


def test_a_refused_payload_adds_nothing():
    payload = bytearray(encode(Codec.INT8, normal(600)))
    payload[-1] = 128
    into = normal(600)
    before = into.copy()

    with pytest.raises(PayloadError, match="never written"):
        decode_add(Codec.INT8, payload, into, 1.0)

    np.testing.assert_array_equal(into, before)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("size", [0, 1, 7, 64, 1001])
def test_finite_means_no_number_is_nan_or_infinite(size):
    vector = np.clip(normal(size), -1, 1) * np.float32(3.4e38)
    assert is_finite(vector)

    for place in {0, size // 2, size - 1} if size else ():
        for bad in (np.nan, np.inf, -np.inf):
            broken = vector.copy()
            broken[place] = bad
            assert not is_finite(broken)


def test_finite_looks_into_any_shape():
    matrix = np.zeros((3, 5), dtype=np.float32)
    assert is_finite(matrix)
    matrix[2, 4] = np.inf
    assert not is_finite(matrix)


def test_the_number_of_a_codec_is_its_own():
    assert {codec: codec.number for codec in Codec} == {
        Codec.FP32: 1,
        Codec.INT8: 2,
        Codec.TERNARY: 3,
    }


def test_other_types_are_refused():
    with pytest.raises(ValueError, match=r"float32 vector, got float64 \(3,\)"):
        encode(Codec.INT8, np.zeros(3))
    with pytest.raises(ValueError, match=r"float32 vector, got float32 \(3, 1\)"):
        encode(Codec.FP32, np.zeros((3, 1), dtype=np.float32))
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        decode(Codec.FP32, b"", -1)


def test_the_payload_of_fp32_may_be_a_view():
    vector = normal(9)

    view = fp32_payload(vector)

    assert view.readonly
    assert bytes(view) == encode(Codec.FP32, vector)
    assert np.shares_memory(np.frombuffer(view, np.uint8), vector)
    vector[3] = np.inf
    with pytest.raises(NonFiniteError, match="vector must hold finite numbers"):
        fp32_payload(vector)
