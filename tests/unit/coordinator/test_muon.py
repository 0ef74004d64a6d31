"""The step of a gradient round: its twin, its sign, and the same bytes everywhere."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext.codecs import Codec, NonFiniteError, decode, encode
from bitnet_ext.layout import ModelShape, num_params, segments
from bitnet_ext.newton_schulz import num_blocks
from bitnet_ext.outer import Part
from coordinator.domain import muon
from coordinator.domain.muon import (
    OptimiserState,
    StepSizes,
    exact_gram,
    exact_product,
    flop,
    gradient_step,
    merged_step,
    orthogonalised,
    symmetric_product,
)

SHAPE = ModelShape(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    seq_len=8,
)
PARTS = segments(SHAPE)
SIZES = StepSizes(
    rate=0.02, decay=0.0, momentum=0.8, beta1=0.9, beta2=0.95, eps=1e-8, step=1
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def fresh(weights=None):
    size = num_params(SHAPE)
    zeros = np.zeros(size, dtype=np.float32)
    return OptimiserState(
        weights=normal(size) if weights is None else weights,
        momentum=zeros,
        square=zeros,
    )


def part(vector, name):
    (segment,) = (segment for segment in PARTS if segment.name == name)
    return vector[segment.offset : segment.offset + segment.size].reshape(segment.shape)


def blocks(x):
    """The parts that become orthogonal, each with its short side first."""
    wide = x.T if x.shape[0] > x.shape[1] else x
    return np.split(wide, num_blocks(len(wide)))


@pytest.mark.parametrize(
    "shape", [(8, 8), (16, 64), (64, 16), (6, 5), (1, 5), (5, 1), (400, 192)]
)
def test_singular_values_become_about_one_and_directions_stay(shape):
    x = normal(*shape)

    found = orthogonalised(x)

    for before, after in zip(blocks(x), blocks(found), strict=True):
        left, _, right = np.linalg.svd(before, full_matrices=False)
        sizes = left.T @ after @ right.T
        np.testing.assert_allclose(sizes, np.diag(np.diag(sizes)), atol=1e-4)
        assert np.diag(sizes).max() < 1.25
        assert np.diag(sizes)[: len(sizes) // 2 + 1].min() > 0.5


@pytest.mark.parametrize("height", [1e-30, 1e-3, 1e20])
def test_the_size_of_a_matrix_does_not_matter(height):
    x = normal(8, 16)

    scaled = orthogonalised(x * np.float32(height))

    np.testing.assert_allclose(scaled, orthogonalised(x), atol=1e-4)


def test_zeros_stay_zeros():
    assert not orthogonalised(np.zeros((4, 6), dtype=np.float32)).any()


def test_what_is_not_finite_is_seen_in_the_weights():
    gradient = normal(num_params(SHAPE))
    place = part(gradient, "layers.0.q")
    place[0, 0] = np.inf

    new = gradient_step(fresh(), gradient, PARTS, SIZES)

    half, other = blocks(part(new.weights, "layers.0.q"))
    assert not np.isfinite(half).any()
    assert np.isfinite(other).all()


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 40), st.integers(0, 9))
def test_a_product_is_exact_for_rounded_factors_in_any_order(
    rows, inner, columns, seed
):
    random = np.random.default_rng(seed)
    left = random.standard_normal((rows, inner))
    right = random.standard_normal((inner, columns))
    order = random.permutation(inner)

    product = exact_product(left, right)

    shuffled = exact_product(left[:, order], right[order])
    np.testing.assert_array_equal(product, shuffled)
    tolerance = 2.0**-19 * inner * np.abs(left).max() * np.abs(right).max()
    np.testing.assert_allclose(product, left @ right, atol=tolerance)


def test_sums_at_the_limit_are_still_exact():
    # All signs alike and all numbers at the top: the largest sum that can be.
    left = np.full((2, 4096), np.nextafter(1.0, 0.0))

    product = exact_product(left, left.T)

    assert (product == 4096.0).all()


def plain_twin(weights, gradient, momentum, sizes):
    """One matrix, by the formula of the file's head in float64."""
    momentum = sizes.momentum * momentum + gradient
    whole = gradient + sizes.momentum * momentum
    found = []
    for block in blocks(whole):
        x = block / np.linalg.norm(block)
        for _ in range(3):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        found.append(x)
    x = np.concatenate(found)
    x = x.T if whole.shape[0] > whole.shape[1] else x
    decayed = weights * (1 - sizes.rate * sizes.decay)
    return decayed - sizes.rate * 0.2 * np.sqrt(max(x.shape)) * x, momentum


