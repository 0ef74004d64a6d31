"""Attention against its NumPy twin in float64, on every variant."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext import reference_attention
from bitnet_ext.attention import Heads, attend, attend_backward
from bitnet_ext.ternary import active_isa, choose_isa, supported_isas

#: (B, T, N, K, D / 2): one row, every tail of tiles and vectors, the presets' heads.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 2, 1, 3),
    (1, 12, 1, 1, 8),
    (2, 13, 4, 2, 9),
    (1, 49, 2, 2, 16),
    (1, 128, 2, 2, 32),
    (1, 200, 1, 1, 17),
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def heads_of(b, t, n, k, half, seed=0):
    angles = normal(t, half, seed=seed + 3)
    return Heads(
        normal(b * t, n * 2 * half, seed=seed),
        normal(b * t, k * 2 * half, seed=seed + 1),
        normal(b * t, k * 2 * half, seed=seed + 2),
        np.cos(angles),
        np.sin(angles),
    )


def assert_is_the_twin(heads, threads=1):
    dmixed = normal(*heads.q.shape, seed=9)
    attended = attend(heads, threads=threads)
    found = attended.mixed, *attend_backward(attended, dmixed, threads=threads)
    twin = reference_attention.attend(heads)
    wanted = twin, *reference_attention.attend_backward(heads, dmixed)
    for mine, exact in zip(found, wanted, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_and_its_gradient_are_their_twins(shape):
    assert_is_the_twin(heads_of(*shape))


@given(
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 4),
    st.sampled_from(supported_isas()),
)
def test_any_shape_is_its_twin(b, t, k, repeats, half, threads, isa):
    before = active_isa()
    choose_isa(isa)
    try:
        assert_is_the_twin(heads_of(b, t, k * repeats, k, half), threads)
    finally:
        choose_isa(before)


@pytest.mark.usefixtures("isa")
def test_the_number_of_threads_changes_no_bit():
    heads, dmixed = heads_of(3, 50, 4, 2, 9), normal(150, 72, seed=9)

    one, more = attend(heads), attend(heads, threads=4)

    assert one.mixed.tobytes() == more.mixed.tobytes()
    gradients = attend_backward(one, dmixed), attend_backward(one, dmixed, threads=4)
    for mine, other in zip(*gradients, strict=True):
        assert mine.tobytes() == other.tobytes()


@pytest.mark.usefixtures("isa")
def test_later_rows_change_no_bit_of_earlier_ones():
    heads = heads_of(1, 40, 2, 2, 16)
    before = attend(heads).mixed

    for part in (heads.q, heads.k, heads.v):
        part[17:] = 1e4
    after = attend(heads).mixed

    assert before[:17].tobytes() == after[:17].tobytes()
    assert not np.allclose(before[17:], after[17:])


@pytest.mark.usefixtures("isa")
def test_scores_far_apart_neither_overflow_nor_lose_the_sum():
    heads = heads_of(1, 30, 1, 1, 8)
    heads.q[:] *= 300

    mixed = attend(heads).mixed

    np.testing.assert_allclose(mixed, reference_attention.attend(heads), atol=1e-2)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen_in_its_row(part, bad):
    heads = heads_of(1, 30, 1, 1, 8)
    getattr(heads, part)[20, 3] = bad

    attended = attend(heads)

    assert not np.isfinite(attended.mixed[20]).all()
    dq, _, _ = attend_backward(attended, normal(30, 16, seed=9))
    assert not np.isfinite(dq[20]).all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k", lambda h: Heads(h.q, h.k[:, :5].copy(), h.v, h.cosines, h.sines)),
        ("v", lambda h: Heads(h.q, h.k, h.v[:9].copy(), h.cosines, h.sines)),
        ("q", lambda h: Heads(h.q[:9].copy(), h.k, h.v, h.cosines, h.sines)),
        ("sines", lambda h: Heads(h.q, h.k, h.v, h.cosines, h.sines[:4].copy())),
    ],
)
def test_arrays_of_another_length_are_refused(name, change):
    with pytest.raises(ValueError, match=f"{name} has the wrong length"):
        attend(change(heads_of(2, 5, 2, 2, 2)))
