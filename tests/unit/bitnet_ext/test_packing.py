"""2-bit packing: the table, the padding, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext import reference
from bitnet_ext.packing import PackingError, pack, packed_width, unpack


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
