"""Linear layers with ternary weights and int8 activations, differentiable in both.

The forward pass is BitNet b1.58: weights by absmean to {-1, 0, +1} times a scale
per matrix, activations by absmax to int8 with a scale per token. Gradients go
straight through both roundings to the fp32 latent weights and to the input:

    y  = q(x) @ q(W)^T           int8 x ternary kernel
    dx = q256(dy) @ q(W)         same kernel, dy to int8 per row and group of 256
    dW = q128(dy)^T @ q(x)       same kernel, dy to int8 per column and 128 tokens

In the precise mode dW is an fp32 product of torch.

Letters in shapes: M tokens, K inputs, N outputs of one weight.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
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

    def __init__(
        self, *, threads: int = 1, precise: bool = False, adds_to_grad: bool = False
    ) -> None:
        #: Threads of one matrix product; the result does not depend on them.
        self.threads = threads
        #: Whether gradients of weights are products in fp32 instead of int8.
        self.precise = precise
        #: Whether they are added to `weight.grad` where there is one, and autograd
        #: gets none: right for `backward()`, wrong for `torch.autograd.grad`.
        self.adds_to_grad = adds_to_grad
        self._key: tuple[tuple[int, int], ...] = ()
        self._ternary: tuple[TernaryWeight, ...] = ()

    def __call__(self, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """Return `x @ q(W)^T` for each weight.

        `x` is float32 (..., K), each weight float32 (N, K), each result (..., N).
        """
        outputs: tuple[Tensor, ...] = _TernaryProducts.apply(  # type: ignore[no-untyped-call]
            x, self, self.quantised(weights), *weights
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
        self, rows: QuantisedRows, weights: tuple[Tensor, ...]
    ) -> tuple[NDArray[np.float32], ...]:
        """Return `rows @ q(W)^T`, float32 (M, N), for each weight: no graph."""
        return tuple(
            ternary.matmul(rows, weight.forward, threads=self.threads)
            for weight in self.quantised(weights)
        )


class _TernaryProducts(torch.autograd.Function):
    """The three products above, for weights that share their input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: BitLinear,
        quantised: tuple[TernaryWeight, ...],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        rows_MK = ternary.quantise_rows(_rows(x))
        ctx.rows_MK, ctx.quantised, ctx.layer = rows_MK, quantised, layer
        ctx.lead, ctx.weights = x.shape[:-1], weights
        return tuple(
            torch.from_numpy(y_MN).view(*ctx.lead, -1)
            for y_MN in layer.products(rows_MK, weights)
        )

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        dx, dws = gradients(ctx.layer, ctx.quantised, ctx.rows_MK, dys, ctx.weights)
        return dx.view(*ctx.lead, -1), None, None, *dws


def gradients(
    layer: BitLinear,
    quantised: tuple[TernaryWeight, ...],
    rows_MK: QuantisedRows,
    dys: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return dx, float32 (M, K), and dW, float32 (N, K), of each weight.

    dx is the sum over the weights, which all read this input. A dW that was added in
    place is None.
    """
    if not quantised:
        raise ValueError("weights must not be empty")
    find = _precise_gradients if layer.precise else _int8_gradients
    grads, dys_MN = find(layer, rows_MK, [_rows(dy) for dy in dys], weights)
    total: NDArray[np.float32] | None = None
    for weight, dy_MN in zip(quantised, dys_MN, strict=True):
        total = ternary.matmul(
            dy_MN,
            weight.backward,
            out=total,
            accumulate=total is not None,
            threads=layer.threads,
        )
    return torch.from_numpy(total), grads


#: Each dW, and each dy as int8 rows.
_Gradients = tuple[list[Tensor | None], list[QuantisedRows]]


def _precise_gradients(
    layer: BitLinear,
    rows_MK: QuantisedRows,
    dys: list[NDArray[np.float32]],
    weights: tuple[Tensor, ...],
) -> _Gradients:
    x_MK = _dequantise(rows_MK)
    grads: list[Tensor | None] = [torch.from_numpy(dy).t() @ x_MK for dy in dys]
    return grads, [ternary.quantise_rows(dy, GRADIENT_GROUP) for dy in dys]


def _int8_gradients(
    layer: BitLinear,
    rows_MK: QuantisedRows,
    dys: list[NDArray[np.float32]],
    weights: tuple[Tensor, ...],
) -> _Gradients:
    """Quantise each dy once, its columns for dW and its rows for dx."""
    tokens = ternary.pack_tokens(rows_MK, threads=layer.threads)
    grads: list[Tensor | None] = []
    rounded: list[QuantisedRows] = []
    for dy, weight in zip(dys, weights, strict=True):
        grad = weight.grad if layer.adds_to_grad else None
        into = torch.empty(weight.shape) if grad is None else grad
        rounded.append(ternary.empty_rows(len(dy), dy.shape[1], GRADIENT_GROUP))
        ternary.weight_gradient(
            dy,
            tokens,
            into.numpy(),
            accumulate=grad is not None,
            dy_rows=rounded[-1],
            threads=layer.threads,
        )
        grads.append(into if grad is None else None)
    return grads, rounded


def _rows(x: Tensor) -> Any:
    """Return `x` as a contiguous NumPy matrix of its last axis."""
    return x.detach().reshape(-1, x.shape[-1]).contiguous().numpy()


def _dequantise(rows: QuantisedRows) -> Tensor:
    """Return q * scale as float32 (M, K); one scale for each row."""
    return torch.from_numpy(rows.q).float().mul_(torch.from_numpy(rows.scale))
