"""One task of a gradient round: the mean gradient of a stretch at the base version.

Batches go through the model as in local steps, but no step is made: gradients add up
in the flat vector, each with its share of all targets of the task. The sum is clipped
once, as a whole. Nothing is remembered: the optimiser is the coordinator's.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.wire.messages import Task
from worker.model.transformer import BitNetModel
from worker.order import TOKEN_BYTES
from worker.train import (
    Backward,
    Batch,
    Hooks,
    NonFiniteLossError,
    TrainResult,
    count_targets,
    take_steps,
)


def mean_gradient(
    model: BitNetModel,
    base: NDArray[np.float32],
    tokens: NDArray[np.int32],
    task: Task,
    hooks: Hooks,
) -> TrainResult:
    """Return the mean gradient of `task` at the flat vector `base`.

    Where the task ends early it is the mean over the targets that were seen.
    Afterwards the model holds `base`. Raises as `worker.train.take_steps` does.
    """
    steps = MeanGradient(model, task.hyper.clip_norm, task.byte_length // TOKEN_BYTES)
    return take_steps(model, base, steps, tokens, task, hooks)


class MeanGradient(Backward):
    """Adds up the gradients of batches that should have `num_targets` in all."""

    def __init__(self, model: BitNetModel, clip_norm: float, num_targets: int) -> None:
        super().__init__(model, clip_norm)
        self._num_targets = num_targets
        self._num_seen = 0
        #: The summed loss over `num_targets`, as far as they were seen.
        self._nats = 0.0

    def step(self, batch: Batch, _rate: float) -> float:
        """Add a batch; return its own loss in nats a token."""
        nats = self.add(batch, self._num_targets)
        if not math.isfinite(nats):
            raise NonFiniteLossError(f"the model diverged: loss {nats}")
        self._nats += nats
        num_targets = count_targets(batch.targets)
        self._num_seen += num_targets
        return nats * self._num_targets / max(1, num_targets)

    def result(self, _base: NDArray[np.float32]) -> tuple[NDArray[np.float32], None]:
        """Return the mean gradient, clipped and known to be finite."""
        # Exactly 1 where the task was done whole.
        scale = self._num_targets / max(1, self._num_seen)
        self._model.flat.grads.mul_(scale)
        grads = self._model.flat.grads.cpu().numpy()
        return grads * np.float32(self.clip(self._nats)), None
