"""The ternary kernels against their NumPy twins, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext import reference, ternary
from bitnet_ext.ternary import QuantisedRows, matmul, quantise_rows, quantise_weight

#: (M, K, N): every tail of the tiles of every variant, and sizes of the model.
SHAPES = [
    (1, 1, 1),
    (1, 256, 256),
    (2, 5, 31),
    (3, 13, 33),
    (7, 300, 64),
    (13, 64, 100),
    (23, 129, 70),
    (25, 1028, 32),
    (97, 36, 300),
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("group", [None, 4, 64, 256])
def test_a_product_equals_its_twin(m, k, n, group):
    weight, rows = quantise_weight(normal(n, k)), quantise_rows(normal(m, k), group)

    found = matmul(rows, weight.forward)

    expected = reference.matmul(rows, weight.forward.values(), weight.scale)
    assert_same_bits(found, expected)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_the_other_direction_equals_the_transposed_matrix(m, k, n):
    w, rows = normal(n, k), quantise_rows(normal(m, n), 8)

    weight = quantise_weight(w)

    assert_same_bits(weight.backward.values(), weight.forward.values().T.copy())
    assert_same_bits(
        matmul(rows, weight.backward),
        reference.matmul(rows, weight.backward.values(), weight.scale),
    )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("group", [None, 64])
def test_the_number_of_threads_changes_no_bit(group):
    weight = quantise_weight(normal(700, 260))
    rows = quantise_rows(normal(200, 260), group)

    alone = matmul(rows, weight.forward)

    for threads in (2, 3, 64):
        assert_same_bits(matmul(rows, weight.forward, threads=threads), alone)


def test_products_of_several_threads_at_once_do_not_mix():
    weight = quantise_weight(normal(512, 256))
    inputs = [quantise_rows(normal(200, 256, seed=seed)) for seed in range(4)]
    expected = [matmul(rows, weight.forward) for rows in inputs]
    wrong = []

    def work(index):
        for _ in range(20):
            found = matmul(inputs[index], weight.forward, threads=3)
            if found.tobytes() != expected[index].tobytes():
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no /proc here")
def test_a_forked_process_multiplies_with_threads_of_its_own():
    code = (
        "import os; os.environ['OPENBLAS_NUM_THREADS'] = '1'\n"
        "import numpy as np\n"
        "from bitnet_ext.ternary import *\n"
        "ones = np.ones((300, 256), dtype=np.float32)\n"
        "rows, weight = quantise_rows(ones), quantise_weight(ones)\n"
        "before = matmul(rows, weight.forward, threads=2)\n"
        "child = os.fork()\n"
        "same = (matmul(rows, weight.forward, threads=2) == before).all()\n"
        "threads = len(os.listdir('/proc/self/task'))\n"
        "if child == 0: os._exit(0 if same and threads == 2 else 1)\n"
        "assert same and os.waitpid(child, 0)[1] == 0\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.usefixtures("isa")
def test_the_largest_values_do_not_overflow_on_the_way():
    q = np.full((3, 4096), -128, dtype=np.int8)
    rows = QuantisedRows(q, np.ones((3, 1), dtype=np.float32), 4096)
    weight = quantise_weight(np.full((33, 4096), 2.0, dtype=np.float32))

    found = matmul(rows, weight.forward)

    assert (found == -128 * 4096 * 2.0).all()


@pytest.mark.parametrize(("m", "k", "n"), [(0, 8, 5), (3, 0, 5), (3, 8, 0), (0, 0, 0)])
def test_empty_matrices_give_empty_or_zero_products(m, k, n):
    weight, rows = quantise_weight(normal(n, k)), quantise_rows(normal(m, k))

    found = matmul(rows, weight.forward, threads=2)

    assert_same_bits(found, np.zeros((m, n), dtype=np.float32))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (31, 33), (64, 256), (101, 70)])
def test_weights_are_rounded_as_the_twin_rounds_them(n, k):
    w = normal(n, k, seed=n) * np.float32(0.02)

    weight = quantise_weight(w)

    assert weight.scale == reference.absmean_scale(w)
    assert_same_bits(weight.forward.values(), reference.ternary_values(w))


def test_a_weight_halfway_rounds_to_even():
    # The mean of the sizes is exactly 1.
    w = np.array([[0.5, -0.5, 1.5, -1.5, 0.4375, 1.5625]], dtype=np.float32)

    weight = quantise_weight(w)

    assert weight.scale == 1.0
    assert weight.forward.values().tolist() == [[0, 0, 1, -1, 0, 1]]


def test_the_scale_of_tiny_weights_is_clamped():
    weight = quantise_weight(np.full((2, 4), 1e-7, dtype=np.float32))

    assert weight.scale == np.float32(1e-5)
    assert not weight.forward.values().any()
    assert quantise_weight(np.zeros((2, 4), dtype=np.float32)).scale == weight.scale


# Powers of two beside their halves: many quotients at or next to a half.
near_ties = st.lists(
    st.tuples(st.integers(-254, 254), st.integers(-2, 2)), min_size=1, max_size=40
)


@given(near_ties, st.floats(2.0**-20, 2.0**20, width=32))
def test_rows_round_as_the_twin_rounds_them_even_next_to_a_half(halves, size):
    step = np.float32(size)
    x = np.array([half / 2 for half, _ in halves], dtype=np.float32) * step
    for i, (_, ulps) in enumerate(halves):
        x[i] += ulps * np.spacing(x[i])

    rows = quantise_rows(x[None, :])

    expected, scale = reference.quantise_group(x)
    assert_same_bits(rows.q[0], expected)
    assert rows.scale[0, 0] == scale


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("m", "k", "group"), [(1, 1, 4), (5, 70, 32), (64, 256, 256)])
def test_every_variant_quantises_rows_the_same(m, k, group):
    # A step of 2 / 127 puts every odd multiple of it next to a half.
    x = np.round(normal(m, k) * 64) / np.float32(127)

    rows = quantise_rows(x, group)

    expected = reference.quantise_rows(x, group)
    assert_same_bits(rows.q, expected.q)
    assert_same_bits(rows.scale, expected.scale)


def test_a_value_is_at_most_half_a_scale_off():
    x = normal(9, 500) * 100

    rows = quantise_rows(x, 100)

    scale = np.repeat(rows.scale, 100, axis=1)
    off = np.abs(x.astype(np.float64) - rows.q * scale.astype(np.float64))
    assert (off <= scale * 0.5000001).all()
    assert np.abs(rows.q).reshape(9, 5, 100).max(axis=2).tolist() == [[127] * 5] * 9


def test_rows_of_zeros_have_scale_zero():
    x = np.zeros((2, 8), dtype=np.float32)
    x[1, 3] = 1e-38  # its scale would be subnormal

    rows = quantise_rows(x)

    assert rows.scale.tolist() == [[0.0], [0.0]]
    assert not rows.q.any()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 17, 69])
def test_what_is_not_finite_shows_in_its_group_and_in_the_product(bad, column):
    x, weight = normal(3, 70), quantise_weight(normal(5, 70))
    x[1, column] = bad

    rows = quantise_rows(x, 32)
    found = matmul(rows, weight.forward)

    assert np.isnan(rows.scale).nonzero()[1].tolist() == [column // 32]
    assert np.isnan(found).all(axis=1).tolist() == [False, True, False]
    assert np.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_makes_every_product_nan(bad):
    w = normal(5, 8)
    w[4, 7] = bad

    weight = quantise_weight(w)

    assert np.isnan(weight.scale)
    assert np.isnan(reference.absmean_scale(w))
    assert np.isnan(matmul(quantise_rows(normal(2, 8)), weight.forward)).all()


def test_inputs_stay_as_they_are():
    x, w = normal(4, 12), normal(5, 12)
    copies = x.copy(), w.copy()

    matmul(quantise_rows(x), quantise_weight(w).forward)

    assert_same_bits(x, copies[0])
    assert_same_bits(w, copies[1])


def test_a_view_with_gaps_gives_what_its_copy_gives():
    x, w = normal(8, 40)[::2, ::2], normal(20, 6).T
    assert not x.flags.c_contiguous

    found = matmul(quantise_rows(x), quantise_weight(w).forward)

    copies = quantise_rows(x.copy()), quantise_weight(w.copy()).forward
    assert_same_bits(found, matmul(*copies))


@pytest.mark.parametrize("group", [-4, 0, 1, 6, 30])
def test_a_group_that_is_no_multiple_of_four_is_refused(group):
    with pytest.raises(ValueError, match=f"multiple of 4, got {group}"):
        quantise_rows(normal(2, 64), group)


def test_shapes_that_do_not_fit_are_refused():
    weight = quantise_weight(normal(5, 8)).forward

    with pytest.raises(ValueError, match="must have 8 columns, got 5"):
        matmul(quantise_rows(normal(2, 5)), weight)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        matmul(quantise_rows(normal(2, 8)), weight, threads=0)
    with pytest.raises(ValueError, match=r"float32 matrix, got float64 \(2, 8\)"):
        quantise_rows(normal(2, 8).astype(np.float64))
    with pytest.raises(ValueError, match=r"float32 matrix, got float32 \(8,\)"):
        quantise_weight(normal(8))


@pytest.mark.parametrize(
    "rows",
    [
        QuantisedRows(np.ones((2, 8), np.int8), np.ones((2, 2), np.float32), 8),
        QuantisedRows(np.ones((2, 8), np.int8), np.ones((1, 1), np.float32), 8),
        QuantisedRows(np.ones((2, 8), np.int8), np.ones((2, 1), np.float64), 8),
        QuantisedRows(np.ones((2, 8), np.uint8), np.ones((2, 1), np.float32), 8),
        QuantisedRows(np.ones((2, 8), np.int8), np.ones((2, 1), np.float32), 0),
        QuantisedRows(np.ones((2, 8), np.int8), np.ones((2, 1), np.float32), 6),
    ],
)
def test_rows_that_contradict_themselves_never_reach_the_kernel(rows):
    with pytest.raises(ValueError, match=r"length|dtype|group"):
        matmul(rows, quantise_weight(normal(5, 8)).forward)


def test_a_variant_that_is_not_there_is_an_error_with_the_choices():
    choices = ", ".join(ternary.supported_isas())

    with pytest.raises(ValueError, match=f"one of {choices} .*got 'sse9'"):
        ternary.choose_isa("sse9")


def import_with(isa):
    return subprocess.run(
        [sys.executable, "-c", "import bitnet_ext.ternary as t; print(t.active_isa())"],
        env={**os.environ, "BITNET_EXT_ISA": isa},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_environment_forces_a_variant():
    assert import_with("portable").stdout == "portable\n"
    assert import_with("").stdout == f"{ternary.supported_isas()[-1]}\n"

    refused = import_with("sse9")

    assert refused.returncode == 1
    assert "BITNET_EXT_ISA must be one of portable" in refused.stderr


def test_without_a_choice_the_best_variant_runs():
    before = ternary.active_isa()
    try:
        ternary.choose_isa(None)
        assert ternary.active_isa() == ternary.supported_isas()[-1]
    finally:
        ternary.choose_isa(before)
