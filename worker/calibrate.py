"""Times real training steps at boot: a first guess of speed, never a deadline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch

from bitnet_ext.layout import SegmentKind
from bitnet_ext.wire.messages import HyperParameters
from worker.model.flatten import segment_of
from worker.model.transformer import BitNetModel
from worker.train import Batch, LocalSteps, Moments

MIN_SECONDS: Final = 1.0
MIN_STEPS: Final = 2

# The numbers do not matter for the time; they only have to stay finite.
_HYPER: Final = HyperParameters(
    lr_start=1e-4,
    lr_end=1e-4,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    clip_norm=1.0,
)


def calibrate(model: BitNetModel, batch_size: int, clock: Callable[[], float]) -> float:
    """Return tokens per second of forward, backward and AdamW on random tokens.

    Runs for at least MIN_SECONDS of `clock` (monotonic seconds) and MIN_STEPS
    steps. The weights of the model are overwritten.
    """
    random = torch.Generator().manual_seed(0)
    _fill(model, random)
    steps = LocalSteps(model, Moments.zeros(model.shape), _HYPER)
    batch = _random_batch(model, batch_size, random)
    started_s = clock()
    num_steps, elapsed_s = 0, 0.0
    while num_steps < MIN_STEPS or elapsed_s < MIN_SECONDS:
        steps.step(batch, _HYPER.lr_start)
        num_steps += 1
        elapsed_s = clock() - started_s
    return num_steps * batch.num_tokens / elapsed_s


def _fill(model: BitNetModel, random: torch.Generator) -> None:
    """Fill the weights with small noise, the gains with ones."""
    flat = model.flat
    flat.values.normal_(std=0.02, generator=random)
    for segment in flat.segments:
        if segment.kind is SegmentKind.NORM:
            segment_of(flat.values, segment).fill_(1.0)


def _random_batch(
    model: BitNetModel, batch_size: int, random: torch.Generator
) -> Batch:
    size = (batch_size, model.shape.seq_len)
    inputs, targets = (
        torch.randint(model.shape.vocab_size, size, generator=random) for _ in range(2)
    )
    return Batch(inputs, targets, int(np.prod(size)))
