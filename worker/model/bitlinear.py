"""Linear layers with ternary weights and int8 activations, differentiable in both.

The forward pass is BitNet b1.58: weights by absmean to {-1, 0, +1} times a scale
per matrix, activations by absmax to int8 with a scale per token. Gradients go
straight through both roundings to the fp32 latent weights and to the input:

    y  = q(x) @ q(W)^T           int8 x ternary kernel
    dx = q256(dy) @ q(W)         same kernel, dy to int8 per row and group of 256
    dW = dy^T @ q(x)             fp32

Letters in shapes: M tokens, K inputs, N outputs of one weight.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from bitnet_ext import ternary
from bitnet_ext.ternary import QuantisedRows, TernaryWeight

#: Columns of dy that share a scale. One scale per row lets a single large entry
#: round the others away, which costs most where gradients are summed up again.
GRADIENT_GROUP: Final = 256


class BitLinear:
    """One or more ternary weights that read the same input.

    The input is quantised once for all of them. The ternary form of the weights
    is kept until one of them changes, so once per local step and not once a call.
    """

    def __init__(self, *, threads: int = 1) -> None:
        #: Threads of one matrix product; the result does not depend on them.
        self.threads = threads
        self._key: tuple[tuple[int, int], ...] = ()
        self._ternary: tuple[TernaryWeight, ...] = ()

    def __call__(self, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """Return `x @ q(W)^T` for each weight.

        `x` is float32 (..., K), each weight float32 (N, K), each result (..., N).
        """
        outputs: tuple[Tensor, ...] = _TernaryProducts.apply(  # type: ignore[no-untyped-call]
            x, self.quantised(weights), self.threads, *weights
        )
        return outputs

    def quantised(self, weights: tuple[Tensor, ...]) -> tuple[TernaryWeight, ...]:
        """Return the ternary form of the weights, made anew only when they changed."""
        key = tuple((weight.data_ptr(), weight._version) for weight in weights)
        if key != self._key:
            self._ternary = tuple(
                ternary.quantise_weight(weight.detach().numpy()) for weight in weights
            )
            self._key = key
        return self._ternary


def products(
    rows: QuantisedRows, quantised: tuple[TernaryWeight, ...], threads: int
) -> tuple[Any, ...]:
    """Return `rows @ W^T`, float32 (M, N), for each weight."""
    return tuple(
        ternary.matmul(rows, weight.forward, threads=threads) for weight in quantised
    )


def input_gradient(
    quantised: tuple[TernaryWeight, ...], dys: tuple[Tensor, ...], threads: int
) -> Tensor:
    """Return dx, float32 (M, K): the sum over the weights that read this input."""
    total: Tensor | None = None
    for weight, dy in zip(quantised, dys, strict=True):
        rows_MN = ternary.quantise_rows(_rows(dy), GRADIENT_GROUP)
        part = torch.from_numpy(
            ternary.matmul(rows_MN, weight.backward, threads=threads)
        )
        total = part if total is None else total.add_(part)
    if total is None:
        raise ValueError("weights must not be empty")
    return total


def add_weight_gradients(
    grads: tuple[Tensor, ...], dys: tuple[Tensor, ...], rows: QuantisedRows
) -> None:
    """Add `dy^T @ q(x)` to each gradient, (N, K), from its dy, (M, N)."""
    x_MK = _dequantise(rows)
    for grad, dy in zip(grads, dys, strict=True):
        grad.addmm_(dy.t(), x_MK)


class _TernaryProducts(torch.autograd.Function):
    """The three products above, for weights that share their input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        quantised: tuple[TernaryWeight, ...],
        threads: int,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        rows_MK = ternary.quantise_rows(_rows(x))
        ctx.rows_MK, ctx.quantised, ctx.threads = rows_MK, quantised, threads
        ctx.lead = x.shape[:-1]
        return tuple(
            torch.from_numpy(y_MN).view(*ctx.lead, -1)
            for y_MN in products(rows_MK, quantised, threads)
        )

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        dx = input_gradient(ctx.quantised, dys, ctx.threads)
        dws = tuple(
            torch.zeros(weight.forward.num_rows, weight.forward.num_columns)
            for weight in ctx.quantised
        )
        flat_dys = tuple(dy.reshape(-1, dy.shape[-1]) for dy in dys)
        add_weight_gradients(dws, flat_dys, ctx.rows_MK)
        return dx.view(*ctx.lead, -1), None, None, *dws


def _rows(x: Tensor) -> Any:
    """Return `x` as a contiguous NumPy matrix of its last axis."""
    return x.detach().reshape(-1, x.shape[-1]).contiguous().numpy()


def _dequantise(rows: QuantisedRows) -> Tensor:
    """Return q * scale as float32 (M, K); one scale for each row."""
    return torch.from_numpy(rows.q).float().mul_(torch.from_numpy(rows.scale))
