"""Local steps of many replicas at once, with the production AdamW and Muon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bitnet_ext import fused
from bitnet_ext.layout import Segment, SegmentKind
from bitnet_ext.wire.messages import HyperParameters
from bitnet_ext.wire.verdicts import Optimiser
from tests.sim.net import NO_TARGET, SEQ_LEN, Net
from tests.sim.text import Windows
from worker import muon

Vector = NDArray[np.float32]


@dataclass(slots=True)
class Moments:
    """What the optimiser of one replica remembers."""

    mean: Vector
    square: Vector
    step: int = 0

    @classmethod
    def zeros(cls, size: int) -> Moments:
        """Return the moments of an optimiser that has made no step."""
        return cls(np.zeros(size, np.float32), np.zeros(size, np.float32))

    def copy(self) -> Moments:
        """Return moments that share no memory with these."""
        return Moments(self.mean.copy(), self.square.copy(), self.step)


@dataclass(frozen=True, slots=True)
class Local:
    """One task of local steps: its batches in order, and how to step."""

    batches: list[Windows]
    hyper: HyperParameters
    #: Updated in place.
    moments: Moments


def clipped(grad: Vector, clip_norm: float) -> float:
    """Return the factor that brings a gradient down to the largest norm allowed."""
    return min(1.0, clip_norm / max(fused.norm_of(grad), 1e-30))


def trained(net: Net, base: Vector, tasks: Sequence[Local]) -> list[Vector]:
    """Return the flat vectors that the tasks end with; all start from `base`."""
    # The longest first, so that those with steps left are always the first rows.
    order = sorted(range(len(tasks)), key=lambda i: -len(tasks[i].batches))
    flat_RP = np.repeat(base[None], len(tasks), axis=0)
    for index in range(len(tasks[order[0]].batches)):
        active = [tasks[i] for i in order if len(tasks[i].batches) > index]
        batch = _stacked([task.batches[index] for task in active])
        _, grads_RP = net.gradients(flat_RP[: len(active)], batch)
        for row, task in enumerate(active):
            local_step(net.segments, flat_RP[row], grads_RP[row], task, index)
    return [flat_RP[order.index(i)] for i in range(len(tasks))]


def local_step(
    segments: Sequence[Segment], values: Vector, grad: Vector, task: Local, index: int
) -> None:
    """Make step `index` of a task on `values`, as `worker.train` does."""
    hyper, moments = task.hyper, task.moments
    moments.step += 1
    done = index / max(1, len(task.batches) - 1)
    rate = hyper.lr_start + (hyper.lr_end - hyper.lr_start) * done
    clip = clipped(grad, hyper.clip_norm)
    if hyper.optimiser is Optimiser.MUON:
        muon_how = muon.Muon(
            rate=rate, decay=hyper.weight_decay, momentum=hyper.momentum, clip=clip
        )
        for segment in segments:
            if segment.is_linear:
                _muon(segment, values, grad, moments.mean, muon_how)
        segments = [segment for segment in segments if not segment.is_linear]
    for part, decays in stretches(segments):
        how = fused.AdamW(
            rate=rate,
            decay=hyper.weight_decay if decays else 0.0,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            eps=hyper.eps,
            step=moments.step,
            clip=clip,
        )
        fused.adamw(
            values[part], grad[part], moments.mean[part], moments.square[part], how
        )


def _muon(
    segment: Segment, values: Vector, grad: Vector, mean: Vector, how: muon.Muon
) -> None:
    """Make the step of one hidden matrix in place."""
    place = slice(segment.offset, segment.offset + segment.size)
    views = (
        torch.from_numpy(vector[place]).view(segment.shape)
        for vector in (values, grad, mean)
    )
    muon.step(*views, how)


def stretches(segments: Sequence[Segment]) -> list[tuple[slice, bool]]:
    """Return the longest stretches that share their decay: norms have none."""
    found: list[tuple[slice, bool]] = []
    for segment in segments:
        decays = segment.kind is not SegmentKind.NORM
        end = segment.offset + segment.size
        if found and found[-1][0].stop == segment.offset and found[-1][1] == decays:
            found[-1] = slice(found[-1][0].start, end), decays
        else:
            found.append((slice(segment.offset, end), decays))
    return found


def _stacked(batches: Sequence[Windows]) -> Windows:
    """Return the batches as one array (R, B, T + 1), short ones padded."""
    most = max(len(batch) for batch in batches)
    stacked = np.full((len(batches), most, SEQ_LEN + 1), NO_TARGET)
    for row, batch in enumerate(batches):
        stacked[row, : len(batch)] = batch
    return stacked
