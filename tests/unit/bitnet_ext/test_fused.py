"""The fused kernels of a training step against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext import fused, reference
from bitnet_ext.fused import AdamW, Gate, NormInput
from bitnet_ext.ternary import active_isa, choose_isa, quantise_rows, supported_isas

EPS = 1e-5
#: (M, K): every tail of 16 lanes, several items of 32 rows, a row of the model.
SHAPES = [(1, 1), (3, 15), (33, 17), (65, 64), (40, 300), (2, 1024)]
GATES = [Gate.NONE, Gate.SILU, Gate.SQUARED_RELU]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def rows_of(m, k, gate, seed=0):
    up = None if gate is Gate.NONE else normal(m, k, seed=seed + 1)
    return NormInput(normal(m, k, seed=seed), up, gate)


def act(x, gate):
    return x / (1 + np.exp(-x)) if gate is Gate.SILU else np.maximum(x, 0) ** 2


def slope(x, gate):
    if gate is Gate.SQUARED_RELU:
        return 2 * np.maximum(x, 0)
    sigmoid = 1 / (1 + np.exp(-x))
    return sigmoid * (1 + x * (1 - sigmoid))


def plain_input(rows):
    x = rows.x.astype(np.float64)
    return x if rows.up is None else act(x, rows.gate) * rows.up


def plain_inverse(rows):
    return 1 / np.sqrt((plain_input(rows) ** 2).mean(-1, keepdims=True) + EPS)


def plain_backward(dy, rows, gain):
    """Return the gradient of the norm's input, and of the gain."""
    unit = plain_input(rows) * plain_inverse(rows)
    d = dy.astype(np.float64) * gain
    dx = plain_inverse(rows) * (d - unit * (d * unit).mean(-1, keepdims=True))
    return dx, (dy * unit).sum(0)


def assert_close(found, expected, rtol=2e-6):
    scale = np.abs(expected).max(initial=0.1)
    np.testing.assert_allclose(found / scale, expected / scale, atol=rtol)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("m", "k"), SHAPES)
@pytest.mark.parametrize("gate", GATES)
def test_the_int8_rows_are_those_of_the_norm(m, k, gate):
    rows, gain = rows_of(m, k, gate), normal(k, seed=5) + 1

    found, normed = fused.norm_quantise(rows, gain, EPS)

    expected = plain_input(rows) * plain_inverse(rows) * gain
    assert_close(normed.inverse[:, None], plain_inverse(rows))
    np.testing.assert_allclose(
        found.scale[:, 0], np.abs(expected).max(-1) / 127, rtol=2e-6
    )
    # Half a step of rounding, and what float32 adds to it.
    assert (np.abs(found.q - expected / found.scale) < 0.5001).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_a_norm_alone_gives_the_numbers_that_are_quantised(m, k):
    rows, gain = rows_of(m, k, Gate.NONE), normal(k, seed=5)

    y, normed = fused.norm(rows.x, gain, EPS)

    found, again = fused.norm_quantise(rows, gain, EPS)
    assert found.q.tobytes() == quantise_rows(y).q.tobytes()
    assert normed.inverse.tobytes() == again.inverse.tobytes()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_the_gradient_of_a_norm_is_added_where_asked(m, k):
    rows, gain, dy = rows_of(m, k, Gate.NONE), normal(k, seed=5), normal(m, k, seed=6)
    dx, dgain = normal(m, k, seed=7), normal(k, seed=8)
    wanted_dx, wanted_dgain = plain_backward(dy, rows, gain)
    _, normed = fused.norm(rows.x, gain, EPS)
    added, summed = dx.copy(), dgain.copy()

    fused.norm_backward(dy, normed, summed, dx_MK=added, add=True)
    fused.norm_backward(dy, normed, dgain.copy(), dx_MK=dx)

    assert_close(added, wanted_dx + normal(m, k, seed=7))
    assert_close(dx, wanted_dx)
    assert_close(summed, wanted_dgain + dgain, rtol=1e-5)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("m", "k"), SHAPES)
@pytest.mark.parametrize("gate", GATES[1:])
def test_the_gradient_goes_through_the_gate(m, k, gate):
    rows, gain, dy = rows_of(m, k, gate), normal(k, seed=5), normal(m, k, seed=6)
    wanted, wanted_dgain = plain_backward(dy, rows, gain)
    x, up = rows.x.astype(np.float64), rows.up.astype(np.float64)
    _, normed = fused.norm_quantise(rows, gain, EPS)
    dgain = np.zeros(k, dtype=np.float32)

    dx, dup = fused.gated_norm_backward(dy, normed, dgain)

    assert_close(dx, wanted * up * slope(x, gate), rtol=2e-5)
    assert_close(dup, wanted * act(x, gate), rtol=2e-5)
    assert_close(dgain, wanted_dgain, rtol=1e-5)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("m", "v"), [(1, 1), (3, 15), (40, 33), (5, 5174)])
