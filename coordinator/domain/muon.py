"""The step of a gradient round: Muon on hidden matrices, AdamW on all else.

    momentum <- mu * momentum + gradient
    x        <- gradient + mu * momentum, made orthogonal
    weights  <- (1 - rate * decay) * weights - rate * 0.2 * sqrt(max(N, K)) * x

`bitnet_ext.newton_schulz` says what is made orthogonal, and how.

The same gradients must give the same bytes on every CPU and for every number of
threads, but a matrix product adds in whatever order the BLAS likes. So factors are
rounded to integers, few enough bits that every sum is exact in float64: then no order
matters. All else is elementwise, one rounding an operation.

Letters in shapes: N rows and K columns of one weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.codecs import is_finite
from bitnet_ext.fused import norm_of
from bitnet_ext.layout import Segment, SegmentKind
from bitnet_ext.newton_schulz import NUM_ITERATIONS, QUINTIC, num_blocks, step_length
from bitnet_ext.outer import Part
from coordinator.domain.outer_step import add_parts

#: Bits of an integer that float64 holds exactly.
_EXACT_BITS: Final = 53

Vector = NDArray[np.float32]
Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserState:
    """Weights, and what the optimiser remembers; float32 (n,) each."""

    weights: Vector
    #: Of Muon where a matrix is hidden, the first moment of AdamW elsewhere.
    momentum: Vector
    #: The second moment of AdamW; zeros where a matrix is hidden.
    square: Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """The numbers of one step."""

    rate: float
    #: Decoupled weight decay, on all but norms.
    decay: float
    #: mu of Muon.
    momentum: float
    beta1: float
    beta2: float
    eps: float
    #: Which step this is, counted from 1.
    step: int


def merged_step(
    state: OptimiserState,
    submissions: Iterable[Part],
    parts: Iterable[Segment],
    sizes: StepSizes,
    *,
    mean: Vector | None = None,
    threads: int = 1,
) -> OptimiserState | None:
    """Return the state after a round; None where it would not be finite.

    Submissions are added up in their order, each times its share, in place onto
    `mean`: what was added up before, None for nothing. Raises PayloadError or
    NonFiniteError for a payload that is not in order.
    """
    mean = np.zeros_like(state.weights) if mean is None else mean
    add_parts(submissions, mean)
    new = gradient_step(state, mean, parts, sizes, threads=threads)
    vectors = (new.weights, new.momentum, new.square)
    return new if all(map(is_finite, vectors)) else None


def gradient_step(
    state: OptimiserState,
    gradient: Vector,
    parts: Iterable[Segment],
    sizes: StepSizes,
    *,
    threads: int = 1,
) -> OptimiserState:
    """Return the state after one step down the mean gradient; inputs stay untouched.

    Whatever is not finite ends in a state that is not. At most `threads` segments
    are worked on at a time.
    """
    new = OptimiserState(
        weights=state.weights.copy(),
        momentum=state.momentum.copy(),
        square=state.square.copy(),
    )
    with ThreadPoolExecutor(threads) as pool:
        steps = pool.map(partial(_step_segment, new, gradient, sizes), parts)
        # No more than waiting for all of them, and raising what one has raised.
        list(steps)
    return new


def _step_segment(
    new: OptimiserState, gradient: Vector, sizes: StepSizes, segment: Segment
) -> None:
    """Make the step of one segment in place; no other reads or writes its part."""
    place = slice(segment.offset, segment.offset + segment.size)
    grad, momentum = gradient[place], new.momentum[place]
    # What is not finite is looked for in the end.
    with np.errstate(over="ignore", invalid="ignore"):
        if segment.is_linear:
            change = _muon_change(grad, momentum, segment.shape, sizes)
        else:
            change = _adamw_change(grad, momentum, new.square[place], sizes)
        weights = new.weights[place]
        if segment.kind is not SegmentKind.NORM:
            weights *= np.float32(1.0 - sizes.rate * sizes.decay)
        weights -= change


def flop(parts: Iterable[Segment]) -> int:
    """Return the FLOP of the products of one step, of those that are made."""
    total = 0
    for segment in parts:
        if segment.is_linear:
            short, long = sorted(segment.shape)
            num = num_blocks(short)
            short //= num
            total += num * 3 * short * short * long
            # A Gram matrix an iteration, and three products to get to the next.
            upper = short * short - (short // 2) * (short - short // 2)
            total += num * NUM_ITERATIONS * short**3
            total += num * (NUM_ITERATIONS - 1) * 3 * 2 * upper * short
    return total


def _muon_change(
    grad: Vector, momentum: Vector, shape: Sequence[int], sizes: StepSizes
) -> Vector:
    """Update the momentum in place, and return what to subtract, flat."""
    mu = np.float32(sizes.momentum)
    momentum *= mu
    momentum += grad
    direction = momentum * mu
    direction += grad
    orthogonal = orthogonalised(direction.reshape(shape)).reshape(-1)
    return orthogonal.astype(np.float32) * np.float32(step_length(sizes.rate, shape))


def _adamw_change(
    grad: Vector, mean: Vector, square: Vector, sizes: StepSizes
) -> Vector:
    """Update both moments in place, and return what to subtract."""
    mean *= np.float32(sizes.beta1)
    mean += grad * np.float32(1.0 - sizes.beta1)
    square *= np.float32(sizes.beta2)
    square += grad * grad * np.float32(1.0 - sizes.beta2)
    height = np.sqrt(square)
    height *= np.float32(1.0 / math.sqrt(1.0 - _power(sizes.beta2, sizes.step)))
    height += np.float32(sizes.eps)
    change = mean * np.float32(sizes.rate / (1.0 - _power(sizes.beta1, sizes.step)))
    change /= height
    return change


def orthogonalised(x_NK: NDArray[np.float32]) -> Matrix:
    """Return x with each block of its short side nearly orthonormal, float64.

    Singular values of a block are around 1, from about 0.5 to 1.2, but for those under
    a tenth of its largest, which grow 40 times at most. Zeros stay zeros.
    """
    is_tall = x_NK.shape[0] > x_NK.shape[1]
    wide = np.ascontiguousarray(x_NK.T if is_tall else x_NK)
    blocks = np.split(wide, num_blocks(len(wide)))
    found = np.concatenate([_orthogonal_block(block) for block in blocks])
    return found.T if is_tall else found


def _orthogonal_block(x_NK: NDArray[np.float32]) -> Matrix:
    """Return the product of all polynomials in x x', times x; N is at most K."""
    norm = norm_of(x_NK.reshape(-1))
    if norm == 0.0 or not math.isfinite(norm):
        return x_NK * np.float64(norm)
    x = x_NK.astype(np.float64) / norm
    gram = exact_gram(x)
    factor = polynomial = _polynomial(gram)
    for _ in range(NUM_ITERATIONS - 1):
        gram = symmetric_product(polynomial, symmetric_product(polynomial, gram))
        polynomial = _polynomial(gram)
        factor = symmetric_product(polynomial, factor)
    return exact_product(factor, x)


