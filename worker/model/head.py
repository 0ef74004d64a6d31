"""The two ends of the model that share its embeddings: the lookup and the loss.

Gradients are added straight to `embeddings.grad`, a view into the flat vector.

Letters in shapes: M tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import time
from typing import Any, Final

import torch
from torch import Tensor, nn

from bitnet_ext import fused

#: A target that is not predicted: padding, or a token whose successor is unknown.
NO_TARGET: Final = -1
#: Tokens whose logits exist at once: M x V would be the largest tensor of a step.
CHUNK_TOKENS: Final = 512
#: How much faster than fp32 bf16 must be to be chosen.
BF16_MIN_GAIN: Final = 1.2


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
    """Return the type of the head's products in training: bf16 where it is fast.

    Having the instructions says little: a Sapphire Rapids without its AMX tiles ran
    bf16 at 0.6 of the speed of fp32, a Zen 4 at twice. So both are timed, once in a
    process; bf16 must win clearly to be worth its rounding.
    """
    if not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    faster = _product_s(torch.bfloat16) * BF16_MIN_GAIN < _product_s(torch.float32)
    return torch.bfloat16 if faster else torch.float32


def _product_s(dtype: torch.dtype) -> float:
    """Return the least seconds of a few products of the head's kind."""
    left, right = torch.ones(256, 256, dtype=dtype), torch.ones(256, 2048, dtype=dtype)
    seconds = []
    for _ in range(5):
        started_s = time.perf_counter()
        torch.mm(left, right)
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
        hidden, table = hidden_MH.detach().to(dtype), embeddings_VH.detach().to(dtype)
        num_targets = max(1, int((targets_M != NO_TARGET).sum()))
        ctx.embeddings = embeddings_VH
        ctx.dhidden = torch.empty(hidden.shape) if hidden_MH.requires_grad else None
        ctx.dtable = None
        nats = 0.0
        for start in range(0, len(hidden), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            dlogits = hidden[chunk] @ table.t()
            nats += fused.softmax_backward(
                _bits(dlogits),
                targets_M[chunk].numpy(),
                1.0 / num_targets,
                threads=threads,
            )
            if ctx.dhidden is not None:
                ctx.dhidden[chunk] = dlogits @ table
                # (E^T)' = h^T @ dlogits has the same numbers; this is the faster.
                part = dlogits.t() @ hidden[chunk]
                ctx.dtable = part if ctx.dtable is None else ctx.dtable.add_(part)
        return torch.tensor(nats / num_targets, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.dtable is not None:
            ctx.embeddings.grad.add_(ctx.dtable, alpha=dloss.item())
        return ctx.dhidden.mul_(dloss), None, None, None, None


def _bits(logits_MV: Tensor) -> Any:
    """Return the logits as an array over the same memory; bf16 as its bits."""
    if logits_MV.dtype is torch.bfloat16:
        return logits_MV.view(torch.uint16).numpy()
    return logits_MV.numpy()
