"""Products of few rows, which read the weight at 2 bits a value: the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext import reference, ternary
from bitnet_ext.isa import active_isa, choose_isa, supported_isas
from bitnet_ext.ternary import FEW_ROWS, QuantisedRows, quantise_rows, quantise_weight


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def expected(rows, weight, into=None):
    return reference.matmul(rows, weight.values(), weight.scale, into)


@given(
    st.integers(1, FEW_ROWS + 1),
    st.integers(1, 200),
    st.integers(1, 300),
    st.sampled_from(supported_isas()),
    st.integers(1, 3),
    st.booleans(),
)
def test_few_rows_give_the_bits_of_the_twin(m, k, n, isa, threads, accumulate):
    weight = quantise_weight(normal(n, k, seed=m)).forward
    rows, into = quantise_rows(normal(m, k, seed=n)), normal(m, n, seed=k)
    due = expected(rows, weight, into if accumulate else None)
    before = active_isa()
    choose_isa(isa)
    try:
        found = ternary.matmul(
            rows, weight, out=into, accumulate=accumulate, threads=threads
        )
    finally:
        choose_isa(before)

    assert found is into
    assert found.tobytes() == due.tobytes()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("k", "n"), [(1024, 1032), (1000, 2056), (4096, 64)])
def test_threads_and_whole_panels_do_not_show(m, k, n):
    weight, rows = quantise_weight(normal(n, k)).forward, quantise_rows(normal(m, k))

    alone = ternary.matmul(rows, weight)
    shared = ternary.matmul(rows, weight, threads=3)

    assert alone.tobytes() == shared.tobytes() == expected(rows, weight).tobytes()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_values_of_the_longest_rows_stay_exact(sign):
    k = 1 << 16
    q = np.full((1, k), -128, dtype=np.int8)
    rows = QuantisedRows(q, np.ones((1, 1), dtype=np.float32), k)
    weight = quantise_weight(np.full((3, k), sign * 2.0, dtype=np.float32)).forward

    found = ternary.matmul(rows, weight)

    np.testing.assert_array_equal(found, np.full((1, 3), -128 * k * sign * 2.0))


@pytest.mark.usefixtures("isa")
def test_a_row_that_is_longer_takes_the_other_way():
    k = (1 << 16) + 4
    rows, weight = quantise_rows(normal(1, k)), quantise_weight(normal(2, k)).forward

    found = ternary.matmul(rows, weight)

    assert found.tobytes() == expected(rows, weight).tobytes()
    assert "narrow" not in vars(weight)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 63, 64, 65, 130])
def test_a_weight_takes_two_bits_a_value_and_is_made_once(n):
    weight = quantise_weight(normal(n, 100)).forward

    first = weight.narrow

    assert first is weight.narrow
    # Whole blocks of 16 by 16.
    assert first.nbytes == -(-n // 16) * 7 * 64
    values = weight.values() + np.int8(1)
    codes = np.zeros((-(-n // 16) * 16, 112), dtype=np.uint8)
    start = 0
    for panel in range(0, codes.shape[0], 64):
        groups = min(4, (codes.shape[0] - panel) // 16)
        blocks = first[start : start + groups * 7 * 64].reshape(7, groups, 16, 4)
        start += blocks.size
        for place in range(4):
            part = (blocks >> 2 * place & 3).transpose(1, 2, 0, 3)
            part = part.reshape(16 * groups, 7, 4)
            view = codes[panel : panel + 16 * groups].reshape(16 * groups, 7, 4, 4)
            view[:, :, place] = part
    np.testing.assert_array_equal(codes[:n, :100], values)


@pytest.mark.usefixtures("isa")
def test_a_scale_that_is_not_a_number_shows():
    weight, x = quantise_weight(normal(40, 32)).forward, normal(3, 32)
    x[1, 5] = np.inf

    found = ternary.matmul(quantise_rows(x), weight)

    assert np.isnan(found).any(axis=1).tolist() == [False, True, False]
