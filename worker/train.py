"""One training task: K local steps on a stretch of tokens.

1. take the sequences of the stretch in the order of its shard (`worker.order`)
2. batch by batch: loss, gradient, global-norm clip, a step at the next learning rate:
   of AdamW, or of Muon on hidden matrices and AdamW on the rest
3. the pseudo-gradient is base minus trained, over the whole flat vector

The base weights are never written to. The moments of the optimiser outlive the task:
the new ones are handed back, and the caller keeps them once the work is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitnet_ext import fused
from bitnet_ext.fused import AdamW
from bitnet_ext.layout import ModelShape, Segment, SegmentKind, num_params, segments
from bitnet_ext.wire.messages import HyperParameters, Task
from bitnet_ext.wire.verdicts import FailCode, Optimiser
from worker import muon
from worker.errors import TaskError
from worker.model import plain
from worker.model.flatten import segment_of
from worker.model.head import torch_threads
from worker.model.transformer import NO_TARGET, BitNetModel
from worker.order import TOKEN_BYTES, sequence_starts, text_window

#: Keeps the factor of a gradient of zeros finite.
_TINY: Final = 1e-30


class NonFiniteLossError(TaskError):
    """A loss or a gradient is NaN or infinite: training diverged."""

    code = FailCode.NON_FINITE_LOSS


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What long work calls between two steps."""

    #: Tokens done so far, and the wall seconds of the step just done.
    progress: Callable[[int, float], None]
    #: Ends the work by raising (told to stop, lease lost).
    check: Callable[[], None]
    #: Whether a task should be handed in as far as it is.
    enough: Callable[[], bool]
    #: Monotonic seconds.
    clock: Callable[[], float]

    @classmethod
    def quiet(cls, clock: Callable[[], float]) -> Hooks:
        """Return the hooks of work that nobody watches or ends."""
        return cls(
            progress=lambda *_: None,
            check=lambda: None,
            enough=lambda: False,
            clock=clock,
        )


@dataclass(frozen=True, slots=True)
class Moments:
    """What the optimiser remembers: flat float32 tensors in layout order.

    Kept from task to task; to forget them costs far more than any codec.
    """

    #: Running mean of the gradient, and of its square, which Muon leaves as it is.
    exp_avg: Tensor
    exp_avg_sq: Tensor
    #: Steps so far, one number for each segment; on the CPU.
    step: Tensor

    @classmethod
    def zeros(cls, shape: ModelShape) -> Moments:
        """Return the moments of an optimiser that has made no step."""
        size = num_params(shape)
        return cls(
            torch.zeros(size), torch.zeros(size), torch.zeros(len(segments(shape)))
        )

    def copy(self, device: torch.device | None = None) -> Moments:
        """Return moments that share no memory with these, vectors on `device`."""
        return Moments(
            self.exp_avg.to(device, copy=True),
            self.exp_avg_sq.to(device, copy=True),
            self.step.clone(),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of one local step; int64 (B, T), padded to the longest."""

    inputs: Tensor
    #: The token after each input, NO_TARGET where there is none.
    targets: Tensor
    #: Inputs that are not padding.
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a task hands back, finished or as far as it came."""

    #: Base minus trained, or the mean gradient: the coordinator subtracts it.
    #: float32, layout order.
    pseudo_gradient: NDArray[np.float32]
    #: The moments after the last step; commit them when the work is accepted.
    #: None: there was no optimiser.
    moments: Moments | None
    num_steps: int
    #: Input positions trained, each once: the stretch, or whole steps from its start.
    tokens: int
    #: Nats a token: of the first step, of the last, and over all targets.
    loss_first: float
    loss_last: float
    loss_mean: float
    compute_s: float


class Steps(Protocol):
    """What is done with the batches of a task, one after another."""

    def step(self, batch: Batch, rate: float) -> float:
        """Do one of them; return its loss in nats a token."""

    def result(
        self, base: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], Moments | None]:
        """Return the pseudo-gradient, and the moments where there are some."""


def train(
    model: BitNetModel,
    base: NDArray[np.float32],
    moments: Moments,
    tokens: NDArray[np.int32],
    task: Task,
    hooks: Hooks,
) -> TrainResult:
    """Run the local steps of `task` from the flat vector `base`.

    Afterwards the model holds the trained weights; `base` and `moments` are as
    they were. AdamW starts anew after Muon, which leaves it no squares to divide by.
    Raises as `take_steps` does.
    """
    by_adamw = task.hyper.optimiser is Optimiser.ADAMW
    if by_adamw and _lack_squares(moments, model.flat.segments):
        moments = Moments.zeros(model.shape)
    steps = LocalSteps(model, moments.copy(model.device), task.hyper)
    return take_steps(model, base, steps, tokens, task, hooks)


