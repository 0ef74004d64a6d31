"""The small BitNet of the simulator: many replicas in one step, all in torch.

The model of the study that this project began with: 64 wide, 2 layers of 2 heads, a
feed-forward block of 256 with squared ReLU, norms before every BitLinear, rotary
embedding, bytes as tokens: 132,032 parameters. Ternary weights by absmean, int8
activations by absmax, gradients straight through both, in fp32.

Letters in shapes: R replicas, each with a flat vector of its own, B sequences of T
tokens, M = B * T, K inputs and N outputs of one weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bitnet_ext.layout import Segment, SegmentKind

VOCAB: Final = 256
SEQ_LEN: Final = 64
#: A position without a target.
NO_TARGET: Final = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of one small BitNet."""

    width: int = 64
    num_layers: int = 2
    num_heads: int = 2

    @property
    def wide(self) -> int:
        """Width of the feed-forward block."""
        return 4 * self.width

    def segments(self) -> tuple[Segment, ...]:
        """Return the segments of its flat vector, as the coordinator knows them."""
        found, offset = [], 0
        for name, kind, dims in self._named():
            found.append(Segment(name=name, kind=kind, shape=dims, offset=offset))
            offset += math.prod(dims)
        return tuple(found)

    def _named(self) -> list[tuple[str, SegmentKind, tuple[int, ...]]]:
        d, wide = self.width, self.wide
        norm, linear = SegmentKind.NORM, SegmentKind.LINEAR
        residual, table = SegmentKind.RESIDUAL, SegmentKind.EMBEDDING
        found = [("embeddings", table, (VOCAB, d)), ("head", table, (VOCAB, d))]
        for layer in range(self.num_layers):
            found += [
                (f"{layer}.{name}", kind, dims)
                for name, kind, dims in (
                    ("attn_norm", norm, (d,)),
                    ("q", linear, (d, d)),
                    ("k", linear, (d, d)),
                    ("v", linear, (d, d)),
                    ("attn_sub_norm", norm, (d,)),
                    ("o", residual, (d, d)),
                    ("ffn_norm", norm, (d,)),
                    ("up", linear, (wide, d)),
                    ("ffn_sub_norm", norm, (wide,)),
                    ("down", residual, (d, wide)),
                )
            ]
        return [*found, ("final_norm", norm, (d,))]


