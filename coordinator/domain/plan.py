"""The plan of a run: every number that decides how it trains, in one place.

Recorded with the run and with each version. The schedule goes by accepted
tokens, never by the clock, so that a longer budget of time changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from bitnet_ext.wire.messages import EXACT, HyperParameters
from bitnet_ext.wire.verdicts import Optimiser, RoundKind
from coordinator.domain.muon import StepSizes

#: Numbers are bounded above: JSON has no infinity, and a plan must be read again.
MOST: Final = 1e9
Positive = Annotated[float, Meta(gt=0.0, le=MOST)]
Share = Annotated[float, Meta(ge=0.0, lt=1.0)]
Count = Annotated[int, Meta(ge=1)]


class Aggregation(StrEnum):
    """What makes a version."""

    ROUNDS = "rounds"  #: all that was claimed on the version before
    PER_ARRIVAL = "per-arrival"  #: each submission as it comes, however old its base


class AcceptLate(StrEnum):
    """When a result is still taken whose lease has ended."""

    NEVER = "never"
    ROUND = "round"  #: as long as its round is open: nothing is stale
    STALE = "stale"  #: up to two rounds later too, with a lower weight


#: In place of a round time: it is chosen by `coordinator.domain.round_time`.
AUTO: Final = "auto"

#: Codecs of what workers send, and of what they download.
CODECS: Final = ("ternary", "int8", "fp32")
BROADCASTS: Final = (EXACT, "ternary", "int8")


#: The learning rate that is usual for rounds of a kind.
USUAL_RATES: Final[Mapping[RoundKind, float]] = {
    RoundKind.DELTA: 2e-3,
    RoundKind.GRADIENT: 2e-2,
}


class PlanError(ValueError):
    """Values of a plan that don't go together; the message shows them all."""

    def __init__(self, fields: Sequence[str], fault: str) -> None:
        super().__init__(fault)
        #: Whose values these are, the one to blame first.
        self.fields = fields


def _one_of(words: Iterable[str]) -> Meta:
    return Meta(pattern=rf"^({'|'.join(words)})\Z")


class TrainingPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a run trains. Validated when it is decoded."""

    #: `delta`: workers make local steps, an outer step follows; `gradient`:
    #: they send mean gradients, and the coordinator steps by Muon and AdamW.
    round_kind: RoundKind = RoundKind.DELTA
    #: `per-arrival`: nobody waits for another, each submission is a round of its own.
    aggregation: Aggregation = Aggregation.ROUNDS
    #: What makes local steps; a gradient round has none.
    local_optimiser: Optimiser = Optimiser.MUON
    #: Where that is Muon: the share of its momentum that the next step keeps.
    local_momentum: Share = 0.95
    #: Peak learning rate: of the local steps, or of the gradient step.
    learning_rate: Positive = USUAL_RATES[RoundKind.DELTA]
    #: Accepted tokens over which the rate rises linearly from zero.
    warmup_tokens: Annotated[int, Meta(ge=0)] = 100_000
    #: Accepted tokens at which the rate is back at zero; 0: it stays at its peak.
    #: None: not known yet, see `scheduled`.
    schedule_tokens: Annotated[int, Meta(ge=0)] | None = None
    #: Share of the schedule at which its second stage begins: the rate, by then at
    #: `second_stage_rate` of its peak, goes on to zero without weight decay (Ma et
    #: al. 2024, "The Era of 1-bit LLMs: Training Tips, Code and FAQ").
    second_stage_at: Share = 0.5
    second_stage_rate: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.667
    #: Decoupled decay up to the second stage, and for good without a schedule.
    weight_decay: Annotated[float, Meta(ge=0.0, le=MOST)] = 0.1
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Positive = 1e-8
    clip_norm: Positive = 1.0
    #: Outer step: rate and momentum of Nesterov (Douillard et al. 2023, 2311.08105).
    #: A gradient step has no outer rate; the momentum is that of Muon.
    outer_rate: Positive = 0.9
    outer_momentum: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.8
    #: Sequences in one local step.
    batch_size: Count = 8
    #: Seconds that each task of a round should take; or they are chosen, within bounds.
    round_s: Positive | Literal["auto"] = AUTO
    round_min_s: Positive = 10.0
    round_max_s: Positive = 600.0
    #: Share of a round's tokens after which it waits a grace period only; 1: for all.
    quorum: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    #: Whether a result counts that comes after its lease, and nobody else has its task.
    accept_late: AcceptLate = AcceptLate.ROUND
    #: Codec of pseudo-gradients: `ternary`, `int8` or `fp32`.
    codec: Annotated[str, _one_of(CODECS)] = "int8"
    #: What workers download: `exact` for whole versions that equal the master weights,
    #: else the codec of the links between versions.
    broadcast: Annotated[str, _one_of(BROADCASTS)] = "int8"
    #: Every n-th version is scored on the held-out shard.
    evaluate_every: Count = 10

    def __post_init__(self) -> None:
        """Refuse bounds and stages the wrong way round, and what arrivals lack."""
        if self.round_min_s > self.round_max_s:
            raise PlanError(
                ("round_min_s", "round_max_s"),
                f"round_min_s ({self.round_min_s:g}) must be at most round_max_s "
                f"({self.round_max_s:g})",
            )
        if self.warmup_tokens >= second_stage_tokens(self):
            raise PlanError(
                ("warmup_tokens", "schedule_tokens", "second_stage_at"),
                f"the second stage, at second_stage_at ({self.second_stage_at:g}) of "
                f"schedule_tokens ({self.schedule_tokens}), must begin after "
                f"warmup_tokens ({self.warmup_tokens})",
            )
        if self.aggregation is Aggregation.PER_ARRIVAL:
            _check_arrivals(self)


def _check_arrivals(plan: TrainingPlan) -> None:
    """Refuse what makes no sense where each submission makes a version."""
    for field, due, got in (
        # The steps of Muon and AdamW are as long for a gradient that counts half.
        ("round_kind", RoundKind.DELTA, plan.round_kind),
        # Momentum does not go well with pseudo-gradients of older weights.
        ("outer_momentum", 0.0, plan.outer_momentum),
        ("quorum", 1.0, plan.quorum),
    ):
        if got != due:
            raise PlanError(
                (field, "aggregation"),
                f"{field} must be {due} with aggregation {plan.aggregation}",
            )


#: The fields that take one of a few words, and these words.
CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "round_kind": tuple(RoundKind),
    "local_optimiser": tuple(Optimiser),
    "aggregation": tuple(Aggregation),
    "accept_late": tuple(AcceptLate),
    "codec": CODECS,
    "broadcast": BROADCASTS,
}

#: Tokens for each parameter when no budget is set (Hoffmann et al. 2022, 2203.15556).
TOKENS_PER_PARAMETER: Final = 20


def learning_rate_at(plan: TrainingPlan, tokens_accepted: int) -> float:
    """Return the rate after so many accepted tokens.

    A linear warm-up; then constant, or with a schedule linear from corner to corner:
    the peak, the second stage, zero at the end.
    """
    if tokens_accepted < plan.warmup_tokens:
        return plan.learning_rate * tokens_accepted / plan.warmup_tokens
    if not plan.schedule_tokens:
        return plan.learning_rate
    corners = (
        (float(plan.warmup_tokens), 1.0),
        (second_stage_tokens(plan), plan.second_stage_rate),
        (float(plan.schedule_tokens), 0.0),
    )
    for (start, high), (end, low) in pairwise(corners):
        if tokens_accepted < end:
            done = (tokens_accepted - start) / (end - start)
            return plan.learning_rate * (high + (low - high) * done)
    return 0.0


def weight_decay_at(plan: TrainingPlan, tokens_accepted: int) -> float:
    """Return the decay after so many accepted tokens: none in the second stage."""
    return plan.weight_decay if tokens_accepted < second_stage_tokens(plan) else 0.0


def scheduled(plan: TrainingPlan, token_budget: int) -> TrainingPlan:
    """Return the plan of a run of so many tokens, 0 for no end.

    Where it does not say when the rate is back at zero, that is the end of the run. A
    run without an end, or so short that it is warming up for half of it, stays at
    its peak. Raises PlanError for a schedule that ends before the run does: at rate
    zero nothing learns.
    """
    if plan.schedule_tokens is None:
        fits = has_stages(plan, token_budget)
        return replace(plan, schedule_tokens=token_budget if fits else 0)
    if plan.schedule_tokens and not 0 < token_budget <= plan.schedule_tokens:
        end = f" or at least token_budget ({token_budget})"
        raise PlanError(
            ("schedule_tokens", "token_budget"),
            f"schedule_tokens ({plan.schedule_tokens}) must be 0"
            f"{end if token_budget else ', as token_budget (0) is no end'}",
        )
    return plan


def has_stages(plan: TrainingPlan, token_budget: int) -> bool:
    """Return whether a schedule of so many tokens warms up before its second stage."""
    return plan.warmup_tokens < plan.second_stage_at * token_budget


def second_stage_tokens(plan: TrainingPlan) -> float:
    """Return the accepted tokens at which the second stage begins; or infinity."""
    if not plan.schedule_tokens:
        return math.inf
    return plan.second_stage_at * plan.schedule_tokens


def hyper_parameters(
    plan: TrainingPlan, *, tokens_accepted: int, task_tokens: int
) -> HyperParameters:
    """Return what a task of `task_tokens` cut at this point of the run is given."""
    if plan.round_kind is RoundKind.GRADIENT:
        return HyperParameters(clip_norm=plan.clip_norm)
    return HyperParameters(
        optimiser=plan.local_optimiser,
        momentum=plan.local_momentum,
        lr_start=learning_rate_at(plan, tokens_accepted),
        lr_end=learning_rate_at(plan, tokens_accepted + task_tokens),
        weight_decay=weight_decay_at(plan, tokens_accepted),
        beta1=plan.beta1,
        beta2=plan.beta2,
        eps=plan.eps,
        clip_norm=plan.clip_norm,
    )


def step_sizes(
    plan: TrainingPlan, *, tokens_before: int, tokens: int, step: int
) -> StepSizes:
    """Return the numbers of the gradient step of a round of so many tokens.

    The rate is that of the middle of the round, as if it changed within: so it is
    zero neither in the first step of a warm-up nor in the last of a schedule.
    """
    return StepSizes(
        rate=learning_rate_at(plan, tokens_before + tokens // 2),
        decay=weight_decay_at(plan, tokens_before),
        momentum=plan.outer_momentum,
        beta1=plan.beta1,
        beta2=plan.beta2,
        eps=plan.eps,
        step=step,
    )
