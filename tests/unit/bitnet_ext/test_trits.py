"""The ternary codec: its twin, its bounds, and what error feedback makes of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext import reference
from bitnet_ext.codecs import (
    Codec,
    NonFiniteError,
    PayloadError,
    decode,
    decode_add,
    encode,
    encode_with_feedback,
    payload_bytes,
)

TERNARY = Codec.TERNARY
#: Around a byte, the most large numbers of a block, a block, and some of them.
SIZES = [0, 1, 7, 8, 9, 96, 97, 255, 256, 257, 1000, 1280, 1281]


def normal(size, seed=0):
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


vectors = st.lists(st.floats(-1e6, 1e6, width=32), max_size=600).map(
    lambda numbers: np.array(numbers, dtype=np.float32)
)


@pytest.mark.parametrize("size", SIZES)
def test_it_equals_its_twin(size):
    vector = normal(size)

    payload = encode(TERNARY, vector)

    assert payload == reference.encode_ternary(vector)
    np.testing.assert_array_equal(
        decode(TERNARY, payload, size), reference.decode_ternary(payload, size)
    )


@given(vectors)
def test_it_equals_its_twin_on_any_numbers(vector):
    payload = encode(TERNARY, vector)

    assert payload == reference.encode_ternary(vector)
    np.testing.assert_array_equal(
        decode(TERNARY, payload, vector.size),
        reference.decode_ternary(payload, vector.size),
    )


def test_a_long_vector_is_the_same_in_pieces():
    head = 256 * 400
    vector = normal(head + 300)

    payload, lost = encode_with_feedback(TERNARY, vector, None)

    whole = decode(TERNARY, payload, vector.size)
    parts = (vector[:head], vector[head:])
    decoded = [decode(TERNARY, encode(TERNARY, part), part.size) for part in parts]
    np.testing.assert_array_equal(whole, np.concatenate(decoded))
    np.testing.assert_array_equal(lost, vector - whole)
    into = np.zeros(vector.size, dtype=np.float32)
    decode_add(TERNARY, payload, into, 1.0)
    np.testing.assert_array_equal(into, whole)


def test_a_number_takes_1_44_bits():
    assert 8 * payload_bytes(TERNARY, 10**6) / 10**6 == pytest.approx(1.4375, rel=1e-4)


@given(vectors)
def test_at_most_96_of_a_block_are_sent(vector):
    sent = decode(TERNARY, encode(TERNARY, vector), vector.size) != 0

    for start in range(0, vector.size, 256):
        assert sent[start : start + 256].sum() <= 96


def test_the_largest_are_sent():
    vector = normal(256, seed=4)
    order = np.argsort(-np.abs(vector))

    decoded = decode(TERNARY, encode(TERNARY, vector), 256)

    assert (decoded[order[:96]] != 0).all()
    assert not decoded[order[96:]].any()
    np.testing.assert_allclose(
        np.abs(decoded[order[0]]), np.abs(vector[order[:96]]).mean(), rtol=0.004
    )


def test_of_those_that_tie_for_the_last_places_the_first_are_sent():
    vector = np.full(256, -1.0, dtype=np.float32)
    vector[100:190] = 2.0

    decoded = decode(TERNARY, encode(TERNARY, vector), 256)

    assert np.flatnonzero(decoded).tolist() == [*range(6), *range(100, 190)]


few = st.sampled_from([0.0, 1.0, -1.0, 1.5, -2.0])


@given(st.lists(few, min_size=200, max_size=600))
def test_it_equals_its_twin_where_many_tie(numbers):
    vector = np.array(numbers, dtype=np.float32)

    assert encode(TERNARY, vector) == reference.encode_ternary(vector)


@given(vectors)
def test_signs_are_kept_and_no_number_grows_beyond_its_block(vector):
    decoded = decode(TERNARY, encode(TERNARY, vector), vector.size)

    assert (decoded * np.sign(vector) >= 0).all()
    assert np.abs(decoded).max(initial=0) <= np.abs(vector).max(initial=0) * 1.004


@given(vectors)
def test_what_it_rounds_away_is_smaller_than_what_there_was(vector):
    _, lost = encode_with_feedback(TERNARY, vector, None)

    lengths = [np.linalg.norm(part.astype(np.float64)) for part in (lost, vector)]
    assert lengths[0] <= lengths[1] * (1 + 1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_the_residual_is_exactly_what_was_not_sent(size):
    vector, residual = normal(size), normal(size, seed=1)
    copies = vector.copy(), residual.copy()

    payload, lost = encode_with_feedback(TERNARY, vector, residual)

    whole = vector + residual
    assert payload == reference.encode_ternary(whole)
    np.testing.assert_array_equal(lost, whole - decode(TERNARY, payload, size))
    np.testing.assert_array_equal(vector, copies[0])
    np.testing.assert_array_equal(residual, copies[1])


def test_feedback_delivers_everything_in_the_end():
    # A thousand times smaller than its neighbour: alone it would never be sent.
    vector = np.full(256, 0.001, dtype=np.float32)
    vector[0] = 1.0
    total, residual = np.zeros(256, dtype=np.float32), None

    for _ in range(3000):
        payload, residual = encode_with_feedback(TERNARY, vector, residual)
        decode_add(TERNARY, payload, total, 1.0)

    assert decode(TERNARY, encode(TERNARY, vector), 256)[1] == 0.0
    np.testing.assert_allclose(total, 3000 * vector, rtol=0.25)


@pytest.mark.parametrize("height", [1e-30, 1e-7, 1.0, 1e29])
def test_the_size_of_the_numbers_does_not_matter(height):
    vector = normal(512)

    scaled = decode(TERNARY, encode(TERNARY, vector * np.float32(height)), 512)

    plain = decode(TERNARY, encode(TERNARY, vector), 512)
    np.testing.assert_allclose(scaled, plain * np.float32(height), rtol=0.01)


def test_a_block_of_subnormal_numbers_is_sent_as_zeros():
    vector = np.full(256, 1e-40, dtype=np.float32)

    payload, lost = encode_with_feedback(TERNARY, vector, None)

    assert not decode(TERNARY, payload, 256).any()
    np.testing.assert_array_equal(lost, vector)


def test_a_number_too_large_is_not_encoded():
    with pytest.raises(NonFiniteError, match="no number above"):
        encode(TERNARY, np.full(3, 1.3e30 * 127, dtype=np.float32))


def test_a_sum_that_overflows_is_not_encoded():
    most = np.full(300, 3e38, dtype=np.float32)

    with pytest.raises(NonFiniteError, match="finite"):
        encode_with_feedback(TERNARY, most, most)


def damaged(place, value, size=258):
    payload = bytearray(encode(TERNARY, normal(size)))
    payload[place] = value
    return payload, size


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (36, 0b111),  # 258 numbers: the last byte of bits holds two
        (4, 0xFF),  # more large numbers than there are signs
        (-1, 0x80),  # a sign of a large number that there is not
        (36, 0),  # a size, and none that has it
        (1, 0x80 | 0x3F),  # a size below zero
        (1, 0x71),  # a size above 2 ** 100
    ],
)
def test_a_byte_that_no_encoder_writes_is_refused(place, value):
    payload, size = damaged(place, value)
    into = np.zeros(size, dtype=np.float32)

    with pytest.raises(PayloadError, match="never written"):
        decode_add(TERNARY, payload, into, 1.0)

    assert not into.any()


@pytest.mark.parametrize("bits", [0x7F80, 0x7FC0, 0xFF80])
def test_a_size_that_is_not_finite_is_refused(bits):
    payload = bytearray(encode(TERNARY, normal(300)))
    payload[:2] = bits.to_bytes(2, "little")

    with pytest.raises(NonFiniteError):
        decode(TERNARY, payload, 300)


@pytest.mark.parametrize("bits", [0x0001, 0x007F, 0x8000])
def test_a_subnormal_size_and_minus_zero_are_refused(bits):
    payload = bytearray(encode(TERNARY, normal(300)))
    payload[:2] = bits.to_bytes(2, "little")

    with pytest.raises(PayloadError, match="never written"):
        decode(TERNARY, payload, 300)


@given(st.binary(min_size=62, max_size=62))
def test_whatever_decodes_is_finite(payload):
    try:
        vector = decode(TERNARY, payload, 300)
    except PayloadError:
        return
    assert np.isfinite(vector).all()
