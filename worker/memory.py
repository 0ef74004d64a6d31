"""What a worker carries from one accepted task to the next.

Nothing is written here before the coordinator accepted the work: a task that is
lost, refused or given back leaves no trace, so its update can be trained again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker.registration import Run
from worker.train import Moments


@dataclass(frozen=True, slots=True)
class Learned:
    """The state behind a submission; flat vectors in layout order."""

    #: What AdamW remembers after the last local step; None in gradient rounds.
    moments: Moments | None
    #: What the codec rounded away; part of the next payload. None: nothing.
    residual: NDArray[np.float32] | None


class Memory:
    """The latest state of one run and layout, in memory only.

    The state of another run, or of another model, would only do harm: it is
    forgotten as soon as somebody asks for a run that it does not belong to.
    """

    def __init__(self) -> None:
        self._key: tuple[str, bytes] | None = None
        self._learned: Learned | None = None

    def recall(self, run: Run) -> Learned | None:
        """Return what was committed last in this run; None before the first time."""
        self._keep_only(run)
        return self._learned

    def commit(self, run: Run, learned: Learned) -> None:
        """Replace the state: the submission behind `learned` was accepted."""
        self._keep_only(run)
        self._learned = learned

    def _keep_only(self, run: Run) -> None:
        key = (run.run_id, run.layout_hash)
        if key != self._key:
            self._key, self._learned = key, None
