"""The model: a causal transformer of BitLinear layers, as `BitNetForCausalLM`.

- RMSNorm before attention and feed-forward, and once more before each output
  projection (`attn_sub_norm`, `ffn_sub_norm`), where ternary layers need it most
- rotary position embeddings, rotate-half; grouped-query attention
- gated feed-forward (SwiGLU, or squared ReLU), no biases, tied embeddings

Letters in shapes: B sequences, T tokens, H hidden, V vocabulary, N heads,
D width of a head, M = B * T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitnet_ext.layout import ModelShape
from worker.model.bitlinear import BitLinear
from worker.model.flatten import FlatParameters

#: A target that is not predicted: padding, or a token whose successor is unknown.
NO_TARGET: Final = -1


class BitNetModel(nn.Module):
    """The whole model over `flat`, the vector that holds all of its parameters.

    `threads` is for the ternary kernels; torch has its own setting. `precise` takes
    the gradients of weights in fp32 instead of int8.
    """

    def __init__(
        self, shape: ModelShape, *, threads: int = 1, precise: bool = False
    ) -> None:
        super().__init__()
        self.shape = shape
        with torch.device("meta"):  # only names and shapes: `flat` has the memory
            self.embeddings = _parameter(shape.vocab_size, shape.hidden_size)
            self.layers = nn.ModuleList(
                Block(shape, threads, precise) for _ in range(shape.num_layers)
            )
            self.final_norm = _parameter(shape.hidden_size)
        self.rotary = Rotary(shape)
        self.flat = FlatParameters(self, shape)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the hidden states after the final norm, float32 (B, T, H).

        `ids_BT` is int64 with T up to `shape.seq_len`. State t depends on the
        tokens up to and including t alone.
        """
        x_BTH = functional.embedding(ids_BT, self.embeddings)
        for layer in self.layers:
            x_BTH = layer(x_BTH, self.rotary)
        return _rms_norm(x_BTH, self.final_norm, self.shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 (..., V) for hidden states (..., H)."""
        return functional.linear(hidden, self.embeddings)

    def loss(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the mean cross-entropy (nats) over all targets but NO_TARGET."""
        hidden_MH = self(ids_BT).view(-1, self.shape.hidden_size)
        loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
            hidden_MH, self.embeddings, targets_BT.reshape(-1), head_dtype()
        )
        return loss


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, shape: ModelShape, threads: int, precise: bool) -> None:
        super().__init__()
        hidden, wide, kv = shape.hidden_size, shape.intermediate_size, shape.kv_size
        self.shape = shape
        self.attn_norm = _parameter(hidden)
        self.q = _parameter(hidden, hidden)
        self.k = _parameter(kv, hidden)
        self.v = _parameter(kv, hidden)
        self.attn_sub_norm = _parameter(hidden)
        self.o = _parameter(hidden, hidden)
        self.ffn_norm = _parameter(hidden)
        self.gate = _parameter(wide, hidden)
        self.up = _parameter(wide, hidden)
        self.ffn_sub_norm = _parameter(wide)
        self.down = _parameter(hidden, wide)
        self.activation = _ACTIVATIONS[shape.hidden_act]

        def linear() -> BitLinear:
            return BitLinear(threads=threads, precise=precise, adds_to_grad=True)

        self.to_qkv = linear()
        self.to_output = linear()
        self.to_gate_up = linear()
        self.to_down = linear()

    def forward(self, x_BTH: Tensor, rotary: Rotary) -> Tensor:
        """Return the residual stream after this layer, (B, T, H)."""
        x_BTH = x_BTH + self.attend(
            _rms_norm(x_BTH, self.attn_norm, self.shape), rotary
        )
        return x_BTH + self.feed_forward(_rms_norm(x_BTH, self.ffn_norm, self.shape))

    def attend(self, x_BTH: Tensor, rotary: Rotary) -> Tensor:
        """Return causal attention over the normed input, (B, T, H)."""
        q, k, v = (
            y.view(*y.shape[:-1], -1, self.shape.head_dim)
            for y in self.to_qkv(x_BTH, self.q, self.k, self.v)
        )
        mixed_BNTD = functional.scaled_dot_product_attention(
            rotary(q).transpose(1, 2),
            rotary(k).transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.shape.num_kv_heads != self.shape.num_heads,
        )
        mixed_BTH = mixed_BNTD.transpose(1, 2).flatten(2)
        normed = _rms_norm(mixed_BTH, self.attn_sub_norm, self.shape)
        return self.to_output(normed, self.o)[0]

    def feed_forward(self, x_BTH: Tensor) -> Tensor:
        """Return the gated feed-forward of the normed input, (B, T, H)."""
        gate, up = self.to_gate_up(x_BTH, self.gate, self.up)
        wide = _rms_norm(self.activation(gate) * up, self.ffn_sub_norm, self.shape)
        return self.to_down(wide, self.down)[0]