@pytest.mark.parametrize("name", ["layers.0.q", "layers.0.gate", "layers.0.down"])
def test_hidden_matrices_take_the_step_of_muon(name):
    state, gradients = fresh(), [normal(num_params(SHAPE), seed=s) for s in (1, 2)]
    sizes = dataclasses.replace(SIZES, decay=0.1)
    weights = part(state.weights, name).astype(np.float64)
    momentum = np.zeros_like(weights)

    for gradient in gradients:
        state = gradient_step(state, gradient, PARTS, sizes)
        weights, momentum = plain_twin(weights, part(gradient, name), momentum, sizes)

    np.testing.assert_allclose(part(state.weights, name), weights, atol=1e-5)
    np.testing.assert_allclose(part(state.momentum, name), momentum, rtol=1e-5)
    assert not part(state.square, name).any()


@pytest.mark.parametrize("name", ["embeddings", "final_norm"])
def test_tables_and_norms_take_the_step_of_adamw(name):
    state, gradients = fresh(), [normal(num_params(SHAPE), seed=s) for s in (1, 2)]
    sizes = dataclasses.replace(SIZES, decay=0.1)
    decay = 0.0 if name == "final_norm" else 0.1
    weights = part(state.weights, name).astype(np.float64)
    mean, square = np.zeros_like(weights), np.zeros_like(weights)

    for step, gradient in enumerate(gradients, start=1):
        sizes = dataclasses.replace(sizes, step=step)
        state = gradient_step(state, gradient, PARTS, sizes)
        own = part(gradient, name)
        mean = 0.9 * mean + 0.1 * own
        square = 0.95 * square + 0.05 * own * own
        height = np.sqrt(square / (1 - 0.95**step)) + 1e-8
        weights = weights * (1 - 0.02 * decay)
        weights -= 0.02 * mean / (1 - 0.9**step) / height

    np.testing.assert_allclose(part(state.weights, name), weights, rtol=1e-5, atol=1e-6)


def test_a_step_goes_down_the_gradient():
    target = normal(num_params(SHAPE), seed=5)
    state = fresh()
    before = np.linalg.norm(state.weights - target)

    for step in range(1, 101):
        gradient = state.weights - target
        state = gradient_step(
            state, gradient, PARTS, dataclasses.replace(SIZES, step=step)
        )

    assert np.linalg.norm(state.weights - target) < 0.8 * before


def test_threads_change_no_bit():
    state, gradient = fresh(), normal(num_params(SHAPE), seed=1)

    one, four = (
        gradient_step(state, gradient, PARTS, SIZES, threads=threads)
        for threads in (1, 4)
    )

    for name in ("weights", "momentum", "square"):
        np.testing.assert_array_equal(getattr(four, name), getattr(one, name))


def test_the_inputs_stay_as_they_were():
    state, gradient = fresh(), normal(num_params(SHAPE), seed=1)
    copies = [v.copy() for v in (state.weights, state.momentum, state.square, gradient)]

    gradient_step(state, gradient, PARTS, SIZES)

    for vector, copy in zip(
        (state.weights, state.momentum, state.square, gradient), copies, strict=True
    ):
        np.testing.assert_array_equal(vector, copy)


