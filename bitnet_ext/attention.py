"""Causal attention with its rotary embedding: the door to the C kernels.

Each row of queries gathers the values of its own and earlier positions, by softmax
over products with their keys; queries and keys are turned by the angle of their
position first. All is float32, no score outlives its block of queries, and results
are the same for every number of threads. Variants for CPUs that multiply and add in
one rounding use that, so unlike all other kernels they differ in the last bits.
What is not finite goes through visibly.

Letters in shapes: B sequences, T positions, M = B * T rows, D width of a head, N
heads of queries, K heads of keys and values, each shared by N / K of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.isa import kernels as _kernels
from bitnet_ext.memory import aligned

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Heads:
    """What attention reads: projections as their products wrote them."""

    #: float32 (M, N * D).
    q: Floats
    #: float32 (M, K * D).
    k: Floats
    v: Floats
    #: float32 (T, D / 2): number i of a head's first half pairs with number i of its
    #: second, and both are turned by the angle of row m % T.
    cosines: Floats
    sines: Floats


@dataclass(frozen=True, slots=True)
class Attended:
    """What the gradient of an attention needs; no copies."""

    heads: Heads
    #: float32 (M, N * D): what each query gathered.
    mixed: Floats
    #: float32 (B * N, T): log of the sum of e**score.
    lse: Floats


def attend(heads: Heads, *, threads: int = 1) -> Attended:
    """Return what each query gathers.

    Raises ValueError, naming the array, when shapes do not fit together.
    """
    num_rows, width = heads.q.shape
    num_positions, half = heads.cosines.shape
    num_rows_of_lse = num_rows * width // max(1, 2 * half * num_positions)
    mixed = _like(heads.q)
    lse = np.empty((num_rows_of_lse, num_positions), dtype=np.float32)
    _check(_kernels.attend(*_arrays(heads), mixed, lse, threads))
    return Attended(heads, mixed, lse)


def attend_backward(
    attended: Attended, dmixed: Floats, *, threads: int = 1
) -> tuple[Floats, Floats, Floats]:
    """Return the gradients of q, k and v as they were given: before they turned."""
    heads = attended.heads
    gradients = _like(heads.q), _like(heads.k), _like(heads.v)
    status = _kernels.attend_backward(
        *_arrays(heads), attended.mixed, attended.lse, dmixed, *gradients, threads
    )
    _check(status)
    return gradients


def _arrays(heads: Heads) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    return heads.q, heads.k, heads.v, heads.cosines, heads.sines


def _like(x: Floats) -> Floats:
    return aligned(x.size, np.float32).reshape(x.shape)


def _check(status: int) -> None:
    if status:
        raise MemoryError("attention found no memory for its scores")
