"""What a worker carries from one accepted task to the next.

Nothing is written here before the coordinator accepted the work: a task that is
lost, refused or given back leaves no trace, so its update can be trained again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from bitnet_ext.frames import FrameKind
from bitnet_ext.layout import ModelShape, num_params, segments
from bitnet_ext.wire.verdicts import RoundKind
from worker.registration import Run
from worker.shelf import Kept, Owner, Shelf
from worker.train import Moments

log = logging.getLogger(__name__)

#: How the residual of each kind of round is kept, at most one of them. A process that
#: is killed while it puts one in place of the other leaves the right one, or none.
_RESIDUALS: Final[Mapping[RoundKind, FrameKind]] = {
    RoundKind.DELTA: FrameKind.RESIDUAL,
    RoundKind.GRADIENT: FrameKind.GRADIENT_RESIDUAL,
}


@dataclass(frozen=True, slots=True)
class Learned:
    """The state behind a submission; flat vectors in layout order."""

    #: What the optimiser remembers after the last local step; None in gradient rounds.
    moments: Moments | None
    #: What the codec rounded away; part of the next payload. None: nothing.
    residual: NDArray[np.float32] | None
    #: Of the payload that this is the rest of.
    round_kind: RoundKind

    def residual_for(self, round_kind: RoundKind) -> NDArray[np.float32] | None:
        """Return what is part of the next payload, where that is of this kind.

        A gradient is no difference of weights, so neither is what is left of it.
        """
        return self.residual if round_kind is self.round_kind else None


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
        kept = None if residual is None else Kept(residual)
        for round_kind, kind in _RESIDUALS.items():
            is_its = round_kind is learned.round_kind
            self._shelf.put(owner, kind, kept if is_its else None)
        self._shelf.put(
            owner, FrameKind.MOMENTS, None if moments is None else Kept(_flat(moments))
        )

    def _read(self, owner: Owner, shape: ModelShape) -> Learned | None:
        size = num_params(shape)
        round_kind, residual = self._read_residual(owner, size)
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
            round_kind,
        )

    def _read_residual(self, owner: Owner, size: int) -> tuple[RoundKind, Kept | None]:
        for round_kind, kind in _RESIDUALS.items():
            kept = self._shelf.get(owner, kind, size)
            if kept is not None:
                return round_kind, kept
        return RoundKind.DELTA, None


def _flat(moments: Moments) -> NDArray[np.float32]:
    """Return both vectors and the counts of steps, one after the other."""
    parts = (moments.exp_avg, moments.exp_avg_sq, moments.step)
    return np.concatenate([part.cpu().numpy() for part in parts])


def _moments(flat: NDArray[np.float32], size: int) -> Moments:
    parts = np.split(flat, (size, 2 * size))
    return Moments(*(torch.from_numpy(part) for part in parts))
