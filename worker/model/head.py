"""The two ends of the model that share its embeddings: the lookup and the loss.

Gradients are added straight to `embeddings.grad`, a view into the flat vector.

Letters in shapes: M tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from bitnet_ext import fused
from bitnet_ext import head as int8_head

#: A target that is not predicted: padding, or a token whose successor is unknown.
NO_TARGET: Final = -1
#: Tokens whose logits exist at once: M x V would be the largest tensor of a step.
CHUNK_TOKENS: Final = 512
#: How much faster than fp32 another type must make the head to be chosen.
MIN_GAIN: Final = 1.15
#: Tokens and words of a head that is timed. int8 rounds the table once for all tokens,
#: and fp32 is as fast as its caches are large: so as many as in a real step ...
Extent = tuple[int, int]
REAL: Final[Extent] = (CHUNK_TOKENS, 4096)
#: ... but for a type of which a few show that there are no instructions for it: bf16
#: takes a hundred times as long as fp32 then.
GLANCE: Final[Extent] = (64, 512)
HOPELESS: Final = 4.0


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

    Having instructions says little: a Xeon that hides its AMX tiles ran bf16 at 0.6
    of the speed of fp32, a Zen 4 at twice; int8 is five times as fast with VNNI, and
    no faster without. So all are timed, once in a process; what rounds more must win
    clearly to be worth it. On one thread, as more make all of them faster.
    """
    with torch_threads(1):
        return choose_dtype(_head_s)


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Let torch use so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_dtype(head_s: Callable[[torch.dtype, Extent], float]) -> torch.dtype:
    """Return the type for the head by the seconds that a head takes in each."""
    limit_s = HOPELESS * head_s(torch.float32, GLANCE)
    best, best_s = torch.float32, head_s(torch.float32, REAL)
    for dtype in (torch.bfloat16, torch.int8):
        if head_s(dtype, GLANCE) > limit_s:
            continue
        seconds = head_s(dtype, REAL)
        if seconds * MIN_GAIN < best_s:
            best, best_s = dtype, seconds
    return best


def _head_s(dtype: torch.dtype, extent: Extent) -> float:
    """Return the least seconds that a head takes, forward and backward."""
    num_tokens, num_words = extent
    hidden_MH = torch.full((num_tokens, 256), 0.5)
    targets_M = torch.zeros(num_tokens, dtype=torch.int64)
    embeddings_VH = torch.full((num_words, 256), 0.5)
    into_VH = torch.zeros_like(embeddings_VH)
    find = _loss_in(dtype)
    seconds = []
    for _ in range(3):
        started_s = time.perf_counter()
        _, _, add_to = find(hidden_MH, embeddings_VH, targets_M, 1.0, 1)
        add_to(into_VH, 1.0)
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
    """Makes the gradients with the loss, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        embeddings_VH: Tensor,
        targets_M: Tensor,
        dtype: torch.dtype,
        threads: int,
    ) -> Tensor:
        num_targets = max(1, int((targets_M != NO_TARGET).sum()))
        nats, ctx.dhidden, ctx.add_to = _loss_in(dtype)(
            hidden_MH.detach(),
            embeddings_VH.detach(),
            targets_M,
            1.0 / num_targets,
            threads,
        )
        ctx.embeddings = embeddings_VH
        return torch.tensor(nats / num_targets, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        factor = dloss.item()
        ctx.add_to(ctx.embeddings.grad, factor)
        return ctx.dhidden.mul_(factor), None, None, None, None


#: What remains to be done for the gradient of the table: add a factor of it to (V, H).
_AddTo = Callable[[Tensor, float], None]
#: From hidden states, table, targets, scale of gradients, threads: the summed nats,
#: the gradient of the hidden states, and the rest.
_Loss = Callable[[Tensor, Tensor, Tensor, float, int], tuple[float, Tensor, _AddTo]]


def _loss_in(dtype: torch.dtype) -> _Loss:
    """Return the head whose products are of that type."""
    if dtype is torch.int8:
        return _int8_loss
    return functools.partial(_float_loss, dtype)


def _int8_loss(
    hidden_MH: Tensor,
    embeddings_VH: Tensor,
    targets_M: Tensor,
    scale: float,
    threads: int,
) -> tuple[float, Tensor, _AddTo]:
    table = int8_head.Table(embeddings_VH.numpy(), threads=threads)
    nats, dhidden_MH, gradient = int8_head.loss(
        table, hidden_MH.numpy(), targets_M.numpy(), scale, threads=threads
    )

    def add_to(into_VH: Tensor, factor: float) -> None:
        gradient.add_to(into_VH.numpy(), factor=factor, threads=threads)

    return nats, torch.from_numpy(dhidden_MH), add_to


def _float_loss(
    dtype: torch.dtype,
    hidden_MH: Tensor,
    embeddings_VH: Tensor,
    targets_M: Tensor,
    scale: float,
    threads: int,
) -> tuple[float, Tensor, _AddTo]:
    """The same with products of torch in fp32 or bf16, chunk by chunk."""
    table_VH, hidden_MH = embeddings_VH.to(dtype), hidden_MH.to(dtype)
    dhidden_MH = torch.empty(hidden_MH.shape)
    dtable_VH = torch.zeros(table_VH.shape)
    nats = 0.0
    for start in range(0, len(hidden_MH), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        logits_MV = hidden_MH[chunk] @ table_VH.t()
        is_half = dtype is torch.bfloat16
        bits = logits_MV.view(torch.uint16) if is_half else logits_MV
        nats += fused.softmax_backward(
            bits.numpy(), targets_M[chunk].numpy(), scale, threads=threads
        )
        dhidden_MH[chunk] = logits_MV @ table_VH
        # (E^T)' = h^T @ dlogits has the same numbers; this is the faster.
        dtable_VH.add_(logits_MV.t() @ hidden_MH[chunk])

    def add_to(into_VH: Tensor, factor: float) -> None:
        into_VH.add_(dtable_VH, alpha=factor)

    return nats, dhidden_MH, add_to
