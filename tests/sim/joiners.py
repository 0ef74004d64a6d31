"""Does it help a worker that joins to get the moments of another? `python -m` this.

Two studies of delta rounds, with the production code of the simulator:

- churn: eight workers; whoever dies has lost its disk, and begins anew
- newcomer: two workers as in the demo; one of them is replaced by a new one, on the
  same weights and the same text, so that only its moments differ

Held-out loss by how those begin: with moments that they kept (as if nothing had been
lost), with zeros, or with a copy of another's that is up to 50 rounds old, in bf16.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from enum import StrEnum
from typing import Final

import torch

from bitnet_ext.codecs import Vector
from bitnet_ext.half import Half, from_half, to_half
from bitnet_ext.wire.verdicts import Optimiser, RoundKind
from coordinator.domain.plan import TrainingPlan
from tests.sim.fleet import Claim, Fleet, Recipe
from tests.sim.net import Net, Shape
from tests.sim.setting import Setting
from tests.sim.steps import Moments
from tests.sim.text import Text, read_text

#: A copy is made so often.
EVERY_ROUNDS: Final = 50
CHURN_TOKENS: Final = 384_000
CHURN_SEEDS: Final = (7, 8, 9)
DEATHS: Final = (0.05, 0.25)
CHURN: Final = TrainingPlan(
    local_optimiser=Optimiser.ADAMW,
    learning_rate=4e-3,
    warmup_tokens=12_000,
    schedule_tokens=CHURN_TOKENS,
    batch_size=1,
    round_s=8.0,
    codec="ternary",
    broadcast="ternary",
    quorum=0.5,
)
#: 160 local steps a round, outer momentum as in the demo.
NEWCOMER: Final = TrainingPlan(
    round_kind=RoundKind.DELTA,
    local_optimiser=Optimiser.ADAMW,
    learning_rate=2e-3,
    warmup_tokens=40_000,
    outer_momentum=0.3,
    batch_size=1,
    round_s=160.0,
)
NEWCOMER_SEEDS: Final = (100, 101, 102)
#: Rounds before it joins, and after.
NUM_BEFORE, NUM_AFTER = 12, 6


class Begins(StrEnum):
    """With what moments who lost its state begins."""

    KEPT = "kept"
    ZEROS = "zeros"
    COPIED = "copied"
    #: Zeros in every task, of everybody: whether moments matter here at all.
    NEVER_KEPT = "never kept"


class Joining(Fleet):
    """A fleet that keeps a copy of the moments of one worker for those who join."""

    begins = Begins.KEPT
    kept: Moments | None = None

    def first_moments(self) -> Moments:
        """Return what a worker begins with that has none."""
        if self.begins is Begins.COPIED and self.kept is not None:
            return self.kept.copy()
        return Moments.zeros(self._net.num_params)

    def keep_copy(self) -> None:
        """Keep the moments of the worker that has made most steps."""
        best = max(self._workers, key=lambda worker: worker.moments.step).moments
        self.kept = Moments(_coded(best.mean), _coded(best.square), best.step)

    def replace_last(self) -> None:
        """Put a new worker, whom nobody has measured, in the place of the last one."""
        worker = self._workers[-1]
        worker.moments, worker.residual = self.first_moments(), None
        worker.tokens_per_s = None
        worker.recent.clear()

    def losses(self, num_rounds: int) -> list[float]:
        """Return the held-out loss after each of the next rounds."""
        found = []
        for _ in range(num_rounds):
            self._round(CHURN_TOKENS * 1000)
            found.append(self._net.loss(self.published, self._text.held_out))
        return found

    def branch(self, begins: Begins) -> Joining:
        """Return a fleet that goes on from here, with a newcomer who begins so."""
        shared = {id(part): part for part in (self._net, self._text)}
        other = copy.deepcopy(self, shared)
        other.begins = begins
        other.replace_last()
        return other

    def _publish(self) -> None:
        super()._publish()
        if self.counts.num_rounds % EVERY_ROUNDS == 1:
            self.keep_copy()

    def _end(self, claim: Claim, closes_at: float, *, is_back: bool) -> None:
        super()._end(claim, closes_at, is_back=is_back)
        died = claim.back_at is None
        if died and self.begins in (Begins.ZEROS, Begins.COPIED):
            claim.worker.moments = self.first_moments()
        if self.begins is Begins.NEVER_KEPT:
            claim.worker.moments = Moments.zeros(self._net.num_params)


def _coded(vector: Vector) -> Vector:
    return from_half(Half.BF16, to_half(Half.BF16, vector))


def churn(net: Net, text: Text, begins: Begins, *, deaths: float, seed: int) -> float:
    """Return the held-out loss of a run whose dead lose their disk."""
    recipe = Recipe(plan=CHURN, keeps_state=begins in (Begins.KEPT, Begins.NEVER_KEPT))
    fleet = Joining(net, text, recipe, seed=seed, setting=Setting(deaths=deaths))
    fleet.begins = begins
    fleet.run(CHURN_TOKENS)
    return fleet.counts.curve[-1][2]


def newcomer(net: Net, text: Text, seed: int) -> dict[Begins, list[float]]:
    """Return the losses after each round, by how the newcomer began."""
    setting = Setting(speeds=(1.0, 1.0), deaths=0.0)
    fleet = Joining(net, text, Recipe(plan=NEWCOMER), seed=seed, setting=setting)
    fleet.losses(NUM_BEFORE)
    fleet.keep_copy()
    arms = (Begins.ZEROS, Begins.COPIED)
    return {begins: fleet.branch(begins).losses(NUM_AFTER) for begins in arms}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both studies, or one; print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", choices=("churn", "newcomer"))
    study = parser.parse_args(arguments).study
    torch.set_num_threads(1)
    net, text = Net(Shape()), read_text()
    if study in (None, "newcomer"):
        for seed in NEWCOMER_SEEDS:
            for begins, losses in newcomer(net, text, seed).items():
                print("newcomer", seed, begins, *(f"{loss:.4f}" for loss in losses))
    if study in (None, "churn"):
        for deaths in DEATHS:
            for seed in CHURN_SEEDS:
                for begins in Begins:
                    loss = churn(net, text, begins, deaths=deaths, seed=seed)
                    print("churn", deaths, seed, begins, f"{loss:.4f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
