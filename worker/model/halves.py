"""The two halves of a layer, each one node of the autograd graph.

    attention     x + o(q(norm(attend(Wqkv q(norm(x))))))
    feed-forward  x + down(q(norm(act(gate q(norm(x))) * up q(norm(x)))))

with q() the int8 rows of the ternary products. What a half keeps for its gradient is
its input, the int8 rows, one number a row for each norm, and either the heads with what
they gathered, or gate and up. Gradients of the weights are added straight to their
`grad`, views into the flat vector, so none is ever a tensor of its own.

Letters in shapes: B sequences, T tokens, H hidden, N heads, D width of a head,
F width of the feed-forward, M = B * T.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitnet_ext import fused
from bitnet_ext.attention import Heads, attend, attend_backward
from bitnet_ext.fused import Gate, NormInput
from bitnet_ext.layout import ModelShape
from worker.model.bitlinear import BitLinear, gradients

Floats = NDArray[np.float32]


class Layer(Protocol):
    """What the halves need of a layer."""

    shape: ModelShape
    threads: int
    gate_kind: Gate
    attn_norm: nn.Parameter
    q: nn.Parameter
    k: nn.Parameter
    v: nn.Parameter
    attn_sub_norm: nn.Parameter
    o: nn.Parameter
    ffn_norm: nn.Parameter
    gate: nn.Parameter
    up: nn.Parameter
    ffn_sub_norm: nn.Parameter
    down: nn.Parameter
    to_qkv: BitLinear
    to_output: BitLinear
    to_gate_up: BitLinear
    to_down: BitLinear


def attention_half(
    x_BTH: Tensor, layer: Layer, cosines: Floats, sines: Floats
) -> Tensor:
    """Return the residual stream after causal attention, float32 (B, T, H).

    The angles are float32 (T, D / 2).
    """
    y_BTH: Tensor = _AttentionHalf.apply(  # type: ignore[no-untyped-call]
        x_BTH, layer, cosines, sines
    )
    return y_BTH


def feed_forward_half(x_BTH: Tensor, layer: Layer) -> Tensor:
    """Return the residual stream after the gated feed-forward, float32 (B, T, H)."""
    y_BTH: Tensor = _FeedForwardHalf.apply(x_BTH, layer)  # type: ignore[no-untyped-call]
    return y_BTH


def final_norm(
    x_BTH: Tensor, gain_H: nn.Parameter, shape: ModelShape, threads: int
) -> Tensor:
    """Return RMSNorm(x) * gain, float32 (B, T, H)."""
    y_BTH: Tensor = _Norm.apply(  # type: ignore[no-untyped-call]
        x_BTH, gain_H, shape.rms_norm_eps, threads
    )
    return y_BTH


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTH: Tensor, layer: Layer, cosines: Floats, sines: Floats
    ) -> Tensor:
        ctx.layer = layer
        ctx.inner = _NormedProducts(
            NormInput(_matrix(x_BTH)),
            layer.attn_norm,
            (layer.to_qkv, layer.q, layer.k, layer.v),
            layer,
        )
        q, k, v = ctx.inner.products()
        heads = Heads(q, k, v, cosines, sines)
        ctx.attended = attend(heads, threads=layer.threads)
        ctx.outer = _NormedProducts(
            NormInput(ctx.attended.mixed),
            layer.attn_sub_norm,
            (layer.to_output, layer.o),
            layer,
        )
        (out,) = ctx.outer.products()
        return torch.from_numpy(out).view(x_BTH.shape).add_(x_BTH)

    @staticmethod
    def backward(ctx: Any, dy_BTH: Tensor) -> tuple[Tensor, None, None, None]:
        dmixed = ctx.outer.backward((_rows(dy_BTH),))
        dheads = attend_backward(
            ctx.attended, dmixed.numpy(), threads=ctx.layer.threads
        )
        dx = dy_BTH.clone(memory_format=torch.contiguous_format)
        ctx.inner.backward(tuple(map(torch.from_numpy, dheads)), add_to=dx)
        return dx, None, None, None


class _FeedForwardHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTH: Tensor, layer: Layer) -> Tensor:
        ctx.inner = _NormedProducts(
            NormInput(_matrix(x_BTH)),
            layer.ffn_norm,
            (layer.to_gate_up, layer.gate, layer.up),
            layer,
        )
        gate, up = ctx.inner.products()
        ctx.outer = _NormedProducts(
            NormInput(gate, up, layer.gate_kind),
            layer.ffn_sub_norm,
            (layer.to_down, layer.down),
            layer,
        )
        (out,) = ctx.outer.products()
        return torch.from_numpy(out).view(x_BTH.shape).add_(x_BTH)

    @staticmethod
    def backward(ctx: Any, dy_BTH: Tensor) -> tuple[Tensor, None]:
        outer, ctx.outer = ctx.outer, None
        if outer is None:
            raise RuntimeError("gate and up were written over by an earlier backward")
        dgate_up = outer.backward_through_gate((_rows(dy_BTH),))
        dx = dy_BTH.clone(memory_format=torch.contiguous_format)
        ctx.inner.backward(dgate_up, add_to=dx)
        return dx, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTH: Tensor, gain_H: Tensor, eps: float, threads: int
    ) -> Tensor:
        y_MH, ctx.normed = fused.norm(
            _matrix(x_BTH), gain_H.detach().numpy(), eps, threads=threads
        )
        ctx.gain, ctx.threads = gain_H, threads
        return torch.from_numpy(y_MH).view(x_BTH.shape)

    @staticmethod
    def backward(ctx: Any, dy_BTH: Tensor) -> tuple[Tensor, None, None, None]:
        dx_BTH = torch.empty(dy_BTH.shape)
        fused.norm_backward(
            _rows(dy_BTH).numpy(),
            ctx.normed,
            ctx.gain.grad.numpy(),
            dx_MK=_matrix(dx_BTH),
            threads=ctx.threads,
        )
        return dx_BTH, None, None, None


class _NormedProducts:
    """A norm, its quantiser and the ternary products that read it, for one call."""

    def __init__(
        self,
        rows: NormInput,
        gain: nn.Parameter,
        readers: tuple[BitLinear, *tuple[nn.Parameter, ...]],
        layer: Layer,
    ) -> None:
        self._linear, *weights = readers
        self._gain, self._weights = gain, tuple(weights)
        self._threads = layer.threads
        self._ternary = self._linear.quantised(self._weights)
        self._q, self._normed = fused.norm_quantise(
            rows, gain.detach().numpy(), layer.shape.rms_norm_eps, threads=self._threads
        )

    def products(self) -> tuple[Floats, ...]:
        """Return float32 (M, N) for each weight."""
        return self._linear.products(self._q, self._weights)

    def backward(self, dys: tuple[Tensor, ...], add_to: Tensor | None = None) -> Tensor:
        """Return the gradient of the rows, added to `add_to` where that is given."""
        dnormed = self._backward_to_norm(dys)
        into = dnormed if add_to is None else add_to
        fused.norm_backward(
            dnormed.numpy(),
            self._normed,
            _grad(self._gain).numpy(),
            dx_MK=_matrix(into),
            add=add_to is not None,
            threads=self._threads,
        )
        return into

    def backward_through_gate(self, dys: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up, which are gone afterwards."""
        dgate, dup = fused.gated_norm_backward(
            self._backward_to_norm(dys).numpy(),
            self._normed,
            _grad(self._gain).numpy(),
            threads=self._threads,
        )
        return torch.from_numpy(dgate), torch.from_numpy(dup)

    def _backward_to_norm(self, dys: tuple[Tensor, ...]) -> Tensor:
        dnormed, grads = gradients(
            self._linear, self._ternary, self._q, dys, self._weights
        )
        for weight, grad in zip(self._weights, grads, strict=True):
            if grad is not None:
                _grad(weight).add_(grad)
        return dnormed


def _grad(parameter: nn.Parameter) -> Tensor:
    """Return the view of the flat gradient that the parameter was bound to."""
    if parameter.grad is None:
        raise ValueError("parameter must have a gradient to add to, got none")
    return parameter.grad


def _rows(x: Tensor) -> Tensor:
    """Return a contiguous matrix of the last axis."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _matrix(x: Tensor) -> Floats:
    """Return the same memory as a NumPy matrix, if it is contiguous."""
    matrix: Floats = x.detach().view(-1, x.shape[-1]).numpy()
    return matrix
