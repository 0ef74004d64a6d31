"""What surrounds the matrix products of a training step: the door to its C kernels.

RMSNorm (also behind a gate) fused with the activation quantiser, its gradient,
softmax with cross-entropy, AdamW. Everything is float32, works in
one pass over memory, and gives the same bits on every CPU and number of threads.
What is not finite goes through visibly.

Letters in shapes: M rows, K columns, V vocabulary. Arrays are
C-contiguous; ValueError names the one whose length is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.isa import kernels as _kernels
from bitnet_ext.ternary import QuantisedRows

Floats = NDArray[np.float32]


class Gate(IntEnum):
    """What stands before a norm: nothing, or act(x) * up."""

    NONE = 0
    SILU = 1
    SQUARED_RELU = 2


@dataclass(frozen=True, slots=True)
class NormInput:
    """The rows that a norm reads: x, or act(x) * up where there is a gate."""

    #: float32 (M, K).
    x: Floats
    #: float32 (M, K); None without a gate.
    up: Floats | None = None
    gate: Gate = Gate.NONE


@dataclass(frozen=True, slots=True)
class Normed:
    """What the gradient of a norm needs; no copies, but the arrays it read."""

    rows: NormInput
    #: float32 (K).
    gain: Floats
    #: float32 (M): one over the root mean square of each row.
    inverse: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """The constants of one step of AdamW on numbers that share their decay."""

    rate: float
    decay: float
    beta1: float
    beta2: float
    eps: float
    #: Steps made, this one included.
    step: int
    #: Factor on the gradient: below 1 where it is clipped.
    clip: float = 1.0


def norm_quantise(
    rows: NormInput, gain_K: Floats, eps: float, *, threads: int = 1
) -> tuple[QuantisedRows, Normed]:
    """Return RMSNorm(rows) * gain as int8 rows, with one scale each."""
    num_rows, num_columns = rows.x.shape
    q = np.empty((num_rows, num_columns), dtype=np.int8)
    scale = np.empty((num_rows, 1), dtype=np.float32)
    normed = Normed(rows, gain_K, np.empty(num_rows, dtype=np.float32))
    status = _kernels.norm_quantise(
        rows.x, rows.up, gain_K, eps, rows.gate, normed.inverse, q, scale, threads
    )
    _check(status)
    return QuantisedRows(q, scale, max(num_columns, 1)), normed


def norm(
    x_MK: Floats, gain_K: Floats, eps: float, *, threads: int = 1
) -> tuple[Floats, Normed]:
    """Return RMSNorm(x) * gain, float32 (M, K)."""
    y_MK, inverse_M = np.empty_like(x_MK), np.empty(len(x_MK), dtype=np.float32)
    _check(_kernels.norm_forward(x_MK, gain_K, eps, inverse_M, y_MK, threads))
    return y_MK, Normed(NormInput(x_MK), gain_K, inverse_M)


def norm_backward(
    dy_MK: Floats,
    normed: Normed,
    dgain_K: Floats,
    *,
    dx_MK: Floats,
    add: bool = False,
    threads: int = 1,
) -> None:
    """Write dx (or, with `add`, add to it) and add to dgain, from dy.

    `dx` may be `dy`. Raises ValueError for a norm behind a gate.
    """
    if normed.rows.gate is not Gate.NONE:
        raise ValueError(f"norm must have no gate, got {normed.rows.gate.name}")
    status = _kernels.norm_backward(
        dy_MK,
        normed.rows.x,
        None,
        normed.gain,
        normed.inverse,
        Gate.NONE,
        dx_MK,
        None,
        add,
        dgain_K,
        threads,
    )
    _check(status)


def gated_norm_backward(
    dy_MK: Floats, normed: Normed, dgain_K: Floats, *, threads: int = 1
) -> tuple[Floats, Floats]:
    """Return the gradients of x and up, written over them, and add to dgain.

    Raises ValueError for a norm that is not behind a gate.
    """
    x_MK, up_MK, gate = normed.rows.x, normed.rows.up, normed.rows.gate
    if up_MK is None or gate is Gate.NONE:
        raise ValueError("norm must be behind a gate, got none")
    status = _kernels.norm_backward(
        dy_MK,
        x_MK,
        up_MK,
        normed.gain,
        normed.inverse,
        gate,
        x_MK,
        up_MK,
        False,
        dgain_K,
        threads,
    )
    _check(status)
    return x_MK, up_MK


def softmax_backward(
    logits_MV: NDArray[np.float32] | NDArray[np.uint16],
    targets_M: NDArray[np.int64],
    scale: float,
    *,
    threads: int = 1,
) -> float:
    """Turn logits into their own gradient, and return the summed cross-entropy.

    The gradient is `scale * (softmax - onehot)`, the loss is in nats. Logits are
    float32, or the bits of bf16 as uint16; between, all is float32. A negative
    target takes no part: its gradient is zero.
    Raises ValueError for a target of V or more.
    """
    nats_M = np.empty(len(logits_MV), dtype=np.float32)
    if logits_MV.dtype == np.uint16:
        status = _kernels.softmax_backward_bf16(
            logits_MV.view(np.uint16), targets_M, scale, nats_M, threads
        )
    else:
        status = _kernels.softmax_backward_fp32(
            logits_MV.view(np.float32), targets_M, scale, nats_M, threads
        )
    _check(status)
    return float(nats_M.sum(dtype=np.float64))


def norm_of(x: Floats, *, threads: int = 1) -> float:
    """Return the Euclidean length of a vector; not finite where any number isn't.

    Squares are summed in float64, in blocks of 4096 and in their order.
    """
    status, total = _kernels.square_sum(x, threads)
    _check(status)
    return math.sqrt(total)


def adamw(
    values: Floats,
    grads: Floats,
    exp_avg: Floats,
    exp_avg_sq: Floats,
    how: AdamW,
    *,
    threads: int = 1,
) -> None:
    """Make one step of AdamW on vectors of one length; zeros are left in `grads`."""
    _kernels.adamw_step(
        values,
        grads,
        exp_avg,
        exp_avg_sq,
        how.clip,
        1.0 - how.rate * how.decay,
        how.rate / (1.0 - how.beta1**how.step),
        1.0 / math.sqrt(1.0 - how.beta2**how.step),
        how.beta1,
        how.beta2,
        how.eps,
        threads,
    )


def add_rows(x_MK: Floats, ids_M: NDArray[np.int64], into: Floats) -> None:
    """Add row m of x to row `ids[m]` of `into`, in the order of m.

    Raises ValueError for an id that is no row of `into`.
    """
    _kernels.add_rows(x_MK, ids_M, into)


def _check(status: int) -> None:
    if status:
        raise MemoryError("a fused kernel found no memory for a row")