class Net:
    """Losses and gradients of replicas; holds no weights.

    Compiled, another number of replicas or windows takes 20 s the first time, and each
    step half as long from then on. Sums come out in another order.
    """

    def __init__(self, shape: Shape, *, compiled: bool = False) -> None:
        self.shape = shape
        of_batch = self._losses
        if compiled:
            of_batch = torch.compile(of_batch, dynamic=False)
        self._losses_of_batch = of_batch
        self.segments = shape.segments()
        self.num_params = self.segments[-1].offset + self.segments[-1].size
        head_dim = shape.width // shape.num_heads
        angles = torch.arange(SEQ_LEN)[:, None] * 10_000 ** (
            -torch.arange(head_dim // 2) * 2 / head_dim
        )
        self._cosines, self._sines = angles.cos(), angles.sin()

    def gradients(
        self, flat_RP: NDArray[np.float32], windows_RBT: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Return the mean loss of each replica in nats, and its gradient (R, P).

        Windows are T inputs and the target of the last; those that start with
        NO_TARGET are not there.
        """
        parts = self._parts(torch.from_numpy(flat_RP))
        # Leaves of their own: the gradient of a slice would be padded to all of it.
        leaves = [part.requires_grad_(True) for part in parts.values()]
        losses_R = self._losses_of_batch(parts, torch.from_numpy(windows_RBT))
        found = torch.autograd.grad(losses_R.sum(), leaves)
        grads_RP = torch.cat([grad.reshape(len(flat_RP), -1) for grad in found], 1)
        return losses_R.detach().double().numpy(), grads_RP.numpy()

    def loss(self, flat_P: NDArray[np.float32], windows_BT: NDArray[np.int64]) -> float:
        """Return the mean loss of one vector over many windows, in nats a token."""
        total = 0.0
        with torch.inference_mode():
            parts = self._parts(torch.from_numpy(flat_P)[None])
            for start in range(0, len(windows_BT), 64):
                part = windows_BT[start : start + 64]
                losses_R = self._losses(parts, torch.from_numpy(part)[None])
                total += losses_R.item() * len(part)
        return total / len(windows_BT)

    def _parts(self, flat_RP: Tensor) -> dict[str, Tensor]:
        """Return a view of each segment, (R, *shape), in layout order."""
        return {
            segment.name: flat_RP[:, segment.offset : segment.offset + segment.size]
            .detach()
            .view(-1, *segment.shape)
            for segment in self.segments
        }

    def _losses(self, part: dict[str, Tensor], windows_RBT: Tensor) -> Tensor:
        num_replicas, num_windows, _ = windows_RBT.shape
        inputs_RM = windows_RBT[..., :-1].reshape(num_replicas, -1).clamp(min=0)
        targets_RM = windows_RBT[..., 1:].reshape(num_replicas, -1)
        x_RMK = part["embeddings"].gather(
            1, inputs_RM[..., None].expand(-1, -1, self.shape.width)
        )
        for layer in range(self.shape.num_layers):
            own = {
                name.split(".")[1]: value
                for name, value in part.items()
                if name.startswith(f"{layer}.")
            }
            x_RMK = x_RMK + self._attention(x_RMK, own, num_windows)
            x_RMK = x_RMK + self._feed_forward(x_RMK, own)
        logits = torch.bmm(_norm(x_RMK, part["final_norm"]), part["head"].mT)
        losses_RM = F.cross_entropy(
            logits.reshape(-1, VOCAB),
            targets_RM.reshape(-1),
            ignore_index=NO_TARGET,
            reduction="none",
        ).view(num_replicas, -1)
        return losses_RM.sum(1) / (targets_RM != NO_TARGET).sum(1)

    def _attention(
        self, x_RMK: Tensor, own: dict[str, Tensor], num_windows: int
    ) -> Tensor:
        num_replicas, _, width = x_RMK.shape
        fused_RNK = torch.cat((own["q"], own["k"], own["v"]), 1)
        scales = [_absmean(own[name]) for name in "qkv"]
        scale_RN1 = torch.cat([s.expand(-1, width, 1) for s in scales], 1)
        y = _Products.apply(_norm(x_RMK, own["attn_norm"]), fused_RNK, scale_RN1)
        y = y.view(num_replicas * num_windows, SEQ_LEN, 3, self.shape.num_heads, -1)
        q, k, v = y.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            self._rotated(q), self._rotated(k), v, is_causal=True
        )
        mixed = mixed.transpose(1, 2).reshape(num_replicas, -1, width)
        return _bit_linear(_norm(mixed, own["attn_sub_norm"]), own["o"])

    def _rotated(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        cos, sin = self._cosines, self._sines
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    @staticmethod
    def _feed_forward(x_RMK: Tensor, own: dict[str, Tensor]) -> Tensor:
        wide = _bit_linear(_norm(x_RMK, own["ffn_norm"]), own["up"]).relu().square()
        return _bit_linear(_norm(wide, own["ffn_sub_norm"]), own["down"])


def _norm(x_RMK: Tensor, gain_RK: Tensor) -> Tensor:
    return F.rms_norm(x_RMK, x_RMK.shape[-1:], eps=1e-5) * gain_RK[:, None]


def _absmean(w_RNK: Tensor) -> Tensor:
    return w_RNK.detach().abs().mean((1, 2), keepdim=True).clamp_(min=1e-5)


def _bit_linear(x_RMK: Tensor, w_RNK: Tensor) -> Tensor:
    product: Tensor = _Products.apply(x_RMK, w_RNK, _absmean(w_RNK))
    return product


class _Products(torch.autograd.Function):
    """`q(x) @ q(w)^T`; gradients go straight through both roundings."""

    @staticmethod
    def forward(ctx: Any, x_RMK: Tensor, w_RNK: Tensor, scale: Tensor) -> Tensor:
        step = x_RMK.abs().amax(-1, keepdim=True).clamp_(min=1e-5).div_(127)
        x_RMK = (x_RMK / step).round_().mul_(step)
        w_RNK = (w_RNK / scale).round_().clamp_(-1, 1).mul_(scale)
        ctx.save_for_backward(x_RMK, w_RNK)
        return torch.bmm(x_RMK, w_RNK.mT)

    @staticmethod
    def backward(ctx: Any, dy_RMN: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RMK, w_RNK = ctx.saved_tensors
        return torch.bmm(dy_RMN, w_RNK), torch.bmm(dy_RMN.mT, x_RMK), None
