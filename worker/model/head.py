"""The two ends of the model that share its embeddings: the lookup and the loss.

Gradients are added straight to `embeddings.grad`, a view into the flat vector.

Letters in shapes: M tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from bitnet_ext import fused, ternary
from bitnet_ext.ternary import QuantisedRows

#: A target that is not predicted: padding, or a token whose successor is unknown.
NO_TARGET: Final = -1
#: Tokens whose logits exist at once: M x V would be the largest tensor of a step.
CHUNK_TOKENS: Final = 512
#: How much faster than fp32 another type must make the head to be chosen.
MIN_GAIN: Final = 1.15


def lookup(ids_BT: Tensor, embeddings_VH: nn.Parameter) -> Tensor:
    """Return the rows of the embeddings, float32 (B, T, H)."""
    rows: Tensor = _Lookup.apply(embeddings_VH, ids_BT)  # type: ignore[no-untyped-call]
    return rows


def head_loss(
    hidden_MH: Tensor,
    embeddings_VH: nn.Parameter,
    targets_M: Tensor,
    dtype: torch.dtype,
    threads: int,
) -> Tensor:
    """Return the mean cross-entropy (nats) of `softmax(hidden @ E^T)`.

    Targets that are NO_TARGET count as nothing. The three products with the logits
    run in `dtype`; softmax and the loss itself are fp32.
    """
    loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden_MH, embeddings_VH, targets_M, dtype, threads
    )
    return loss


@functools.cache
def head_dtype() -> torch.dtype:
    """Return the type of the head's products in training, by what is fast here.

    int8 rounds the logits about as much as bf16 does, and the loss alone: gradients
    of the two factors are then products in fp32. Having instructions says little: a
    Xeon that hides its AMX tiles ran bf16 at 0.6 of the speed of fp32, a
    Zen 4 at twice. So all are timed, once in a process; what rounds more must win
    clearly to be worth it.
    """
    return choose_dtype(_product_s)


def choose_dtype(product_s: Callable[[torch.dtype], float]) -> torch.dtype:
    """Return the type of the products by the seconds of one in each type."""
    fp32_s = product_s(torch.float32)
    best, best_s = torch.float32, fp32_s
    for dtype, products in ((torch.bfloat16, 3), (torch.int8, 1)):
        # int8 replaces one of the three products, so its time is that of all three.
        seconds = (products * product_s(dtype) + (3 - products) * fp32_s) / 3
        if seconds * MIN_GAIN < best_s:
            best, best_s = dtype, seconds
    return best


def _product_s(dtype: torch.dtype) -> float:
    """Return the least seconds of a few products of the head's kind."""
    left, right = torch.ones(256, 256, dtype=dtype), torch.ones(2048, 256, dtype=dtype)
    multiply = torch._int_mm if dtype is torch.int8 else torch.mm
    seconds = []
    for _ in range(5):
        started_s = time.perf_counter()
        multiply(left, right.t())
        seconds.append(time.perf_counter() - started_s)
    return min(seconds)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings_VH: Tensor, ids_BT: Tensor) -> Tensor:
        ctx.embeddings, ctx.ids_M = embeddings_VH, ids_BT.reshape(-1)
        rows = embeddings_VH.detach().index_select(0, ctx.ids_M)
        return rows.view(*ids_BT.shape, -1)

    @staticmethod
    def backward(ctx: Any, dx_BTH: Tensor) -> tuple[None, None]:
        dx_MH = dx_BTH.reshape(-1, dx_BTH.shape[-1]).contiguous().numpy()
        fused.add_rows(dx_MH, ctx.ids_M.numpy(), ctx.embeddings.grad.numpy())
        return None, None


class _HeadLoss(torch.autograd.Function):
    """Makes the gradients chunk by chunk with the loss, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        embeddings_VH: Tensor,
        targets_M: Tensor,
        dtype: torch.dtype,
        threads: int,
    ) -> Tensor:
        table = _Table(embeddings_VH.detach(), dtype, threads)
        hidden = hidden_MH.detach().to(table.values.dtype)
        num_targets = max(1, int((targets_M != NO_TARGET).sum()))
        ctx.embeddings = embeddings_VH
        ctx.dhidden = torch.empty(hidden.shape) if hidden_MH.requires_grad else None
        ctx.dtable = None
        nats = 0.0
        for start in range(0, len(hidden), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            some_nats, dlogits = table.loss(
                hidden[chunk], targets_M[chunk], 1.0 / num_targets
            )
            nats += some_nats
            if ctx.dhidden is not None:
                ctx.dhidden[chunk] = dlogits @ table.values
                # (E^T)' = h^T @ dlogits has the same numbers; this is the faster.
                part = dlogits.t() @ hidden[chunk]
                ctx.dtable = part if ctx.dtable is None else ctx.dtable.add_(part)
        return torch.tensor(nats / num_targets, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.dtable is not None:
            ctx.embeddings.grad.add_(ctx.dtable, alpha=dloss.item())
        return ctx.dhidden.mul_(dloss), None, None, None, None


class _Table:
    """The embeddings as the factor of the logits, in the type of the products."""

    def __init__(self, embeddings_VH: Tensor, dtype: torch.dtype, threads: int) -> None:
        self._threads = threads
        self._rows: QuantisedRows | None = None
        if dtype is torch.int8:
            self._rows = ternary.quantise_rows(embeddings_VH.numpy())
            dtype = torch.float32
        #: (V, H): the factor of the gradients too.
        self.values = embeddings_VH.to(dtype)

    def loss(
        self, hidden_MH: Tensor, targets_M: Tensor, scale: float
    ) -> tuple[float, Tensor]:
        """Return the summed nats and `scale` times the gradient of the logits."""
        targets = targets_M.numpy()
        if self._rows is not None:
            rows = ternary.quantise_rows(hidden_MH.numpy())
            products_MV = torch._int_mm(
                torch.from_numpy(rows.q), torch.from_numpy(self._rows.q).t()
            )
            nats, dlogits = fused.softmax_backward_of_products(
                products_MV.numpy(),
                (rows.scale, self._rows.scale),
                targets,
                scale,
                threads=self._threads,
            )
            return nats, torch.from_numpy(dlogits)
        logits_MV = hidden_MH @ self.values.t()
        is_half = logits_MV.dtype is torch.bfloat16
        bits = logits_MV.view(torch.uint16) if is_half else logits_MV
        nats = fused.softmax_backward(
            bits.numpy(), targets, scale, threads=self._threads
        )
        return nats, logits_MV