@pytest.mark.parametrize("half", [False, True])
def test_logits_become_their_gradient(m, v, half):
    logits = normal(m, v) * 5
    targets = np.random.default_rng(1).integers(0, v, m)
    targets[m // 2] = -1
    bits = reference.to_bf16(logits.ravel()).reshape(m, v)
    x = (reference.from_bf16(bits.ravel()).reshape(m, v) if half else logits).astype(
        np.float64
    )
    odds = np.exp(x - x.max(-1, keepdims=True))
    odds /= odds.sum(-1, keepdims=True)
    known = targets >= 0
    nats = -np.log(odds[known, targets[known]]).sum()
    odds[known, targets[known]] -= 1
    odds[~known] = 0

    found = bits if half else logits.copy()
    loss = fused.softmax_backward(found, targets, 0.25)

    assert loss == pytest.approx(nats, rel=1e-5, abs=1e-5)
    if half:
        found = reference.from_bf16(found.ravel()).reshape(m, v)
    assert_close(found, odds / 4, rtol=4e-3 if half else 2e-6)


@pytest.mark.usefixtures("isa")
def test_what_is_not_finite_is_seen_in_the_result():
    bad = normal(2, 40)
    bad[0, 35], bad[1, 3] = np.nan, np.inf
    gain, targets = np.ones(40, np.float32), np.array([1, 1])

    rows, _ = fused.norm_quantise(NormInput(bad), gain, EPS)
    gated, _ = fused.norm_quantise(NormInput(bad, normal(2, 40), Gate.SILU), gain, EPS)

    assert np.isnan(rows.scale).all()
    assert np.isnan(gated.scale).all()
    assert not np.isfinite(fused.norm_of(bad.ravel()))
    for row in range(2):
        loss = fused.softmax_backward(bad[row : row + 1].copy(), targets[:1], 1.0)
        assert not np.isfinite(loss)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("count", [1, 17, 4097, 70_001])
def test_a_step_of_adamw_is_the_textbook_one(count):
    value, grad, mean = (normal(count, seed=seed) for seed in range(3))
    square = normal(count, seed=3) ** 2
    how = AdamW(rate=1e-2, decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, step=3, clip=0.5)
    g = grad.astype(np.float64) * 0.5
    m, v = 0.9 * mean + 0.1 * g, 0.95 * square + 0.05 * g**2
    step = m / (1 - 0.9**3) / (np.sqrt(v / (1 - 0.95**3)) + 1e-8)
    wanted = value * (1 - 1e-3) - 1e-2 * step
    norm = fused.norm_of(grad)
    assert norm == pytest.approx(np.linalg.norm(grad), rel=1e-6)

    fused.adamw(value, grad, mean, square, how)

    np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-6)
    assert_close(mean, m)
    assert_close(square, v)
    assert not grad.any()


def test_rows_of_one_id_are_added_up():
    x, into = normal(4, 5), np.zeros((3, 5), np.float32)

    fused.add_rows(x, np.array([2, 0, 2, 2]), into)

    assert_close(into, np.stack([x[1], np.zeros(5), x[0] + x[2] + x[3]]))


@pytest.mark.parametrize("bad", [-1, 3])
def test_ids_and_targets_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=f"ids must be below 3, got {bad}"):
        fused.add_rows(normal(1, 5), np.array([bad]), np.zeros((3, 5), np.float32))
    with pytest.raises(ValueError, match="targets must be below 5, got 5"):
        fused.softmax_backward(normal(1, 5), np.array([5]), 1.0)


def test_arrays_of_another_length_are_refused():
    rows, gain = rows_of(4, 16, Gate.SILU), normal(16)
    _, normed = fused.norm_quantise(rows, gain, EPS)
    with pytest.raises(ValueError, match="gain has the wrong length"):
        fused.norm_quantise(rows, normal(15), EPS)
    with pytest.raises(ValueError, match="norm must have no gate, got SILU"):
        fused.norm_backward(rows.x, normed, gain, dx_MK=rows.x)
    with pytest.raises(ValueError, match="dgain has the wrong length"):
        fused.gated_norm_backward(rows.x, normed, normal(17))


def everything(m, k, gate, threads):
    """Return the bytes of every kernel's result."""
    rows, gain, dy = rows_of(m, k, gate), normal(k, seed=5), normal(m, k, seed=6)
    q, normed = fused.norm_quantise(rows, gain, EPS, threads=threads)
    dgain, dx = np.zeros(k, np.float32), np.zeros((m, k), np.float32)
    if gate is Gate.NONE:
        fused.norm_backward(dy, normed, dgain, dx_MK=dx, threads=threads)
    else:
        fused.gated_norm_backward(dy, normed, dgain, threads=threads)
    logits = dy.copy()
    targets = np.arange(m) % (k + 1) - 1
    loss = fused.softmax_backward(logits, targets, 1.0, threads=threads)
    moments = np.zeros((2, m * k), np.float32)
    values = dy.copy().ravel()
    how = AdamW(rate=1e-2, decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, step=1)
    fused.adamw(values, rows.x.flatten(), *moments, how, threads=threads)
    results = q.q, q.scale, normed.inverse, rows.x, dx, dgain, logits, values
    norm = fused.norm_of(dy.ravel(), threads=threads)
    return [part.tobytes() for part in results], loss, norm


@given(
    m=st.integers(3, 130),
    k=st.integers(1, 300),
    gate=st.sampled_from(GATES),
    threads=st.integers(2, 5),
)
def test_neither_variant_nor_number_of_threads_changes_a_bit(m, k, gate, threads):
    before = active_isa()
    try:
        choose_isa("portable")
        expected = everything(m, k, gate, 1)
        for name in supported_isas():
            choose_isa(name)
            assert everything(m, k, gate, threads) == expected, name
    finally:
        choose_isa(before)