@pytest.mark.parametrize("codec", Codec)
def test_a_round_steps_down_the_weighted_mean_of_what_was_decoded(codec):
    state, size = fresh(), num_params(SHAPE)
    payloads = [encode(codec, normal(size, seed=seed)) for seed in (1, 2)]
    parts = [
        Part(codec, payload, share)
        for payload, share in zip(payloads, (0.25, 0.75), strict=True)
    ]

    new = merged_step(state, parts, PARTS, SIZES)

    first, second = (decode(codec, payload, size) for payload in payloads)
    mean = np.float32(0.25) * first + np.float32(0.75) * second
    due = gradient_step(state, mean, PARTS, SIZES)
    for name in ("weights", "momentum", "square"):
        np.testing.assert_array_equal(getattr(new, name), getattr(due, name))


# With the first the square of the gradient is infinite, and the weights are not.
@pytest.mark.parametrize(
    ("name", "height"),
    [("embeddings", 1e25), ("embeddings", 3e38), ("layers.0.q", 3e38)],
)
def test_a_round_whose_step_is_not_finite_makes_no_state(name, height):
    gradient = np.zeros(num_params(SHAPE), dtype=np.float32)
    part(gradient, name)[:] = height
    parts = [Part(Codec.FP32, encode(Codec.FP32, gradient), share) for share in (1, 1)]

    assert merged_step(fresh(), parts, PARTS, SIZES) is None


def test_a_payload_that_is_not_finite_is_refused():
    payload = np.full(num_params(SHAPE), np.nan, dtype=np.float32).tobytes()

    with pytest.raises(NonFiniteError):
        merged_step(fresh(), [Part(Codec.FP32, payload, 1.0)], PARTS, SIZES)


def test_a_product_of_a_matrix_with_itself_is_that_of_two():
    x = normal(7, 300).astype(np.float64)

    np.testing.assert_array_equal(exact_gram(x), exact_product(x, x.T))


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_of_a_symmetric_product_three_blocks_are_those_of_the_whole(size):
    # Polynomials of one symmetric matrix commute.
    left = exact_gram(normal(size, 80).astype(np.float64))
    right = 3.0 * left - 0.1 * exact_gram(left)

    found = symmetric_product(left, right)

    whole, half = exact_product(left, right), size // 2
    np.testing.assert_array_equal(found[:half], whole[:half])
    np.testing.assert_array_equal(found[half:, half:], whole[half:, half:])
    np.testing.assert_array_equal(found[half:, :half], found[:half, half:].T)
    np.testing.assert_allclose(found, whole, atol=1e-4 * np.abs(whole).max())


def test_flop_are_those_of_the_products_that_are_made(monkeypatch):
    made = []

    def counted(product, num_made):
        def wrapper(*factors):
            found = product(*factors)
            made.append(2 * num_made(*found.shape) * factors[0].shape[1])
            return found

        return wrapper

    def upper(rows, columns):
        return rows * columns - (rows // 2) * (columns - columns // 2)

    # Of a symmetric product a BLAS makes half.
    for product, num_made in (
        (exact_gram, lambda rows, columns: rows * columns / 2),
        (exact_product, lambda rows, columns: rows * columns),
        (symmetric_product, upper),
    ):
        monkeypatch.setattr(muon, product.__name__, counted(product, num_made))

    gradient_step(fresh(), normal(num_params(SHAPE)), PARTS, SIZES)

    assert flop(PARTS) == sum(made)


SCRIPT = """
import hashlib, numpy as np
from coordinator.domain.muon import orthogonalised
x = np.random.default_rng(0).standard_normal((160, 700), dtype=np.float32)
print(hashlib.sha256(orthogonalised(x).tobytes()).hexdigest())
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"OPENBLAS_NUM_THREADS": "2"},
        {"OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Haswell"},
        {"OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Nehalem"},
    ],
)
def test_the_bytes_are_the_same_for_other_threads_and_other_kernels(environment):
    def digest(extra):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, **extra},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return run.stdout

    assert digest(environment) == digest({"OPENBLAS_NUM_THREADS": "1"})
