"""The dense model that generates as a user of PyTorch writes it: fp32, cached keys.

The cache is made once and filled in place; attention is the fused one of the library.
The peer that figures `*_vs_dense` of `make bench-generate` are ratios to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from bitnet_ext.layout import ModelShape
from tests.bench.peers.dense import dense_transformer
from tests.bench.peers.plain import Block, rotate


class CachedTransformer:
    """A dense transformer and the keys and values of a text so far."""

    def __init__(self, shape: ModelShape) -> None:
        self.model = dense_transformer(shape).eval()
        size = (shape.num_layers, 1, shape.num_kv_heads, shape.seq_len, shape.head_dim)
        self.keys, self.values = torch.zeros(size), torch.zeros(size)
        self.length = 0

    @torch.inference_mode()
    def feed(self, ids: Sequence[int]) -> Tensor:
        """Add ids to the text; return the logits (V,) of what follows."""
        x = self.model.embeddings(torch.tensor([ids]))
        end = self.length + len(ids)
        for number, layer in enumerate(self.model.layers):
            x = x + self._attend(number, layer, layer.attn_norm(x), end)
            x = x + layer.feed_forward(layer.ffn_norm(x))
        self.length = end
        last = self.model.final_norm(x[0, -1])
        return functional.linear(last, self.model.embeddings.weight)

    def _attend(self, number: int, layer: Block, x: Tensor, end: int) -> Tensor:
        new = slice(self.length, end)
        cos, sin = self.model.cos[new], self.model.sin[new]
        q, k, v = (
            y.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
            for y in (layer.q(x), layer.k(x), layer.v(x))
        )
        self.keys[number, :, :, new] = rotate(k, cos, sin)
        self.values[number, :, :, new] = v
        mixed = functional.scaled_dot_product_attention(
            rotate(q, cos, sin),
            self.keys[number, :, :, :end],
            self.values[number, :, :, :end],
            is_causal=self.length == 0,
            enable_gqa=layer.grouped,
        )
        return layer.o(layer.attn_sub_norm(mixed.transpose(1, 2).flatten(2)))
