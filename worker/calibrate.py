"""Times real training steps at boot: chooses how to train, and guesses the speed.

The speed is a first guess, never a deadline. What to try, and what is best, is ruled
by `worker.tune`; here is what that costs in time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from msgspec.structs import replace

from bitnet_ext.layout import SegmentKind
from bitnet_ext.ternary import choose_isa
from bitnet_ext.wire.messages import HyperParameters
from bitnet_ext.wire.verdicts import Optimiser
from worker.gradient import MeanGradient
from worker.model.flatten import segment_of
from worker.model.transformer import BitNetModel
from worker.train import Batch, Hooks, LocalSteps, Moments, Steps
from worker.tune import (
    MIN_STEPS,
    TORCH,
    Choices,
    Setup,
    Trial,
    fastest,
    is_settled,
    tune,
)

MIN_SECONDS: Final = 1.0
#: Sequences in a step that is timed, at most: two steps of thousands take minutes, and
#: those of so many say as much about a setup.
MAX_SEQUENCES: Final = 32

# The numbers do not matter for the time; they only have to stay finite.
_HYPER: Final = HyperParameters(
    optimiser=Optimiser.ADAMW,
    momentum=0.95,
    lr_start=1e-4,
    lr_end=1e-4,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    clip_norm=1.0,
)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was tried, and how many tokens each step had."""

    trials: list[Trial]
    num_tokens: int

    @property
    def setup(self) -> Setup:
        """The fastest."""
        return fastest(self.trials).setup

    @property
    def tokens_per_s(self) -> float:
        """What to expect of the fastest."""
        return self.num_tokens / fastest(self.trials).mean_s

    def __str__(self) -> str:
        tried = "; ".join(
            f"{trial.setup}: {self.num_tokens / trial.step_s:.0f}"
            for trial in self.trials
        )
        return f"{self.setup}: {self.tokens_per_s:.0f} tokens/s; tried {tried}"


def calibrate(
    model: BitNetModel,
    batch_size: int,
    optimiser: Optimiser | None,
    choices: Choices,
    hooks: Hooks,
) -> Calibration:
    """Time whole local steps on random tokens; keep the best setup.

    Without an optimiser a step is what it is in a gradient round: no weight changes.
    One of more than MAX_SEQUENCES is timed as if it had so many.
    Each setup runs for at least MIN_SECONDS and MIN_STEPS steps, unless it is clearly
    worse than another. The weights of the model are overwritten. Raises what
    `hooks.check` raises.
    """
    random = torch.Generator().manual_seed(0)
    _fill(model, random)
    batch = _random_batch(model, min(batch_size, MAX_SEQUENCES), random)
    steps = _steps(model, optimiser, batch.num_tokens)

    def measure(setup: Setup, to_beat_s: float | None) -> tuple[float, ...]:
        arrange(model, setup)
        return _time_steps(steps, batch, to_beat_s, hooks)

    trials = tune(choices, measure, hooks.clock)
    arrange(model, fastest(trials).setup)
    return Calibration(trials, batch.num_tokens)


def arrange(model: BitNetModel, setup: Setup) -> None:
    """Let a model make its steps in this way from now on."""
    use_threads(setup.threads)
    model.threads = setup.threads
    model.micro_batch = setup.micro_batch
    model.plain = setup.variant == TORCH
    if not model.plain:
        choose_isa(setup.variant)


def use_threads(num_threads: int) -> None:
    """Let torch use so many threads in this process.

    One thread between operators: the loop trains one model at a time. torch lets
    that be set once, before any work.
    """
    torch.set_num_threads(num_threads)
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)


def _steps(model: BitNetModel, optimiser: Optimiser | None, num_targets: int) -> Steps:
    if optimiser is None:
        return MeanGradient(model, _HYPER.clip_norm, num_targets)
    moments = Moments.zeros(model.shape).copy(model.device)
    return LocalSteps(model, moments, replace(_HYPER, optimiser=optimiser))


def _time_steps(
    steps: Steps, batch: Batch, to_beat_s: float | None, hooks: Hooks
) -> tuple[float, ...]:
    """Return the seconds of each step."""
    seconds: list[float] = []
    now_s = hooks.clock()
    while len(seconds) < MIN_STEPS or sum(seconds) < MIN_SECONDS:
        hooks.check()
        began_s = now_s
        steps.step(batch, _HYPER.lr_start)
        now_s = hooks.clock()
        seconds.append(now_s - began_s)
        hooks.progress(len(seconds) * batch.num_tokens, seconds[-1])
        if is_settled(seconds, to_beat_s):
            break
    return tuple(seconds)


def _fill(model: BitNetModel, random: torch.Generator) -> None:
    """Fill the weights with small noise, the gains with ones."""
    flat = model.flat
    noise = torch.empty(flat.values.shape).normal_(std=0.02, generator=random)
    flat.load(noise.numpy())
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
    return Batch(inputs, targets, inputs.numel())