def _polynomial(gram_NN: Matrix) -> Matrix:
    """Return what one iteration multiplies x by, for the symmetric x x'."""
    a, b, c = QUINTIC
    found = b * gram_NN + c * exact_gram(gram_NN)
    found.flat[:: len(found) + 1] += a
    return found


def exact_gram(x_NK: Matrix) -> Matrix:
    """Return x x', of x rounded as `exact_product` does, (N, N).

    A BLAS makes only one of its triangles.
    """
    x, step = _integers(x_NK, _bits(x_NK.shape[1]))
    product: Matrix = x @ x.T
    product *= step * step
    return product


def exact_product(left_NK: Matrix, right_KM: Matrix) -> Matrix:
    """Return the product of both factors, rounded to 20 bits or more, (N, M).

    The bits are as many as let every partial sum be an integer below 2**53: so it
    is the same in whatever order, and with or without fused multiply-add.
    """
    bits = _bits(left_NK.shape[1])
    left, left_step = _integers(left_NK, bits)
    right, right_step = _integers(right_KM, bits)
    product: Matrix = left @ right
    product *= left_step * right_step
    return product


def symmetric_product(left_NN: Matrix, right_NN: Matrix) -> Matrix:
    """Return the product of two symmetric matrices that commute, rounded as above.

    But for rounding it is symmetric as well, so of its four blocks the lower left is
    not made: it is the other one, turned.
    """
    bits = _bits(len(left_NN))
    left, left_step = _integers(left_NN, bits)
    right, right_step = _integers(right_NN, bits)
    half = len(left) // 2
    product = np.empty_like(left)
    product[:half] = left[:half] @ right
    product[half:, half:] = left[half:] @ right[:, half:]
    product[half:, :half] = product[:half, half:].T
    product *= left_step * right_step
    return product


def _bits(length: int) -> int:
    """Return the bits of factors whose sums of so many products are exact."""
    return (_EXACT_BITS - math.ceil(math.log2(max(2, length)))) // 2


def _integers(x: Matrix, bits: int) -> tuple[Matrix, float]:
    """Return x as integers of so many bits, and the power of two between them."""
    largest = float(np.abs(x).max(initial=0.0))
    step = math.ldexp(1.0, math.frexp(largest)[1] - bits)
    return np.rint(x / step), step


def _power(base: float, exponent: int) -> float:
    """Return base ** exponent by products alone; `pow` is not the same everywhere."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result
