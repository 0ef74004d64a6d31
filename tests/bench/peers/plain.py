"""BitNet b1.58 as a user of PyTorch writes it: fp32 and fake-quantised weights.

The peer that every figure `*_vs_plain` and `*_vs_fake` is a ratio to. It shares the
sizes (`ModelShape`) with our model and nothing else. No trick is left out that a
user finds in the documentation of torch: RMSNorm, SDPA and cross-entropy are the
fused ones of the library.

Peers were committed before the kernels they judge and are not changed since.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitnet_ext.layout import ModelShape

#: Standard deviation of the first weights.
_DEVIATION = 0.02


def fake_quantise_activations(x: Tensor) -> Tensor:
    """Round each token to the 255 values of int8; the gradient passes unchanged."""
    scale = 127.0 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    return x + ((x * scale).round().clamp(-128, 127) / scale - x).detach()


def fake_quantise_weight(weight: Tensor) -> Tensor:
    """Round to -1, 0, 1 times the mean of |w|; the gradient passes unchanged."""
    scale = 1.0 / weight.abs().mean().clamp(min=1e-5)
    return weight + ((weight * scale).round().clamp(-1, 1) / scale - weight).detach()


class BitLinear(nn.Linear):
    """A linear layer without bias whose input and weight are fake-quantised."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., N) for x (..., K)."""
        return functional.linear(
            fake_quantise_activations(x), fake_quantise_weight(self.weight)
        )


class Block(nn.Module):
    """Attention, then a gated feed-forward, each added to its input."""

    def __init__(self, shape: ModelShape, linear: type[nn.Linear]) -> None:
        super().__init__()
        hidden, wide, kv = shape.hidden_size, shape.intermediate_size, shape.kv_size
        self.head_dim = shape.head_dim
        self.grouped = shape.num_kv_heads != shape.num_heads
        self.attn_norm = nn.RMSNorm(hidden, eps=shape.rms_norm_eps)
        self.q = linear(hidden, hidden, bias=False)
        self.k = linear(hidden, kv, bias=False)
        self.v = linear(hidden, kv, bias=False)
        self.attn_sub_norm = nn.RMSNorm(hidden, eps=shape.rms_norm_eps)
        self.o = linear(hidden, hidden, bias=False)
        self.ffn_norm = nn.RMSNorm(hidden, eps=shape.rms_norm_eps)
        self.gate = linear(hidden, wide, bias=False)
        self.up = linear(hidden, wide, bias=False)
        self.ffn_sub_norm = nn.RMSNorm(wide, eps=shape.rms_norm_eps)
        self.down = linear(wide, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return (B, T, H) for x (B, T, H); cos and sin are (T, D / 2)."""
        x = x + self.attend(self.attn_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return causal attention over (B, T, H)."""
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for y in (self.q(x), self.k(x), self.v(x))
        )
        mixed = functional.scaled_dot_product_attention(
            rotate(q, cos, sin),
            rotate(k, cos, sin),
            v,
            is_causal=True,
            enable_gqa=self.grouped,
        )
        # Under autocast only an fp32 input goes to the fused RMSNorm.
        mixed = mixed.transpose(1, 2).flatten(2).float()
        return self.o(self.attn_sub_norm(mixed))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return the SwiGLU feed-forward of (B, T, H)."""
        wide = functional.silu(self.gate(x)) * self.up(x)
        return self.down(self.ffn_sub_norm(wide.float()))


class Transformer(nn.Module):
    """The causal model with tied embeddings; `parameters()` come in layout order.

    `linear` makes the seven linear layers of a block. Raises ValueError for a shape
    whose feed-forward is not SwiGLU.
    """

    def __init__(self, shape: ModelShape, linear: type[nn.Linear] = BitLinear) -> None:
        if shape.hidden_act != "silu":
            raise ValueError(f"hidden_act must be silu, got {shape.hidden_act!r}")
        super().__init__()
        self.embeddings = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(
            Block(shape, linear) for _ in range(shape.num_layers)
        )
        self.final_norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        half = shape.head_dim // 2
        rates = shape.rope_theta ** (-torch.arange(half).float() / half)
        angles = torch.outer(torch.arange(shape.seq_len).float(), rates)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=_DEVIATION)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the hidden states (B, T, H) of token ids (B, T)."""
        x = self.embeddings(ids)
        num_tokens = ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:num_tokens], self.sin[:num_tokens])
        return self.final_norm(x)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of targets (B, T)."""
        logits = functional.linear(self(ids), self.embeddings.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half position embedding of (B, heads, T, D)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def adamw(model: nn.Module, *, fused: bool) -> torch.optim.AdamW:
    """Return AdamW with decay on matrices alone; not fused is torch's default."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": gains, "weight_decay": 0.0},
    ]
    # None, not False: the default picks the implementation that torch prefers.
    return torch.optim.AdamW(
        groups, lr=1e-3, betas=(0.9, 0.95), fused=True if fused else None
    )