def _lack_squares(moments: Moments, parts: Iterable[Segment]) -> bool:
    """Return whether hidden matrices have made steps, but by Muon only.

    With a mean, many steps and no squares AdamW would divide by next to nothing.
    """
    squares = (segment_of(moments.exp_avg_sq, part) for part in parts if part.is_linear)
    return bool(moments.step.any()) and not any(part.any() for part in squares)


def take_steps(
    model: BitNetModel,
    base: NDArray[np.float32],
    steps: Steps,
    tokens: NDArray[np.int32],
    task: Task,
    hooks: Hooks,
) -> TrainResult:
    """Lead the batches of `task` through `steps`, from the flat vector `base`.

    Ends after the last, or between two of them once `hooks.enough`. `tokens` is int32:
    the `text_window` of the task, and the token after it where the shard has one.
    Raises NonFiniteLossError when training diverges, TaskError when the task
    contradicts itself, and whatever `hooks.check` raises.
    """
    _check_steps(task)
    started_s = hooks.clock()
    model.flat.load(base)
    losses, nats, num_targets, tokens_done = [], 0.0, 0, 0
    for index, batch in enumerate(batches(tokens, task)):
        hooks.check()
        if index and hooks.enough():
            break
        step_started_s = hooks.clock()
        rate = learning_rate(task.hyper, index, task.num_steps)
        losses.append(steps.step(batch, rate))
        batch_targets = count_targets(batch.targets)
        nats += losses[-1] * batch_targets
        num_targets += batch_targets
        tokens_done += batch.num_tokens
        hooks.progress(tokens_done, hooks.clock() - step_started_s)
    pseudo_gradient, new_moments = steps.result(base)
    return TrainResult(
        pseudo_gradient=pseudo_gradient,
        moments=new_moments,
        num_steps=len(losses),
        tokens=tokens_done,
        loss_first=losses[0],
        loss_last=losses[-1],
        loss_mean=nats / max(1, num_targets),
        compute_s=hooks.clock() - started_s,
    )


