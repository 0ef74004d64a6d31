"""The outer step against a plain twin: number by number, rounded at each step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bitnet_ext import reference
from bitnet_ext.codecs import Codec, decode, encode
from bitnet_ext.outer import MOST_PARTS, Part
from coordinator.domain.outer_step import merge_weights, outer_step

ordinary = st.floats(-100.0, 100.0, width=32)
vectors = arrays(np.float32, 7, elements=ordinary)


def stepped(weights, momentum, *gradients, rate, decay):
    """Return new weights and momentum, for gradients that share alike."""
    shares = merge_weights([1] * len(gradients))
    parts = (
        Part(Codec.FP32, encode(Codec.FP32, gradient), share)
        for gradient, share in zip(gradients, shares, strict=True)
    )
    after = np.empty_like(weights), np.empty_like(weights)
    assert outer_step((weights, momentum), parts, after, rate=rate, decay=decay)
    return after


def plain_twin(weight, momentum, gradient, rate, decay):
    """One number at a time; each operation is rounded to float32."""
    f = np.float32
    new_momentum = f(f(momentum * f(decay)) + gradient)
    step = f(f(f(new_momentum * f(decay)) + gradient) * f(rate))
    return f(weight - step), new_momentum


@given(
    weights=vectors,
    momentum=vectors,
    gradient=vectors,
    rate=st.floats(0.1, 1.0),
    decay=st.floats(0.0, 0.99),
)
def test_it_is_the_formula_bit_by_bit(weights, momentum, gradient, rate, decay):
    new, new_momentum = stepped(weights, momentum, gradient, rate=rate, decay=decay)

    for i in range(len(weights)):
        due = plain_twin(weights[i], momentum[i], gradient[i], rate, decay)
        assert (new[i], new_momentum[i]) == due
    assert new.dtype == new_momentum.dtype == np.float32


@given(weights=vectors, gradient=vectors)
def test_rate_one_without_momentum_is_base_minus_gradient(weights, gradient):
    zeros = np.zeros_like(weights)

    new, new_momentum = stepped(weights, zeros, gradient, rate=1.0, decay=0.0)

    np.testing.assert_array_equal(new, weights - gradient)
    np.testing.assert_array_equal(new_momentum, gradient)


def test_it_subtracts_so_that_a_positive_pseudo_gradient_lowers_the_weight():
    one = np.ones(3, dtype=np.float32)

    new, _ = stepped(one, 0 * one, one, rate=0.9, decay=0.8)

    np.testing.assert_allclose(new, 1.0 - 0.9 * (1.0 + 0.8), rtol=1e-6)


def test_the_inputs_stay_as_they_were():
    before = [np.arange(4, dtype=np.float32) + i for i in range(3)]
    copies = [vector.copy() for vector in before]

    new, new_momentum = stepped(*before, rate=0.9, decay=0.8)

    for vector, copy in zip(before, copies, strict=True):
        np.testing.assert_array_equal(vector, copy)
        assert not np.shares_memory(vector, new)
        assert not np.shares_memory(vector, new_momentum)


@pytest.mark.parametrize("count", [2, MOST_PARTS, MOST_PARTS + 1, 2 * MOST_PARTS + 3])
def test_many_submissions_are_added_one_after_the_other(count):
    rng = np.random.default_rng(count)
    weights, momentum, *gradients = rng.normal(size=(count + 2, 5000)).astype(
        np.float32
    )
    share = np.float32(1 / count)

    new, new_momentum = stepped(weights, momentum, *gradients, rate=0.9, decay=0.8)

    mean = np.zeros(5000, dtype=np.float32)
    for gradient in gradients:
        mean += share * gradient
    due = reference.outer_step(weights, momentum, mean, rate=0.9, decay=0.8)
    np.testing.assert_array_equal(new, due[0])
    np.testing.assert_array_equal(new_momentum, due[1])


def test_one_submission_has_a_share_of_exactly_one():
    assert merge_weights([12345]) == [1.0]


@given(tokens=st.lists(st.integers(1, 10**9), min_size=1, max_size=20))
def test_shares_go_by_tokens_and_sum_to_one(tokens):
    shares = merge_weights(tokens)

    assert sum(shares) == pytest.approx(1.0)
    assert shares == [count / sum(tokens) for count in tokens]


@pytest.mark.parametrize("tokens", [[], [0], [0, 0]])
def test_nothing_cannot_be_shared(tokens):
    with pytest.raises(ValueError, match="positive sum"):
        merge_weights(tokens)


@pytest.mark.parametrize(
    "codecs",
    [
        [Codec.TERNARY],
        [Codec.TERNARY] * 3,
        [Codec.INT8, Codec.TERNARY, Codec.FP32, Codec.TERNARY, Codec.INT8],
        [*Codec] * MOST_PARTS,
    ],
    ids=len,
)
def test_parts_of_every_codec_are_added_in_their_order(codecs):
    random = np.random.default_rng(0)
    weights, momentum, *gradients = random.standard_normal(
        (2 + len(codecs), 700), dtype=np.float32
    )
    parts = [
        Part(codec, encode(codec, gradient), 1 / (place + 1.5))
        for place, (codec, gradient) in enumerate(zip(codecs, gradients, strict=True))
    ]
    mean = np.zeros(700, dtype=np.float32)
    for part in parts:
        numbers = decode(part.codec, part.payload, 700)
        mean = reference.decode_add(numbers, mean, part.share)
    after = np.empty_like(weights), np.empty_like(weights)

    assert outer_step((weights, momentum), parts, after, rate=0.9, decay=0.8)

    due = reference.outer_step(weights, momentum, mean, rate=0.9, decay=0.8)
    assert [x.tobytes() for x in after] == [x.tobytes() for x in due]
