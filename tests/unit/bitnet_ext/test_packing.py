"""Packing, 2 bits and base 3: the tables, the padding, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext import reference
from bitnet_ext.packing import (
    PackingError,
    pack,
    pack3,
    packed3_bytes,
    packed_width,
    unpack,
    unpack3,
)


def ternary(shape, seed=0):
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.int8)


def test_the_table_is_zero_plus_minus_from_the_lowest_bits():
    packed = pack(np.array([[0, 1, -1, 1, -1]], dtype=np.int8))

    assert packed.tolist() == [[0b01_10_01_00, 0b10]]


@given(st.integers(0, 9), st.integers(0, 70), st.integers(0, 99))
def test_packing_equals_its_twin_and_comes_back(rows, columns, seed):
    values = ternary((rows, columns), seed)

    packed = pack(values)

    np.testing.assert_array_equal(packed, reference.pack(values))
    assert packed.shape == (rows, packed_width(columns))
    np.testing.assert_array_equal(unpack(packed, columns), values)
    np.testing.assert_array_equal(reference.unpack(packed, columns), values)


@pytest.mark.usefixtures("isa")
def test_every_variant_packs_the_same():
    values = ternary((33, 517))

    packed = pack(values)

    np.testing.assert_array_equal(packed, reference.pack(values))
    np.testing.assert_array_equal(unpack(packed, 517), values)


@pytest.mark.parametrize("value", [-128, -2, 2, 3, 127])
def test_a_value_that_is_not_ternary_is_refused(value):
    values = ternary((3, 6))
    values[2, 5] = value

    with pytest.raises(PackingError, match=f"-1, 0 or 1, got {value}"):
        pack(values)


@pytest.mark.parametrize("place", range(5))
def test_the_fourth_code_is_refused(place):
    packed = pack(ternary((2, 5)))
    packed[1, place // 4] |= 3 << (2 * (place % 4))

    with pytest.raises(PackingError, match="never written"):
        unpack(packed, 5)


@pytest.mark.parametrize("bit", range(2, 8))
def test_a_padding_that_is_not_zero_is_refused(bit):
    packed = pack(ternary((2, 5)))
    packed[0, 1] = 1 << bit

    with pytest.raises(PackingError, match="never written"):
        unpack(packed, 5)


@pytest.mark.parametrize("columns", [-1, 0, 4, 9])
def test_rows_of_another_width_are_refused(columns):
    with pytest.raises(PackingError, match=r"bytes for .* columns, got 2"):
        unpack(np.zeros((2, 2), dtype=np.uint8), columns)


def test_other_types_are_refused():
    with pytest.raises(PackingError, match=r"int8 \(N, K\), got int64"):
        pack(np.zeros((2, 2), dtype=np.int64))
    with pytest.raises(PackingError, match=r"uint8 \(N, B\), got uint8 \(2,\)"):
        unpack(np.zeros(2, dtype=np.uint8), 4)


LENGTHS = [0, 1, 4, 5, 6, 319, 320, 321, 325, 640, 1000, 4173]


def test_a_whole_block_has_its_planes_64_apart():
    values = np.zeros(320, dtype=np.int8)
    values[[7, 64 + 7, 256 + 7]] = [1, -1, 1]

    packed = pack3(values)

    # Digits 2, 0, 1, 1, 2; elsewhere 1, 1, 1, 1, 1.
    assert packed[7] == -(-(2 * 81 + 0 * 27 + 9 + 3 + 2) * 256 // 243)
    assert set(np.delete(packed, 7)) == {-(-121 * 256 // 243)}


def test_the_last_block_has_its_planes_as_near_as_they_can_be():
    # 7 values: planes of 2, and the last three places count as zeros.
    packed = pack3(np.array([1, -1, 0, 0, 1, -1, -1], dtype=np.int8))

    first = 2 * 81 + 1 * 27 + 2 * 9 + 0 * 3 + 1
    second = 0 * 81 + 1 * 27 + 0 * 9 + 1 * 3 + 1
    assert packed.tolist() == [-(-v * 256 // 243) for v in (first, second)]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("length", LENGTHS)
def test_base_3_equals_its_twin_and_comes_back(length):
    values = ternary(length)

    packed = pack3(values)

    np.testing.assert_array_equal(packed, reference.pack3(values))
    assert packed.shape == (packed3_bytes(length),)
    np.testing.assert_array_equal(unpack3(packed, length), values)
    np.testing.assert_array_equal(reference.unpack3(packed, length), values)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("length", [320, 243 * 5])
def test_every_byte_of_base_3_stands_for_its_own_values(length):
    width = length // 5
    numbers = np.arange(width) % 243
    digits = numbers // 3 ** np.arange(5)[::-1, None] % 3
    values = np.zeros(length, dtype=np.int8)
    for start in range(0, width, 64):
        part = (digits[:, start : start + 64] - 1).reshape(-1)
        values[5 * start : 5 * start + part.size] = part

    packed = pack3(values)

    np.testing.assert_array_equal(packed, -(-numbers * 256 // 243))
    np.testing.assert_array_equal(unpack3(packed, length), values)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("pad", [0, 1, 33])
@pytest.mark.parametrize("length", [5, 321, 1200])
def test_packings_read_and_write_at_any_address_and_not_a_byte_more(pad, length):
    values = ternary(length + pad)[pad:]
    for num_bytes, down, up in (
        (packed3_bytes(length), pack3, unpack3),
        (
            packed_width(length),
            lambda x, out: pack(x[None], out=out[None]),
            lambda x, n, out: unpack(x[None], n, out=out[None]),
        ),
    ):
        packed = np.full(num_bytes + 70, 77, dtype=np.uint8)
        back = np.full(length + 70, 77, dtype=np.int8)

        down(values, out=packed[pad : pad + num_bytes])
        up(packed[pad : pad + num_bytes], length, out=back[pad : pad + length])

        np.testing.assert_array_equal(back[pad : pad + length], values)
        for memory, size in ((packed, num_bytes), (back, length)):
            assert (memory[:pad] == 77).all()
            assert (memory[pad + size :] == 77).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shift", [0, 1, 63])
def test_large_packings_are_written_past_the_caches_and_nowhere_else(shift):
    size = (45 << 20) + 13
    values = np.resize(ternary(1 << 16), size)
    packed = np.full(packed_width(size) + 70, 77, dtype=np.uint8)
    back = np.full(size + 70, 77, dtype=np.int8)
    inner = packed[shift : shift + packed3_bytes(size)]

    pack3(values, out=inner)
    unpack3(inner, size, out=back[shift : shift + size])

    np.testing.assert_array_equal(back[shift : shift + size], values)
    for memory, length in ((packed, inner.size), (back, size)):
        assert (memory[:shift] == 77).all()
        assert (memory[shift + length :] == 77).all()
    inner = packed[shift : shift + packed_width(size)]
    pack(values[None], out=inner[None])
    unpack(inner[None], size, out=back[None, shift : shift + size])
    np.testing.assert_array_equal(back[shift : shift + size], values)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("place", [0, 319, 400, 1000])
@pytest.mark.parametrize("value", [-128, -2, 2, 3, 127])
def test_base_3_refuses_a_value_that_is_not_ternary(place, value):
    values = ternary(1001)
    values[place] = value

    with pytest.raises(PackingError, match=f"-1, 0 or 1, got {value}"):
        pack3(values)
    with pytest.raises(PackingError, match=f"-1, 0 or 1, got {value}"):
        pack(values[None])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("place", [0, 70, 128])
def test_bytes_that_base_3_never_writes_are_refused(place):
    packed = pack3(ternary(5 * 129))
    written = {-(-v * 256 // 243) for v in range(243)}

    for byte in range(256):
        packed[place] = byte
        if byte in written:
            unpack3(packed, 5 * 129)
            continue
        with pytest.raises(PackingError, match="never written"):
            unpack3(packed, 5 * 129)


@pytest.mark.usefixtures("isa")
def test_a_value_past_the_end_of_base_3_is_refused():
    packed = pack3(np.zeros(7, dtype=np.int8))
    packed[1] = reference.pack3(np.array([0, 0, 0, 0, 1], dtype=np.int8))[0]

    with pytest.raises(PackingError, match="never written"):
        unpack3(packed, 7)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("place", [0, 255, 256, 300])
def test_the_fourth_code_is_refused_wherever_it_stands(place):
    packed = pack(ternary((1, 1301)))
    packed[0, place] |= 3

    with pytest.raises(PackingError, match="never written"):
        unpack(packed, 1301)


def test_base_3_of_another_length_or_type_is_refused():
    with pytest.raises(PackingError, match="2 bytes for 7 values, got 3"):
        unpack3(np.zeros(3, dtype=np.uint8), 7)
    with pytest.raises(PackingError, match=r"int8 \(n,\), got int64"):
        pack3(np.zeros(2, dtype=np.int64))
    with pytest.raises(PackingError, match=r"uint8 \(b,\), got uint8 \(1, 2\)"):
        unpack3(np.zeros((1, 2), dtype=np.uint8), 10)
    with pytest.raises(ValueError, match=r"out must be contiguous uint8 \(2,\)"):
        pack3(np.zeros(7, dtype=np.int8), out=np.zeros(3, dtype=np.uint8))
