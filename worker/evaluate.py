"""Scores a weight version on the held-out stream: summed nats, in full precision.

Which windows it is cut into is in `bitnet_ext.scoring`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from bitnet_ext.scoring import Window, windows
from worker.model.transformer import NO_TARGET, BitNetModel
from worker.train import Hooks


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How well a version predicts; `nats / tokens` is its loss."""

    nats: float
    tokens: int
    compute_s: float


def evaluate(
    model: BitNetModel,
    weights: NDArray[np.float32],
    tokens: NDArray[np.int32],
    eot_id: int,
    batch_size: int,
    hooks: Hooks,
) -> Score:
    """Return the score of the flat vector `weights` on a stream of int32 tokens.

    Raises ValueError when the stream does not start with EOT, and whatever
    `hooks.check` raises.
    """
    started_s = hooks.clock()
    model.flat.load(weights)
    # Windows of one length share a batch, so that little is spent on padding.
    cut = sorted(
        windows(tokens, eot_id, model.shape.seq_len), key=lambda window: window.length
    )
    nats, num_scored = 0.0, 0
    for first in range(0, len(cut), batch_size):
        hooks.check()
        step_started_s = hooks.clock()
        batch_nats, batch_scored = _score(
            model, tokens, cut[first : first + batch_size]
        )
        nats += batch_nats
        num_scored += batch_scored
        hooks.progress(num_scored, hooks.clock() - step_started_s)
    return Score(nats=nats, tokens=num_scored, compute_s=hooks.clock() - started_s)


@torch.no_grad()
def _score(
    model: BitNetModel, tokens: NDArray[np.int32], cut: list[Window]
) -> tuple[float, int]:
    """Return summed nats and number of tokens of one batch of windows."""
    width = max(window.length for window in cut)
    inputs = np.zeros((len(cut), width), dtype=np.int64)
    targets = np.full_like(inputs, NO_TARGET)
    for row, window in enumerate(cut):
        end = window.start + window.length
        inputs[row, : window.length] = tokens[window.start : end]
        targets[row, window.first_scored : window.length] = tokens[
            window.start + window.first_scored + 1 : end + 1
        ]
    hidden_BTH = model(torch.from_numpy(inputs))
    # Only positions that count go through the head, the costly part.
    targets_BT = torch.from_numpy(targets).to(model.device)
    scored_BT = targets_BT != NO_TARGET
    nats = functional.cross_entropy(
        model.logits(hidden_BTH[scored_BT]),
        targets_BT[scored_BT],
        reduction="none",
    )
    return nats.sum(dtype=torch.float64).item(), len(nats)