class Backward:
    """Adds gradients up in the flat vector of a model, which begins at zero.

    At most `model.micro_batch` sequences go through the model at a time; whatever
    it is, the sum is the same but for rounding.
    """

    def __init__(self, model: BitNetModel, clip_norm: float) -> None:
        self._model = model
        self._clip_norm = clip_norm
        model.flat.grads.zero_()

    def add(self, batch: Batch, num_targets: int) -> float:
        """Add what a batch has in the mean loss of so many targets, and return it."""
        parts = self._parts(batch, max(1, num_targets))
        with torch_threads(self._model.torch_threads):
            return sum(self._backward(*part) for part in parts)

    def _parts(
        self, batch: Batch, num_targets: int
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Yield inputs, targets and the share of all targets of each micro-batch."""
        size = self._model.micro_batch or len(batch.inputs)
        for first in range(0, len(batch.inputs), size):
            part = slice(first, first + size)
            inputs, targets = batch.inputs[part], batch.targets[part]
            yield inputs, targets, count_targets(targets) / num_targets

    def _backward(self, inputs: Tensor, targets: Tensor, share: float) -> float:
        """Add the gradient of `share` of the loss; return that much of it."""
        loss = self._model.loss(inputs, targets)
        torch.autograd.backward(loss, torch.full_like(loss, share))
        return share * loss.item()

    def clip(self, loss: float) -> float:
        """Return the factor to the largest norm allowed; refuse what is not finite."""
        # One number that is finite only when all of them are.
        norm = self._norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLossError(
                f"training diverged: loss {loss}, gradient norm {norm}"
            )
        return min(1.0, self._clip_norm / max(norm, _TINY))

    def _norm(self) -> float:
        grads = self._model.flat.grads
        if self._model.plain:
            return float(torch.linalg.vector_norm(grads))
        return fused.norm_of(grads.numpy(), threads=self._model.threads)


class LocalSteps(Backward):
    """AdamW, or Muon and AdamW, on the flat vector of a model.

    The moments given to it are updated. Gradients are zeros before a step and after it.
    """

    def __init__(
        self, model: BitNetModel, moments: Moments, hyper: HyperParameters
    ) -> None:
        super().__init__(model, hyper.clip_norm)
        self.moments = moments
        self._hyper = hyper
        by_muon = hyper.optimiser is Optimiser.MUON
        parts = list(enumerate(model.flat.segments))
        self._matrices = [part for _, part in parts if by_muon and part.is_linear]
        self._stretches = _stretches(
            (index, part) for index, part in parts if not (by_muon and part.is_linear)
        )

    def step(self, batch: Batch, rate: float) -> float:
        """Make one step and return the loss before it, in nats a token.

        Raises NonFiniteLossError before anything is changed.
        """
        nats = self.add(batch, count_targets(batch.targets))
        self._update(self.clip(nats), rate)
        self._model.flat.mark_changed()
        return nats

    def result(self, base: NDArray[np.float32]) -> tuple[NDArray[np.float32], Moments]:
        """Return base minus trained, known to be finite, and the moments."""
        difference: NDArray[np.float32] = base - self._model.flat.values.cpu().numpy()
        if not np.isfinite(difference).all():
            raise NonFiniteLossError("training diverged: weights are not finite")
        return difference, self.moments

    def _update(self, clip: float, rate: float) -> None:
        """Make the step with the gradient times `clip`."""
        self.moments.step.add_(1.0)
        self._update_matrices(clip, rate)
        flat, moments = self._model.flat, self.moments
        for index, stretch, decays in self._stretches:
            how = AdamW(
                rate=rate,
                decay=self._hyper.weight_decay if decays else 0.0,
                beta1=self._hyper.beta1,
                beta2=self._hyper.beta2,
                eps=self._hyper.eps,
                step=int(moments.step[index]),
                clip=clip,
            )
            vectors = (
                flat.values[stretch],
                flat.grads[stretch],
                moments.exp_avg[stretch],
                moments.exp_avg_sq[stretch],
            )
            if self._model.plain:
                plain.adamw(*vectors, how)
                continue
            value, grad, mean, square = (vector.numpy() for vector in vectors)
            threads = self._model.threads
            fused.adamw(value, grad, mean, square, how, threads=threads)

    def _update_matrices(self, clip: float, rate: float) -> None:
        how = muon.Muon(
            rate=rate,
            decay=self._hyper.weight_decay,
            momentum=self._hyper.momentum,
            clip=clip,
        )
        vectors = self._model.flat.values, self._model.flat.grads, self.moments.exp_avg
        for part in self._matrices:
            values, grads, mean = (segment_of(vector, part) for vector in vectors)
            muon.step(values, grads, mean, how)


def _stretches(parts: Iterable[tuple[int, Segment]]) -> list[tuple[int, slice, bool]]:
    """Return the longest stretches of the vector that share their decay.

    Each with the index of its first segment and whether it decays: norms do not.
    `parts` are segments in layout order with their index in it.
    """
    found: list[tuple[int, slice, bool]] = []
    for index, segment in parts:
        decays = segment.kind is not SegmentKind.NORM
        part = slice(segment.offset, segment.offset + segment.size)
        if found and found[-1][1].stop == part.start and found[-1][2] == decays:
            first, before, _ = found[-1]
            found[-1] = first, slice(before.start, part.stop), decays
        else:
            found.append((index, part, decays))
    return found


def count_targets(targets: Tensor) -> int:
    """Return how many inputs have a target."""
    return int((targets != NO_TARGET).sum())


def learning_rate(hyper: HyperParameters, index: int, num_steps: int) -> float:
    """Return the rate of step `index` of `num_steps`: linear, both ends included."""
    done = index / max(1, num_steps - 1)
    return hyper.lr_start + (hyper.lr_end - hyper.lr_start) * done


def batches(tokens: NDArray[np.int32], task: Task) -> Iterator[Batch]:
    """Yield the batches of a task, in its order.

    Every input is in exactly one of them. `tokens` is the `text_window` of the task,
    and the token after it where the shard has one; else the last input has no target.
    """
    first, end = text_window(task)
    due = end - first + (TOKEN_BYTES * end < task.shard_bytes)
    if tokens.dtype != np.int32 or len(tokens) != due:
        raise TaskError(
            f"tokens must be {due} int32 (those from {first} to {end}, and the one "
            f"after them), got {len(tokens)} {tokens.dtype}"
        )
    starts = sequence_starts(task) - first
    for place in range(0, len(starts), task.batch_size):
        chosen = starts[place : place + task.batch_size]
        yield _batch(tokens, end - first, chosen, task.seq_len)


def _batch(
    tokens: NDArray[np.int32],
    num_inputs: int,
    starts: NDArray[np.int64],
    seq_len: int,
) -> Batch:
    """Return the sequences that start there, padded to the longest of them."""
    lengths = np.minimum(num_inputs - starts, seq_len)
    inputs = np.zeros((len(starts), lengths.max()), dtype=np.int64)
    targets = np.full_like(inputs, NO_TARGET)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        following = tokens[start + 1 : start + 1 + length]
        inputs[row, :length] = tokens[start : start + length]
        targets[row, : len(following)] = following
    return Batch(
        torch.from_numpy(inputs), torch.from_numpy(targets), int(lengths.sum())
    )


def _check_steps(task: Task) -> None:
    """Refuse a task whose steps are not those of its tokens."""
    num_tokens = task.byte_length // TOKEN_BYTES
    num_steps = math.ceil(math.ceil(num_tokens / task.seq_len) / task.batch_size)
    if task.num_steps != num_steps:
        raise TaskError(
            f"num_steps must be {num_steps} for {num_tokens} tokens in batches of "
            f"{task.batch_size} x {task.seq_len}, got {task.num_steps}"
        )
