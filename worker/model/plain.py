"""The same model in plain PyTorch, for where our kernels do not run or are not fast.

That is any device but the CPU, and a CPU without a fast variant of the kernels. The
roundings of the forward pass are faked in fp32 and let gradients pass straight
through; autograd adds those to `grad`, the views into the flat vector.

Letters in shapes: B sequences, T tokens, H hidden, N heads, D width of a head,
V vocabulary, M = B * T.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from bitnet_ext.fused import AdamW
from worker.model.halves import Floats, Layer
from worker.model.head import NO_TARGET

#: The least scale of a weight, as in `bitnet_ext.ternary.quantise_weight`.
_LEAST_SCALE: Final = 1e-5
#: Keeps a row of zeros from being divided by zero; no row that counts is smaller.
_TINY: Final = torch.finfo(torch.float32).tiny


def attention_half(
    x_BTH: Tensor, layer: Layer, cosines: Floats, sines: Floats
) -> Tensor:
    """Return the residual stream after causal attention, float32 (B, T, H)."""
    angles = tuple(torch.from_numpy(part).to(x_BTH.device) for part in (cosines, sines))
    shape = layer.shape
    normed = _rounded_rows(_norm(x_BTH, layer.attn_norm, shape.rms_norm_eps))
    heads = (*x_BTH.shape[:2], -1, shape.head_dim)
    q, k, v = (
        functional.linear(normed, _ternary(weight)).view(heads).transpose(1, 2)
        for weight in (layer.q, layer.k, layer.v)
    )
    mixed_BNTD = functional.scaled_dot_product_attention(
        _rotated(q, *angles),
        _rotated(k, *angles),
        v,
        is_causal=True,
        enable_gqa=shape.num_kv_heads != shape.num_heads,
    )
    mixed_BTH = mixed_BNTD.transpose(1, 2).flatten(2)
    normed = _norm(mixed_BTH, layer.attn_sub_norm, shape.rms_norm_eps)
    return x_BTH + functional.linear(_rounded_rows(normed), _ternary(layer.o))


def feed_forward_half(x_BTH: Tensor, layer: Layer) -> Tensor:
    """Return the residual stream after the gated feed-forward, float32 (B, T, H)."""
    eps = layer.shape.rms_norm_eps
    normed = _rounded_rows(_norm(x_BTH, layer.ffn_norm, eps))
    gate = functional.linear(normed, _ternary(layer.gate))
    up = functional.linear(normed, _ternary(layer.up))
    is_silu = layer.shape.hidden_act == "silu"
    opened = functional.silu(gate) if is_silu else functional.relu(gate).square()
    wide = _norm(opened * up, layer.ffn_sub_norm, eps)
    return x_BTH + functional.linear(_rounded_rows(wide), _ternary(layer.down))


def lookup(ids_BT: Tensor, embeddings_VH: Tensor) -> Tensor:
    """Return the rows of the embeddings, float32 (B, T, H)."""
    return functional.embedding(ids_BT, embeddings_VH)


def final_norm(x_BTH: Tensor, gain_H: Tensor, eps: float) -> Tensor:
    """Return RMSNorm(x) * gain, float32 (B, T, H)."""
    return _norm(x_BTH, gain_H, eps)


def head_loss(hidden_MH: Tensor, embeddings_VH: Tensor, targets_M: Tensor) -> Tensor:
    """Return the mean cross-entropy (nats) over all targets but NO_TARGET."""
    nats = functional.cross_entropy(
        functional.linear(hidden_MH, embeddings_VH),
        targets_M,
        ignore_index=NO_TARGET,
        reduction="sum",
    )
    return nats / (targets_M != NO_TARGET).sum().clamp(min=1)


@torch.no_grad()
def adamw(
    values: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, how: AdamW
) -> None:
    """Make the step of `bitnet_ext.fused.adamw` on tensors of any device."""
    clipped = grads * how.clip
    grads.zero_()
    exp_avg.lerp_(clipped, 1.0 - how.beta1)
    exp_avg_sq.mul_(how.beta2).addcmul_(clipped, clipped, value=1.0 - how.beta2)
    root = (1.0 - how.beta2**how.step) ** -0.5
    divisor = exp_avg_sq.sqrt().mul_(root).add_(how.eps)
    values.mul_(1.0 - how.rate * how.decay)
    values.addcdiv_(exp_avg, divisor, value=-how.rate / (1.0 - how.beta1**how.step))


def _norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, gain.shape, gain, eps)


def _rounded_rows(x: Tensor) -> Tensor:
    """Return each row in the 255 steps of its largest magnitude."""
    scale = x.detach().abs().amax(-1, keepdim=True) / 127.0
    rounded = (x.detach() / scale.clamp(min=_TINY)).round() * scale
    return _straight_through(x, rounded)


def _ternary(weight: Tensor) -> Tensor:
    """Return -1, 0 and 1 times the mean magnitude of the weight."""
    scale = weight.detach().abs().mean().clamp(min=_LEAST_SCALE)
    rounded = (weight.detach() / scale).round().clamp(-1.0, 1.0) * scale
    return _straight_through(weight, rounded)


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return the rounded values; the gradient goes to x unchanged."""
    return x + (rounded - x).detach()


def _rotated(x_BNTD: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the halves of each head by the angles (T, D / 2)."""
    first, second = x_BNTD.chunk(2, dim=-1)
    return torch.cat(
        (first * cosines - second * sines, second * cosines + first * sines), dim=-1
    )
