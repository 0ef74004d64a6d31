"""The model: a causal transformer of BitLinear layers, as `BitNetForCausalLM`.

- RMSNorm before attention and feed-forward, and once more before each output
  projection (`attn_sub_norm`, `ffn_sub_norm`), where ternary layers need it most
- rotary position embeddings, rotate-half; grouped-query attention
- gated feed-forward (SwiGLU, or squared ReLU), no biases, tied embeddings

Letters in shapes: B sequences, T tokens, H hidden, V vocabulary, N heads,
D width of a head, M = B * T.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitnet_ext.fused import Gate
from bitnet_ext.layout import ModelShape
from worker.model import plain
from worker.model.bitlinear import BitLinear
from worker.model.flatten import FlatParameters
from worker.model.halves import Floats, attention_half, feed_forward_half, final_norm
from worker.model.head import NO_TARGET, head_dtype, head_loss, lookup

__all__ = ["NO_TARGET", "BitNetModel", "Block", "Rotary"]

_CPU: Final = torch.device("cpu")

_GATES: Final = {"silu": Gate.SILU, "relu2": Gate.SQUARED_RELU}


class BitNetModel(nn.Module):
    """The whole model over `flat`, the vector that holds all of its parameters.

    `threads` is for our own kernels; torch has its own setting. `precise` takes the
    gradients of weights in fp32 instead of int8. A `plain` model is computed by torch
    alone, as it is on any `device` but the CPU. `threads`, `plain` and `micro_batch`
    may be changed between two steps.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        threads: int = 1,
        precise: bool = False,
        device: torch.device = _CPU,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.device = device
        self.plain = device.type != "cpu"
        #: Sequences of a local step that are trained at a time; None: all.
        self.micro_batch: int | None = None
        with torch.device("meta"):  # only names and shapes: `flat` has the memory
            self.embeddings = _parameter(shape.vocab_size, shape.hidden_size)
            self.layers = nn.ModuleList(
                Block(shape, precise) for _ in range(shape.num_layers)
            )
            self.final_norm = _parameter(shape.hidden_size)
        self.rotary = Rotary(shape)
        self.flat = FlatParameters(self, shape, device)
        self.threads = threads

    @property
    def threads(self) -> int:
        """The most threads that one of our kernels uses."""
        return self._threads

    @threads.setter
    def threads(self, threads: int) -> None:
        self._threads = threads
        for module in self.modules():
            if isinstance(module, Block):
                module.use_threads(threads)

    @property
    def torch_threads(self) -> int:
        """How many threads torch should have meanwhile: one, where our kernels do all.

        Its threads wait busily for their next operator, on the cores that ours need.
        """
        by_us = not self.plain and head_dtype() is torch.int8
        return 1 if by_us else torch.get_num_threads()

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the hidden states after the final norm, float32 (B, T, H).

        `ids_BT` is int64 with T up to `shape.seq_len`. State t depends on the
        tokens up to and including t alone.
        """
        ids_BT = ids_BT.to(self.device)
        look_up = plain.lookup if self.plain else lookup
        x_BTH = look_up(ids_BT, self.embeddings)
        for layer in self.layers:
            x_BTH = layer(x_BTH, self.rotary, self.plain)
        if self.plain:
            return plain.final_norm(x_BTH, self.final_norm, self.shape.rms_norm_eps)
        return final_norm(x_BTH, self.final_norm, self.shape, self.threads)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 (..., V) for hidden states (..., H)."""
        return functional.linear(hidden, self.embeddings)

    def loss(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the mean cross-entropy (nats) over all targets but NO_TARGET."""
        hidden_MH = self(ids_BT).view(-1, self.shape.hidden_size)
        targets_M = targets_BT.to(self.device).reshape(-1)
        if self.plain:
            return plain.head_loss(hidden_MH, self.embeddings, targets_M)
        return head_loss(
            hidden_MH,
            self.embeddings,
            targets_M,
            head_dtype(),
            self.threads,
        )


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, shape: ModelShape, precise: bool) -> None:
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
        self.threads = 1
        self.gate_kind = _GATES[shape.hidden_act]

        def linear() -> BitLinear:
            return BitLinear(precise=precise, adds_to_grad=True)

        self.to_qkv = linear()
        self.to_output = linear()
        self.to_gate_up = linear()
        self.to_down = linear()

    def use_threads(self, threads: int) -> None:
        """Let the kernels of this layer use so many threads."""
        self.threads = threads
        for linear in (self.to_qkv, self.to_output, self.to_gate_up, self.to_down):
            linear.threads = threads

    def forward(self, x_BTH: Tensor, rotary: Rotary, by_torch: bool) -> Tensor:
        """Return the residual stream after this layer, (B, T, H)."""
        cosines, sines = rotary.angles(x_BTH.shape[1])
        if by_torch:
            x_BTH = plain.attention_half(x_BTH, self, cosines, sines)
            return plain.feed_forward_half(x_BTH, self)
        x_BTH = attention_half(x_BTH, self, cosines, sines)
        return feed_forward_half(x_BTH, self)


class Rotary:
    """The angles by which pairs of numbers of a head are turned at each position.

    Number i of the first half pairs with number i of the second; the angle at
    position t is t * theta ** (-2 i / D). Su et al., RoFormer, arXiv 2104.09864.
    """

    def __init__(self, shape: ModelShape) -> None:
        half = shape.head_dim // 2
        rates = shape.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(shape.seq_len, dtype=torch.float64), rates)
        self._cosines = angles.cos().float().numpy()
        self._sines = angles.sin().float().numpy()

    def angles(self, num_tokens: int) -> tuple[Floats, Floats]:
        """Return cosines and sines of the first positions, float32 (T, D / 2)."""
        return self._cosines[:num_tokens], self._sines[:num_tokens]


def _parameter(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*size))
