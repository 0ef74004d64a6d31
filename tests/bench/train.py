"""Whole training steps: who takes part, at which micro-batch, and how fast.

A step is always `SEQUENCES` sequences. Each contender of torch first tries smaller
and smaller micro-batches on its own and keeps the fastest; then those that count
are timed in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from bitnet_ext.layout import ModelShape
from coordinator.domain.initial import initial_weights
from tests.bench.ours import OurTrainer
from tests.bench.peers.recipes import DENSE, PLAIN, STRONGEST, Recipe, Trainer
from tests.bench.text import batches, real_tokens
from tests.bench.timing import Contender, Times, interleave

OURS: Final = "ours"
#: Sequences in a step.
SEQUENCES: Final = 8
RECIPES: Final = {recipe.name: recipe for recipe in (PLAIN, DENSE, *STRONGEST)}

#: Makes one step on (B, T) inputs and targets; returns the loss before.
Step = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True, slots=True)
class Choice:
    """A recipe at its best micro-batch, or the reason why it cannot run here."""

    recipe: Recipe
    micro_batch: int = 0
    #: Of a step, in the short run that chose.
    seconds: float = float("inf")
    reason: str = ""


@dataclass(slots=True)
class Runner:
    """One contender with its own walk through the same text."""

    step: Step
    batches: Iterator[tuple[Tensor, Tensor]]
    losses: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        """Make one step; return its seconds."""
        ids, targets = next(self.batches)
        began_s = time.perf_counter()
        self.losses.append(self.step(ids, targets))
        return time.perf_counter() - began_s


def weights(shape: ModelShape) -> NDArray[np.float32]:
    """Return the flat vector that everybody starts from."""
    return initial_weights(shape, seed=0)


def text(shape: ModelShape) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of the steps, the same few again and again."""
    endless = batches(real_tokens(shape.vocab_size), SEQUENCES, shape.seq_len)
    return cycle(list(islice(endless, 8)))


def stepper(
    name: str, shape: ModelShape, start: NDArray[np.float32], micro_batch: int
) -> Step:
    """Return the step of a contender; ours takes the whole step at once."""
    if name == OURS:
        return OurTrainer(shape, start).step
    first = torch.from_numpy(start)
    return Trainer(shape, RECIPES[name], first, micro_batch=micro_batch).step


def choose(
    shape: ModelShape, recipe: Recipe, sizes: Sequence[int], *, steps: int
) -> Choice:
    """Return the recipe at the fastest micro-batch of `sizes`, tried in that order.

    The search ends with the first size that is slower than the one before: what
    gets slower on the way down never turned faster again further down.
    """
    best = Choice(recipe)
    for size in sizes:
        _forget_compilations()
        try:
            runner = Runner(
                stepper(recipe.name, shape, weights(shape), size), text(shape)
            )
            runner()
        except TorchDynamoException as error:
            return Choice(recipe, reason=_first_line(error))
        seconds = min(runner() for _ in range(steps))
        if seconds > best.seconds:
            break
        best = Choice(recipe, size, seconds)
    return best


def compete(
    shape: ModelShape, choices: Sequence[Choice], *, rounds: int
) -> tuple[dict[str, Times], dict[str, float]]:
    """Time ours and the choices in turn; return seconds of steps, and last losses."""
    _forget_compilations()
    start = weights(shape)
    sizes = {OURS: SEQUENCES} | {c.recipe.name: c.micro_batch for c in choices}
    runners: Mapping[str, Runner] = {
        name: Runner(stepper(name, shape, start, size), text(shape))
        for name, size in sizes.items()
    }
    for runner in runners.values():
        runner()  # compiles, and grows the caches of allocators
    contenders: dict[str, Contender] = dict(runners)
    times = interleave(contenders, rounds=rounds)
    return times, {name: runner.losses[-1] for name, runner in runners.items()}


def _forget_compilations() -> None:
    """Begin anew; with too many for one function torch would stop compiling it."""
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def _first_line(error: Exception) -> str:
    """Return the first line of a message that may be a whole stack of compilers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
