"""Matrix products and single linear layers as PyTorch does them.

Weights are (N, K), as in `nn.Linear`; results go to memory that is there already,
so no peer pays for allocation. `torch._int_mm` gets ready int8 operands and returns
int32: the scaling, which ours includes, would be two more passes.

Letters in shapes: M rows of activations, K their columns, N rows of the weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from tests.bench.peers.plain import BitLinear

Call = Callable[[], object]


def fp32_product(x_MK: Tensor, w_NK: Tensor) -> Call:
    """Return a call that makes the fp32 product."""
    out = torch.empty(len(x_MK), len(w_NK))
    return lambda: torch.mm(x_MK, w_NK.t(), out=out)


def bf16_product(x_MK: Tensor, w_NK: Tensor) -> Call:
    """Return a call that makes the product of operands that are bf16 already."""
    x, w = x_MK.to(torch.bfloat16), w_NK.to(torch.bfloat16)
    out = torch.empty(len(x), len(w), dtype=torch.bfloat16)
    return lambda: torch.mm(x, w.t(), out=out)


def int_mm_product(x_MK: Tensor, w_NK: Tensor) -> Call:
    """Return a call that makes the int32 product of int8 operands."""
    out = torch.empty(len(x_MK), len(w_NK), dtype=torch.int32)
    return lambda: torch._int_mm(x_MK, w_NK.t(), out=out)


def fake_quantised_step(
    x_MK: Tensor, w_NK: Tensor, dy_MN: Tensor, *, autocast: bool
) -> Call:
    """Return a call that runs a plain BitLinear forward and backward.

    Gradients of input and weight are new tensors each time, as `zero_grad` leaves
    it to the backward pass. With `autocast` the products are bf16.
    """
    layer = BitLinear(w_NK.shape[1], w_NK.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(w_NK.clone())
    x = x_MK.clone().requires_grad_()
    dy = dy_MN.to(torch.bfloat16) if autocast else dy_MN

    def step() -> None:
        x.grad = layer.weight.grad = None
        precision = (
            torch.autocast("cpu", dtype=torch.bfloat16)
            if autocast
            else contextlib.nullcontext()
        )
        with precision:
            y = layer(x)
        y.backward(dy)

    return step
