"""The int8 head against its NumPy twin, bit for bit, and against exact arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext import head, reference_head
from bitnet_ext.ternary import active_isa, choose_isa, supported_isas

#: (M, V, H): tails of tokens, of groups of words, of panels and of four columns.
SHAPES = [(1, 1, 1), (3, 5, 2), (50, 300, 34), (129, 256, 32), (260, 37, 70)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def factors(m, v, h, seed=0):
    """Return a table, hidden states and targets, some tokens without one."""
    targets = np.random.default_rng(seed).integers(0, v, m)
    targets[1::7] = -1
    return normal(v, h, seed=seed), normal(m, h, seed=seed + 1) * 2, targets


def run(table, hidden, targets, *, threads=1, scale=0.25, factor=0.5):
    found = head.Table(table, threads=threads)
    nats, dhidden, gradient = head.loss(found, hidden, targets, scale, threads=threads)
    dtable = np.full(table.shape, 3, dtype=np.float32)
    gradient.add_to(dtable, factor=factor, threads=threads)
    return nats, dhidden, dtable


def assert_is_the_twin(found, table, hidden, targets):
    start = np.full(table.shape, 3, dtype=np.float32)
    twin = reference_head.head(table, hidden, targets, 0.25, start, 0.5)
    nats, dhidden, dtable = found
    assert nats == pytest.approx(float(twin.nats.sum(dtype=np.float64)), rel=1e-6)
    assert dhidden.tobytes() == twin.dhidden.tobytes()
    assert dtable.tobytes() == twin.dtable.tobytes()


def exact(table, hidden, targets, scale):
    """Return nats and gradients in float64."""
    logits = hidden.astype(np.float64) @ table.T
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    odds /= odds.sum(-1, keepdims=True)
    known = np.flatnonzero(targets >= 0)
    nats = -np.log(odds[known, targets[known]]).sum()
    odds[known, targets[known]] -= 1
    odds[targets < 0] = 0
    return nats, scale * odds @ table, scale * odds.T @ hidden


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("m", "v", "h"), SHAPES)
def test_the_head_is_its_twin(m, v, h):
    table, hidden, targets = factors(m, v, h)

    assert_is_the_twin(run(table, hidden, targets), table, hidden, targets)


@given(
    st.integers(1, 150),
    st.integers(1, 600),
    st.integers(1, 40),
    st.integers(1, 4),
    st.sampled_from(supported_isas()),
    st.integers(0, 9),
)
def test_any_shape_and_number_of_threads_gives_the_bits_of_the_twin(
    m, v, h, threads, isa, seed
):
    table, hidden, targets = factors(m, v, h, seed)
    before = active_isa()
    choose_isa(isa)
    try:
        found = run(table, hidden, targets, threads=threads)
    finally:
        choose_isa(before)

    assert_is_the_twin(found, table, hidden, targets)


@pytest.mark.usefixtures("isa")
def test_gradients_are_close_to_exact_ones_though_few_words_hold_most_of_the_odds():
    table = normal(2000, 64, seed=2) * 0.3
    hidden = normal(256, 64, seed=3)
    hidden[:] += 4 * table[7]  # one word is likely everywhere
    targets = np.random.default_rng(4).integers(0, 2000, 256)

    nats, dhidden, dtable = run(table, hidden, targets, scale=1.0, factor=1.0)

    wanted_nats, wanted_dhidden, wanted_dtable = exact(table, hidden, targets, 1.0)
    assert nats == pytest.approx(wanted_nats, rel=1e-3)
    for found, wanted in ((dhidden, wanted_dhidden), (dtable - 3, wanted_dtable)):
        assert np.linalg.norm(found - wanted) < 0.01 * np.linalg.norm(wanted)
    # Tokens must not all be off the same way: gradients of weights are sums over them.
    bias = (dhidden - wanted_dhidden).mean(0)
    assert np.linalg.norm(bias) < 0.001 * np.linalg.norm(wanted_dhidden, axis=1).mean()


@pytest.mark.usefixtures("isa")
def test_without_a_target_nothing_is_learned():
    table, hidden, _ = factors(5, 40, 8)

    nats, dhidden, dtable = run(table, hidden, np.full(5, -1))

    assert nats == 0
    assert not dhidden.any()
    assert (dtable == 3).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("which", ["table", "hidden"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen_in_the_loss(which, bad):
    table, hidden, targets = factors(3, 20, 8)
    (table if which == "table" else hidden)[2, 3] = bad

    assert not np.isfinite(run(table, hidden, targets)[0])


def test_a_target_that_is_no_word_is_refused():
    table, hidden, targets = factors(3, 20, 8)
    targets[0] = 20

    with pytest.raises(ValueError, match="targets must be below 20, got 20"):
        run(table, hidden, targets)


def test_a_scale_below_zero_is_refused():
    table, hidden, targets = factors(3, 20, 8)

    for scale in (-1.0, float("nan")):
        with pytest.raises(
            ValueError, match=f"scale must be zero or more, got {scale}"
        ):
            head.loss(head.Table(table), hidden, targets, scale)


def test_arrays_of_another_length_are_refused():
    table, hidden, targets = factors(3, 20, 8)
    packed = head.Table(table)

    with pytest.raises(ValueError, match="hidden has the wrong length"):
        head.loss(packed, hidden[:, :4].copy(), targets, 1.0)
    with pytest.raises(ValueError, match="targets has the wrong length"):
        head.loss(packed, hidden, targets[:2], 1.0)
    _, _, gradient = head.loss(packed, hidden, targets, 1.0)
    with pytest.raises(ValueError, match="into has the wrong length"):
        gradient.add_to(table[:19].copy())
