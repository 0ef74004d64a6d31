"""What a worker carries from one accepted task to the next.

Nothing is written here before the coordinator accepted the work: a task that is
lost, refused or given back leaves no trace, so its update can be trained again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bitnet_ext.frames import FrameKind
from bitnet_ext.layout import ModelShape, num_params, segments
from worker.registration import Run
from worker.shelf import Kept, Owner, Shelf
from worker.train import Moments

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Learned:
    """The state behind a submission; flat vectors in layout order."""

    #: What the optimiser remembers after the last local step; None in gradient rounds.
    moments: Moments | None
    #: What the codec rounded away; part of the next payload. None: nothing.
    residual: NDArray[np.float32] | None


class Memory:
    """The latest state of one run and layout; on the shelf it outlives the process.

    The state of another run, or of another model, would only do harm: it is
    forgotten as soon as somebody asks for a run that it does not belong to.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._owner: Owner | None = None
        self._learned: Learned | None = None

    def recall(self, run: Run) -> Learned | None:
        """Return what was committed last in this run; None before the first time."""
        owner = Owner(run.run_id, run.layout_hash)
        if owner != self._owner:
            self._owner, self._learned = owner, self._read(owner, run.shape)
        return self._learned

    def commit(self, run: Run, learned: Learned) -> None:
        """Replace the state: the submission behind `learned` was accepted."""
        owner = Owner(run.run_id, run.layout_hash)
        self._owner, self._learned = owner, learned
        residual, moments = learned.residual, learned.moments
        self._shelf.put(
            owner, FrameKind.RESIDUAL, None if residual is None else Kept(residual)
        )
        self._shelf.put(
            owner, FrameKind.MOMENTS, None if moments is None else Kept(_flat(moments))
        )

    def _read(self, owner: Owner, shape: ModelShape) -> Learned | None:
        size = num_params(shape)
        residual = self._shelf.get(owner, FrameKind.RESIDUAL, size)
        flat = self._shelf.get(
            owner, FrameKind.MOMENTS, 2 * size + len(segments(shape))
        )
        if residual is None and flat is None:
            return None
        log.info(
            "goes on in run %s: %s residual, %s moments",
            owner.run_id,
            "no" if residual is None else "the last",
            "no" if flat is None else "the last",
            extra={"event": "memory.read", "run_id": owner.run_id},
        )
        return Learned(
            None if flat is None else _moments(flat.vector, size),
            None if residual is None else residual.vector,
        )


def _flat(moments: Moments) -> NDArray[np.float32]:
    """Return both vectors and the counts of steps, one after the other."""
    parts = (moments.exp_avg, moments.exp_avg_sq, moments.step)
    return np.concatenate([part.cpu().numpy() for part in parts])


def _moments(flat: NDArray[np.float32], size: int) -> Moments:
    parts = np.split(flat, (size, 2 * size))
    return Moments(*(torch.from_numpy(part) for part in parts))
