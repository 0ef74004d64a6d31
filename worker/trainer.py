"""The torch side of the loop: one model, reused as long as its shape stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bitnet_ext.layout import ModelShape
from bitnet_ext.wire.messages import Task
from bitnet_ext.wire.verdicts import Optimiser, RoundKind
from worker import calibrate, evaluate, gradient, train
from worker.calibrate import Calibration
from worker.errors import BadShardError, SettingsError
from worker.evaluate import Score
from worker.model.transformer import BitNetModel
from worker.train import Hooks, Moments, TrainResult
from worker.tune import Choices, halvings

#: What a worker may compute on.
DEVICES: Final = ("cpu", "cuda")


class Trainer(Protocol):
    """What the loop needs of a model; arrays are those of `worker.train`."""

    def calibrate(
        self,
        shape: ModelShape,
        batch_size: int,
        optimiser: Optimiser | None,
        hooks: Hooks,
    ) -> Calibration:
        """Time real steps in some setups; what follows uses the fastest.

        Without an optimiser a step adds to a mean gradient.
        """

    def train(
        self,
        shape: ModelShape,
        base: NDArray[np.float32],
        moments: Moments | None,
        tokens: NDArray[np.int32],
        task: Task,
        hooks: Hooks,
    ) -> TrainResult:
        """Run the local steps of a task; None is an optimiser that starts anew."""

    def evaluate(
        self,
        shape: ModelShape,
        weights: NDArray[np.float32],
        tokens: NDArray[np.int32],
        task: Task,
        hooks: Hooks,
    ) -> Score:
        """Score a version on a stream of documents."""


def find_device(name: str) -> torch.device:
    """Return one of DEVICES; raises SettingsError where torch does not find it."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError(
            "--device cuda: this torch finds no CUDA device on this machine"
        )
    return torch.device(name)


class TorchTrainer:
    """The Trainer of a real worker.

    `threads` and `variants` may be tried, the likeliest first (`worker.tune`).
    """

    def __init__(
        self, threads: Sequence[int], variants: Sequence[str], device: torch.device
    ) -> None:
        self.threads = threads
        self.variants = variants
        self._device = device
        self._model: BitNetModel | None = None

    def calibrate(
        self,
        shape: ModelShape,
        batch_size: int,
        optimiser: Optimiser | None,
        hooks: Hooks,
    ) -> Calibration:
        """Time real steps in some setups; what follows uses the fastest."""
        choices = Choices(
            variants=self.variants,
            threads=self.threads,
            micro_batches=halvings(batch_size),
        )
        model = self._model_of(shape)
        return calibrate.calibrate(model, batch_size, optimiser, choices, hooks)

    def train(
        self,
        shape: ModelShape,
        base: NDArray[np.float32],
        moments: Moments | None,
        tokens: NDArray[np.int32],
        task: Task,
        hooks: Hooks,
    ) -> TrainResult:
        """Run the local steps of a task; None is an optimiser that starts anew.

        A task of a gradient round has no optimiser.
        """
        if task.round_kind is RoundKind.GRADIENT:
            model = self._model_of(shape)
            return gradient.mean_gradient(model, base, tokens, task, hooks)
        known = Moments.zeros(shape) if moments is None else moments
        return train.train(self._model_of(shape), base, known, tokens, task, hooks)

    def evaluate(
        self,
        shape: ModelShape,
        weights: NDArray[np.float32],
        tokens: NDArray[np.int32],
        task: Task,
        hooks: Hooks,
    ) -> Score:
        """Score a version; raises BadShardError on a stream without documents."""
        if tokens[0] != task.eot_id:
            raise BadShardError(
                f"shard {task.shard_id} must start with EOT ({task.eot_id}), "
                f"got {tokens[0]}"
            )
        return evaluate.evaluate(
            self._model_of(shape), weights, tokens, task.eot_id, task.batch_size, hooks
        )

    def _model_of(self, shape: ModelShape) -> BitNetModel:
        if self._model is None or self._model.shape != shape:
            self._model = None  # the old one goes before the new one needs its memory
            self._model = BitNetModel(
                shape, threads=self.threads[0], device=self._device
            )
        return self._model
