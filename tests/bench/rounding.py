"""The plain peer with one rounding of its gradients: what ours does, written anew.

Each layer differs from `peers.plain.BitLinear` in one thing, so that a curve shows
what that thing does to the training. No code is shared with the kernels.

Letters in shapes: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from bitnet_ext.ternary import TOKENS
from tests.bench.peers.plain import (
    BitLinear,
    fake_quantise_activations,
    fake_quantise_weight,
)
from worker.model.bitlinear import GRADIENT_GROUP

#: Keeps zeros from being divided by zero.
_TINY: Final = 1e-30


class _RoundedProduct(torch.autograd.Function):
    """x @ w^T whose gradients are products of dy in int8, as far as that is asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, for_dx: bool, for_dw: bool) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.rounds = for_dx, for_dw
        return functional.linear(x, w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        for_dx, for_dw = ctx.rounds
        dy_MN, x_MK = dy.flatten(0, -2), x.flatten(0, -2)
        dx = (_round_rows(dy_MN) if for_dx else dy_MN) @ w
        dw = _rounded_dw(dy_MN, x_MK) if for_dw else dy_MN.t() @ x_MK
        return dx.view(x.shape), dw, None, None


def _round_rows(dy_MN: Tensor) -> Tensor:
    """Return dy in int8 with a scale for each row and group of columns."""
    groups = dy_MN.split(GRADIENT_GROUP, dim=1)
    return torch.cat([_rounded(group, 1) for group in groups], dim=1)


def _rounded_dw(dy_MN: Tensor, x_MK: Tensor) -> Tensor:
    """Return dy^T @ x; the scale of each row of x goes to dy before it is rounded."""
    scale_M1 = x_MK.abs().amax(1, keepdim=True).clamp(min=1e-5) / 127
    scaled = (dy_MN * scale_M1).split(TOKENS)
    dy = torch.cat([_rounded(part, 0) for part in scaled])
    return dy.t() @ (x_MK / scale_M1)


def _rounded(x: Tensor, dim: int) -> Tensor:
    """Return x in 255 steps of the largest magnitude along `dim`."""
    scale = x.abs().amax(dim, keepdim=True).clamp(min=_TINY) / 127
    return (x / scale).round() * scale


class Int8Dx(BitLinear):
    """Plain, but for the int8 of dy behind the gradient of the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., N) for x (..., K)."""
        return _product(self, x, for_dx=True)


class Int8Dw(BitLinear):
    """Plain, but for the int8 of dy behind the gradient of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., N) for x (..., K)."""
        return _product(self, x, for_dw=True)


def _product(
    layer: BitLinear, x: Tensor, *, for_dx: bool = False, for_dw: bool = False
) -> Tensor:
    y: Tensor = _RoundedProduct.apply(
        fake_quantise_activations(x), fake_quantise_weight(layer.weight), for_dx, for_dw
    )
    return y
