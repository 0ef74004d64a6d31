"""The head's cross-entropy in bf16 and in chunks of rows, for the strongest recipes.

The logits (M, V) are the largest tensor of a step. A chunk of rows is turned into
its loss and its gradient while it is still in cache, so neither logits nor
probabilities of the whole batch ever exist, and the three products run in bf16.

Letters in shapes: M tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Rows whose logits exist at one time; more is no faster, 128 and fewer are slower.
CHUNK_ROWS = 256


def chunked_cross_entropy(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of `softmax(hidden @ table^T)`.

    `hidden` is (M, H), `table` (V, H), both fp32 or bf16; `targets` int64 (M,).
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, table, targets)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            low_table = table.to(torch.bfloat16)
            parts = zip(
                hidden.to(torch.bfloat16).split(CHUNK_ROWS),
                targets.split(CHUNK_ROWS),
                strict=True,
            )
            loss = torch.zeros((), dtype=torch.float32)
            d_table = torch.zeros(table.shape, dtype=torch.float32)
            d_hidden = []
            for rows, wanted in parts:
                log_p = (rows @ low_table.t()).float().log_softmax(-1)
                loss = loss - log_p.gather(1, wanted.unsqueeze(1)).sum()
                d_logits = log_p.exp()
                d_logits.scatter_add_(
                    1, wanted.unsqueeze(1), -torch.ones(len(wanted), 1)
                )
                low = d_logits.to(torch.bfloat16)
                d_hidden.append(low @ low_table)
                d_table += low.t() @ rows
        ctx.save_for_backward(torch.cat(d_hidden), d_table)
        ctx.types = hidden.dtype, table.dtype
        ctx.num_rows = len(targets)
        return loss / len(targets)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_table = ctx.saved_tensors
        scale = d_loss / ctx.num_rows
        hidden_type, table_type = ctx.types
        return (
            (d_hidden * scale).to(hidden_type),
            (d_table * scale).to(table_type),
            None,
        )
