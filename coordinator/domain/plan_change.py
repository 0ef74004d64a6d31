"""A plan that changes in a run: what may change, and what comes of it.

Pure rules. When a change comes into force is a matter of `service.replanning`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from coordinator.domain.plan import USUAL_RATES, PlanError, TrainingPlan, scheduled
from coordinator.domain.plan_words import (
    BUDGET,
    WordError,
    check_choice,
    clash,
    must_be,
    plan_in_words,
    token_budget,
)

#: What stays as it is for a whole run, and why.
FIXED: Final[Mapping[str, str]] = {
    "aggregation": "what is out was claimed for rounds of the other kind",
}
#: What may change, by name.
CHANGEABLE: Final = tuple(
    sorted({*TrainingPlan.__struct_fields__, BUDGET} - FIXED.keys())
)


class Planned(Struct, frozen=True, kw_only=True):
    """What a run trains by, and how far."""

    plan: TrainingPlan
    #: 0: no end by tokens.
    token_budget: int


class Change(Struct, frozen=True, kw_only=True):
    """A field whose value becomes another."""

    name: str
    before: int | float | str
    after: int | float | str

    def __str__(self) -> str:
        return f"{self.name} {_shown(self.before)} -> {_shown(self.after)}"


def planned(
    words: Mapping[str, str],
    *,
    in_force: Planned,
    asked: Planned,
    tokens_accepted: int,
) -> Planned:
    """Return what a run is to train by once `words` are added to what was `asked`.

    A schedule that ends with the token budget goes on doing so. Raises WordError: a
    name that there is not, a value that can't be, and what is fixed for a run.
    """
    for name, word in words.items():
        _check(name, word, in_force.plan)
    _check_rate(words, asked.plan)
    budget = asked.token_budget
    if BUDGET in words:
        budget = _budget(words[BUDGET], tokens_accepted)
    base = asked.plan
    if budget != asked.token_budget and _follows_budget(asked):
        base = replace(base, schedule_tokens=None)
    of_plan = {name: word for name, word in words.items() if name != BUDGET}
    plan = plan_in_words(of_plan, base)
    try:
        return Planned(plan=scheduled(plan, budget), token_budget=budget)
    except PlanError as error:
        raise clash(words, error) from None


def differences(before: Planned, after: Planned) -> list[Change]:
    """Return what changes from one to the other, in the order of the plan."""
    old, new = _fields(before), _fields(after)
    return [
        Change(name=name, before=old[name], after=new[name])
        for name in new
        if old[name] != new[name]
    ]


def told(changes: Sequence[Change]) -> str:
    """Return changes in words."""
    return ", ".join(map(str, changes))


def _check(name: str, word: str, plan: TrainingPlan) -> None:
    if name in FIXED:
        check_choice(name, word)
        if word != getattr(plan, name):
            raise WordError(
                name,
                f" is fixed for a run, as {FIXED[name]}: to train with {word!r}, begin "
                "another run in another data folder",
            )
    elif name not in CHANGEABLE:
        raise WordError(
            name, f" can't be set in a run; there are {', '.join(CHANGEABLE)}"
        )


def _check_rate(words: Mapping[str, str], plan: TrainingPlan) -> None:
    """Refuse another kind of round at the rate of the kind before, ten times off."""
    kind = words.get("round_kind", plan.round_kind)
    check_choice("round_kind", kind)
    if kind == plan.round_kind or "learning_rate" in words:
        return
    usual = ", ".join(f"{rate:g} for {one}" for one, rate in USUAL_RATES.items())
    raise WordError(
        "round_kind",
        f"={kind} needs learning_rate=RATE in the same command: usual are {usual}, "
        f"and it is {plan.learning_rate:g}",
    )


def _budget(word: str, tokens_accepted: int) -> int:
    budget = token_budget(word)
    if 0 < budget < tokens_accepted:
        rule = f"0 (no end) or at least {tokens_accepted}, which are accepted already"
        raise must_be(BUDGET, rule, word)
    return budget


def _follows_budget(found: Planned) -> bool:
    """Return whether the schedule is the one of a run that was given none."""
    without = replace(found.plan, schedule_tokens=None)
    return scheduled(without, found.token_budget) == found.plan


def _fields(found: Planned) -> dict[str, int | float | str]:
    fields = msgspec.to_builtins(found.plan)
    return {**fields, BUDGET: found.token_budget}


def _shown(value: float | str) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)
