"""Plans in words: how settings and `set-plan` name and write what a run trains by.

One parser for both, so that a word that can be set when a run is made can be set later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, cast, get_type_hints

import msgspec
from msgspec import inspect
from msgspec.structs import replace

from bitnet_ext.wire.verdicts import RoundKind
from coordinator.domain.plan import AUTO, CHOICES, MOST, PlanError, TrainingPlan

#: How many tokens a run is given, in words beside those of its plan; 0: no end.
BUDGET: Final = "token_budget"
MAX_TOKENS: Final = 2**62
#: Sequences in one step, which a worker holds all at once. Plans that are stored may
#: have more, and must be read.
MAX_BATCH: Final = 4096
#: What local steps and the outer step alone go by: a gradient round has neither.
DELTA_ONLY: Final = ("local_optimiser", "local_momentum", "outer_rate")
_ROUND_RULE: Final = f"{AUTO} or a number of seconds above 0, at most {MOST:g}"
_TYPES: Final = get_type_hints(TrainingPlan, include_extras=True)


class WordError(ValueError):
    """A word does not fit its field; the message names the field and shows the word."""

    def __init__(self, name: str, fault: str) -> None:
        super().__init__(f"{name}{fault}")
        self.name = name
        #: What follows the name, with its space or colon.
        self.fault = fault


def must_be(name: str, rule: str, word: object) -> WordError:
    """Return the error of a word that breaks a rule."""
    return WordError(name, f" must be {rule}, got {word!r}")


def whole_number(name: str, word: str, least: int, most: int) -> int:
    """Return a whole number from `least` to `most`. Raises WordError."""
    if re.fullmatch(r"[0-9]{1,19}", word) is None or not least <= int(word) <= most:
        raise must_be(name, f"a whole number from {least} to {most}", word)
    return int(word)


def token_budget(word: str) -> int:
    """Return a budget of tokens, 0 for no end. Raises WordError."""
    return whole_number(BUDGET, word, 0, MAX_TOKENS)


def check_choice(name: str, word: str) -> None:
    """Raise WordError for a field of a few words that this is none of."""
    choices = CHOICES.get(name, (word,))
    if word not in choices:
        raise must_be(name, f"one of {', '.join(choices)}", word)


def clash(words: Mapping[str, str], error: PlanError) -> WordError:
    """Return the error of the word that doesn't go together with the rest."""
    name = next((name for name in error.fields if name in words), error.fields[0])
    # A plan of before may already break a rule that is younger than it.
    shown = f" can't be {words[name]!r}" if name in words else ""
    return WordError(name, f"{shown}: {error}")


def plan_in_words(words: Mapping[str, str], base: TrainingPlan) -> TrainingPlan:
    """Return `base` with the fields that are named. Raises WordError."""
    values = {name: _value(name, word) for name, word in words.items()}
    try:
        plan = replace(base, **values)
    except PlanError as error:
        raise clash(words, error) from None
    if plan.round_kind is RoundKind.GRADIENT:
        for name in DELTA_ONLY:
            if name in words:
                fault = f" means nothing in gradient rounds, got {words[name]!r}"
                raise WordError(name, fault)
    return plan


def _value(name: str, word: str) -> object:
    """Return the value of one field. Raises WordError."""
    check_choice(name, word)
    if name == "batch_size":
        return whole_number(name, word, 1, MAX_BATCH)
    try:
        value = msgspec.convert(word, _TYPES[name], strict=False)
    except msgspec.ValidationError:
        raise must_be(name, _rule(name), word) from None
    # No plan is computed with more: floats end, and so do the integers of SQLite.
    if isinstance(value, int) and value > MAX_TOKENS:
        raise must_be(name, _rule(name), word)
    return value


def _rule(name: str) -> str:
    """Return in words what a number has to be."""
    if name == "round_s":
        return _ROUND_RULE
    kind = inspect.type_info(_TYPES[name])
    if isinstance(kind, inspect.FloatType):
        least = f"above {kind.gt:g}" if kind.gt is not None else f"from {kind.ge:g}"
        most = f"below {kind.lt:g}" if kind.lt is not None else f"at most {kind.le:g}"
        return f"a number {least}, {most}"
    # A union is a number, or none yet.
    whole = kind.types[0] if isinstance(kind, inspect.UnionType) else kind
    return f"a whole number from {cast(inspect.IntType, whole).ge} to {MAX_TOKENS}"