class Rotary:
    """Turns pairs of numbers of a head by an angle that grows with the position.

    Number i of the first half pairs with number i of the second; the angle at
    position t is t * theta ** (-2 i / D). Su et al., RoFormer, arXiv 2104.09864.
    """

    def __init__(self, shape: ModelShape) -> None:
        half = shape.head_dim // 2
        rates = shape.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(shape.seq_len, dtype=torch.float64), rates)
        # One row for each position, the same for every head.
        self.cos = angles.cos().float().unsqueeze(1)
        self.sin = angles.sin().float().unsqueeze(1)

    def __call__(self, x_BTND: Tensor) -> Tensor:
        """Return the turned heads, (B, T, N, D)."""
        num_tokens = x_BTND.shape[1]
        turned: Tensor = _Rotation.apply(  # type: ignore[no-untyped-call]
            x_BTND, self.cos[:num_tokens], self.sin[:num_tokens]
        )
        return turned


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x_BTND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.cos, ctx.sin = cos, sin
        return _rotate(x_BTND, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy_BTND: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(dy_BTND, ctx.cos, -ctx.sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Write both halves into one new tensor: no concatenation, no negated copy."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.empty(x.shape, dtype=x.dtype)
    out_first, out_second = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return turned


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of `softmax(hidden @ E^T)`, with E the embeddings.

    The logits are the largest tensor of a step (M x V), so they are turned in
    place into their own gradient, and the three products with them run in
    `dtype`. Softmax and the loss itself are fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        embeddings_VH: Tensor,
        targets_M: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        hidden, table = hidden_MH.to(dtype), embeddings_VH.to(dtype)
        known_M = targets_M != NO_TARGET
        rows_M = torch.arange(len(targets_M))[known_M]
        logits_MV = (hidden @ table.t()).float()
        torch.log_softmax(logits_MV, -1, out=logits_MV)
        nats = -logits_MV[rows_M, targets_M[known_M]].sum(dtype=torch.float64)
        logits_MV.exp_()[rows_M, targets_M[known_M]] -= 1.0
        logits_MV[~known_M] = 0.0
        num_targets = max(1, len(rows_M))
        ctx.save_for_backward(logits_MV.to(dtype), hidden, table)
        ctx.num_targets = num_targets
        return (nats / num_targets).float()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dlogits_MV, hidden, table = ctx.saved_tensors
        scale = dloss / ctx.num_targets
        dhidden = (dlogits_MV @ table).float().mul_(scale)
        # (E^T)' = h^T @ dlogits has the same numbers; this order is the faster.
        dtable = (dlogits_MV.t() @ hidden).float().mul_(scale)
        return dhidden, dtable, None, None


def head_dtype() -> torch.dtype:
    """Return the type of the head's products in training: bf16 where it is fast.

    Without such instructions torch emulates bf16, and fp32 wins.
    """
    fast = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _parameter(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*size))


def _rms_norm(x: Tensor, gain: Tensor, shape: ModelShape) -> Tensor:
    return functional.rms_norm(x, gain.shape, gain, shape.rms_norm_eps)


def _squared_relu(x: Tensor) -> Tensor:
    return functional.relu(x).square()


_ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": functional.silu,
    "relu2": _squared_relu,
}
