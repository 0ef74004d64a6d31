"""From the submissions of a round to the next server state; blocking, off the loop.

The state is a function of the state before, the payloads in their order, the plan, the
tokens before the round and, in gradient rounds, how many such steps there were. Of a
state of the other kind the weights alone count: what one kind of step remembers is of
no use to the other. So a round that is closed again, or replayed, gives the same bytes,
on every CPU and for every number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np

from bitnet_ext.codecs import Vector
from bitnet_ext.frames import decode_frame
from bitnet_ext.layout import segments, shape_from_json
from bitnet_ext.outer import Part
from bitnet_ext.wire.verdicts import RoundKind
from coordinator.domain.muon import OptimiserState, merged_step
from coordinator.domain.outer_step import merge_weights, outer_step
from coordinator.domain.plan import TrainingPlan, step_sizes
from coordinator.domain.rollback import Rollback, num_steps
from coordinator.domain.staleness import staleness_weight
from coordinator.service.roster import plan_of
from coordinator.service.version_blobs import ServerState
from coordinator.store.blobs import BlobKind, Blobs
from coordinator.store.rows import RoundRow, RunRow, SubmissionRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """A round on its way to a version."""

    run: RunRow
    live: RoundRow
    #: In the one order in which they are merged.
    submissions: Sequence[SubmissionRow]
    #: Number of the version to make.
    version: int
    #: Tokens behind the version before.
    tokens_before: int
    #: Tokens behind the versions that submissions were made from; at least where these
    #: are earlier ones.
    tokens_behind: Mapping[int, int] = field(default_factory=dict)
    #: Sizes of the submissions that were applied last (`coordinator.domain.guards`),
    #: since the run has had rounds of this kind.
    recent_sizes: Sequence[float] = ()
    #: By base version: the plans of what was made for a version before the base.
    earlier_plans: Mapping[int, TrainingPlan] = field(default_factory=dict)
    #: Of the run so far, in order.
    rollbacks: Sequence[Rollback] = ()
    #: The versions of the run that rounds of the other kind have made, in order.
    of_other_kind: Sequence[int] = ()
    #: Of the numbers of each submission, once the guards have ruled.
    factors: Sequence[float] = ()
    #: What the submissions add up to, where the guards have added up just that.
    mean: Vector | None = None

    @property
    def plan(self) -> TrainingPlan:
        """Return the plan of the round."""
        return plan_of(self.run)

    def plan_behind(self, row: SubmissionRow) -> TrainingPlan:
        """Return the plan that a submission was made by."""
        return self.earlier_plans.get(row.base_version, self.plan)

    @property
    def tokens(self) -> int:
        """Return the tokens of the submissions."""
        return sum(row.tokens for row in self.submissions)

    def staleness(self, row: SubmissionRow) -> int:
        """Return for how many versions before the base a submission was made."""
        return self.live.base_version - row.base_version

    def tokens_before_made(self, row: SubmissionRow) -> int:
        """Return the tokens behind the version that a submission was made from."""
        return self.tokens_behind.get(row.base_version, self.tokens_before)


def next_state(
    blobs: Blobs, closing: Closing, base: ServerState, spare: ServerState | None
) -> ServerState | None:
    """Return the next server state, in the memory of `spare` where that fits.

    None when it would not be finite. Raises OSError, FrameError or PayloadError when
    a file of the round does not help.
    """
    parts = _parts(blobs, closing)
    match closing.plan.round_kind:
        case RoundKind.DELTA:
            return _after_outer_step(closing, base, parts, spare)
        case RoundKind.GRADIENT:
            return _after_gradient_step(closing, base, parts)


def _after_outer_step(
    closing: Closing,
    base: ServerState,
    parts: Iterator[Part],
    spare: ServerState | None,
) -> ServerState | None:
    if spare is None or spare.weights.shape != base.weights.shape:
        spare = ServerState.empty(len(base.weights))
    # After a gradient step there is no momentum of outer steps.
    is_its = base.square is None
    momentum = base.momentum if is_its else np.zeros_like(base.weights)
    is_finite = outer_step(
        (base.weights, momentum),
        parts,
        (spare.weights, spare.momentum),
        rate=closing.plan.outer_rate,
        decay=closing.plan.outer_momentum,
        mean=closing.mean,
    )
    # The memory may be of a state of the other kind.
    return replace(spare, version=closing.version, square=None) if is_finite else None


def _after_gradient_step(
    closing: Closing, base: ServerState, parts: Iterator[Part]
) -> ServerState | None:
    sizes = step_sizes(
        closing.plan,
        tokens_before=closing.tokens_before,
        tokens=closing.tokens,
        step=1
        + num_steps(
            base.version,
            closing.run.root_version,
            closing.rollbacks,
            closing.of_other_kind,
        ),
    )
    shape = shape_from_json(msgspec.json.decode(closing.run.model_json))
    after = merged_step(
        _before_gradient_step(base),
        parts,
        segments(shape),
        sizes,
        mean=closing.mean,
        threads=num_cores(),
    )
    if after is None:
        return None
    return ServerState(
        version=closing.version,
        weights=after.weights,
        momentum=after.momentum,
        square=after.square,
    )


def _before_gradient_step(base: ServerState) -> OptimiserState:
    """Return what a gradient step goes on from: after an outer step weights alone."""
    momentum, square = base.momentum, base.square
    if square is None:
        momentum = square = np.zeros_like(base.weights)
    return OptimiserState(weights=base.weights, momentum=momentum, square=square)


def num_cores() -> int:
    """Return the cores that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len(os.sched_getaffinity(0))


def _parts(blobs: Blobs, closing: Closing) -> Iterator[Part]:
    """Yield what is to be added up: in order, with shares of the tokens, clipped.

    Shares are normalised before anything is multiplied, so that one submission
    alone has a share of exactly 1. What was made for an earlier version counts less.
    """
    if closing.mean is not None:
        return
    rows = closing.submissions
    shares = merge_weights([row.tokens for row in rows])
    for row, share, factor in zip(rows, shares, closing.factors, strict=True):
        header, payload = decode_frame(
            blobs.read(BlobKind.PAYLOAD, row.payload_file or "")
        )
        weight = share * factor * staleness_weight(closing.staleness(row))
        yield Part(header.codec, payload, weight)
