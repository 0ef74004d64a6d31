"""The int8 gradient of a weight, and products that go into given memory."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext import reference
from bitnet_ext.ternary import (
    TOKENS,
    QuantisedRows,
    active_isa,
    choose_isa,
    empty_rows,
    matmul,
    pack_tokens,
    quantise_rows,
    quantise_weight,
    supported_isas,
    weight_gradient,
)

#: (M, N, K): tails of tokens, of rows and of panels, and more than one group.
SHAPES = [
    (1, 1, 1),
    (3, 17, 31),
    (4, 16, 32),
    (13, 5, 33),
    (127, 33, 70),
    (129, 40, 64),
    (300, 100, 37),
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def gradient(dy, rows, **options):
    into = np.full((dy.shape[1], rows.q.shape[1]), 7, dtype=np.float32)
    weight_gradient(dy, rows, into, **options)
    return into


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_a_gradient_equals_its_twin(m, n, k):
    dy, rows = normal(m, n), quantise_rows(normal(m, k, seed=1))

    assert_same_bits(gradient(dy, rows), reference.weight_gradient(dy, rows))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_an_accumulated_gradient_equals_its_twin(m, n, k):
    dy, rows = normal(m, n), quantise_rows(normal(m, k, seed=1))

    found = gradient(dy, rows, accumulate=True)

    before = np.full((n, k), 7, dtype=np.float32)
    assert_same_bits(found, reference.weight_gradient(dy, rows, before))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_rows_made_in_the_same_pass_are_the_rows(m, n, k):
    dy, rows = normal(m, n), quantise_rows(normal(m, k, seed=1))
    made, wanted = empty_rows(m, n, 32), quantise_rows(dy, 32)

    found = gradient(dy, rows, dy_rows=made, threads=2)

    assert_same_bits(made.q, wanted.q)
    assert_same_bits(made.scale, wanted.scale)
    assert made.group == wanted.group
    assert_same_bits(found, reference.weight_gradient(dy, rows))


@given(
    st.tuples(st.integers(1, 140), st.integers(1, 70), st.integers(1, 70)),
    st.integers(1, 3),
    st.sampled_from(supported_isas()),
    st.booleans(),
    st.integers(0, 9),
)
def test_any_shape_gives_the_bits_of_the_twin(shape, threads, isa, accumulate, seed):
    m, n, k = shape
    dy, rows = normal(m, n, seed=seed), quantise_rows(normal(m, k, seed=seed + 10))
    before = active_isa()
    choose_isa(isa)
    try:
        found = gradient(dy, rows, accumulate=accumulate, threads=threads)
    finally:
        choose_isa(before)

    start = np.full((n, k), 7, dtype=np.float32) if accumulate else None
    assert_same_bits(found, reference.weight_gradient(dy, rows, start))


@pytest.mark.usefixtures("isa")
def test_rounding_next_to_a_half_is_that_of_the_twin():
    # A step of 2 / 127 puts every odd multiple of it next to a half.
    dy = np.round(normal(130, 40) * 64) / np.float32(127)
    rows = quantise_rows(np.ones((130, 8), dtype=np.float32) * 127)

    assert_same_bits(gradient(dy, rows), reference.weight_gradient(dy, rows))


@pytest.mark.usefixtures("isa")
def test_the_largest_gradients_do_not_overflow_on_the_way():
    rows = QuantisedRows(
        np.full((256, 40), -128, dtype=np.int8), np.ones((256, 1), np.float32), 40
    )
    dy = np.full((256, 20), -127, dtype=np.float32)

    assert (gradient(dy, rows) == 256 * 127.0 * 128.0).all()


@pytest.mark.usefixtures("isa")
def test_the_number_of_threads_changes_no_bit_of_a_gradient():
    dy, rows = normal(520, 300), quantise_rows(normal(520, 260, seed=1))

    alone = gradient(dy, rows)

    for threads in (2, 3, 64):
        assert_same_bits(gradient(dy, rows, threads=threads), alone)


def test_gradients_of_several_threads_at_once_do_not_mix():
    cases = [
        (normal(200, 96, seed=s), quantise_rows(normal(200, 64, seed=s + 9)))
        for s in range(4)
    ]
    expected = [gradient(*case) for case in cases]
    wrong = []

    def work(index):
        for _ in range(20):
            if (
                gradient(*cases[index], threads=2).tobytes()
                != expected[index].tobytes()
            ):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


def test_the_error_stays_near_one_percent():
    dy, rows = normal(512, 128), quantise_rows(normal(512, 256, seed=1))

    exact = dy.T.astype(np.float64) @ (rows.q * rows.scale.astype(np.float64))

    off = np.linalg.norm(gradient(dy, rows) - exact) / np.linalg.norm(exact)
    assert 0.001 < off < 0.012


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_the_row_of_its_column(bad):
    dy, rows = normal(140, 35), quantise_rows(normal(140, 12, seed=1))
    dy[130, 33] = bad

    found = gradient(dy, rows)

    assert np.isnan(found).all(axis=1).nonzero()[0].tolist() == [33]
    assert np.isfinite(np.delete(found, 33, axis=0)).all()


@pytest.mark.usefixtures("isa")
def test_columns_of_zeros_and_of_tiny_numbers_give_zeros():
    dy, rows = normal(140, 5), quantise_rows(normal(140, 12, seed=1))
    dy[:, 2] = 0
    dy[:, 3] = 1e-40

    found = gradient(dy, rows)

    assert not found[2:4].any()
    assert found[[0, 1, 4]].all()


def test_tokens_packed_once_serve_several_weights():
    rows = quantise_rows(normal(140, 40))
    packed, dy = pack_tokens(rows), normal(140, 20, seed=2)
    into = np.empty((20, 40), dtype=np.float32)

    weight_gradient(dy, packed, into)

    assert_same_bits(into, gradient(dy, rows))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_without_tokens_a_gradient_is_zero_and_adds_nothing(m, n, k):
    dy, rows = normal(m, n), quantise_rows(normal(m, k))

    assert not gradient(dy, rows).any()
    assert (gradient(dy, rows, accumulate=True) == 7).all()


def test_gradients_that_do_not_fit_are_refused():
    rows, into = quantise_rows(normal(8, 12)), np.zeros((5, 12), dtype=np.float32)

    with pytest.raises(ValueError, match="dy must have 8 rows, got 7"):
        weight_gradient(normal(7, 5), rows, into)
    with pytest.raises(ValueError, match=r"float32 \(6, 12\), got float32 \(5, 12\)"):
        weight_gradient(normal(8, 6), rows, into)
    with pytest.raises(ValueError, match="contiguous"):
        weight_gradient(normal(8, 12), quantise_rows(normal(8, 5)), into.T)
    with pytest.raises(ValueError, match=r"one scale each, got \(8, 3\)"):
        weight_gradient(normal(8, 5), quantise_rows(normal(8, 12), 4), into)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        weight_gradient(normal(8, 5), rows, into, threads=0)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize(("m", "k", "n"), [(13, 21, 70), (97, 36, 32)])
def test_a_product_goes_into_given_memory_or_is_added_to_it(group, m, k, n):
    weight, rows = (
        quantise_weight(normal(n, k)).forward,
        quantise_rows(normal(m, k), group),
    )
    out = normal(m, n, seed=5)
    before = out.copy()

    assert matmul(rows, weight, out=out, accumulate=True) is out

    expected = reference.matmul(rows, weight.values(), weight.scale, before)
    assert_same_bits(out, expected)
    matmul(rows, weight, out=out)
    assert_same_bits(out, matmul(rows, weight))


def test_there_must_be_something_to_add_a_product_to():
    weight, rows = quantise_weight(normal(5, 8)).forward, quantise_rows(normal(2, 8))

    with pytest.raises(ValueError, match="out must be given"):
        matmul(rows, weight, accumulate=True)
    with pytest.raises(ValueError, match=r"\(2, 5\), got float64 \(2, 5\)"):
        matmul(rows, weight, out=np.zeros((2, 5)))


def test_a_group_of_tokens_is_what_the_docs_say():
    assert TOKENS == 128
