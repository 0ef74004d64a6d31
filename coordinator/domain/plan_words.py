"""Plans in words: how settings and `set-plan` name and write what a run trains by.

One parser for both, so that a word that can be set when a run is made can be set later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from coordinator.domain.plan import AUTO, CHOICES, MOST, TrainingPlan

#: How many tokens a run is given, in words beside those of its plan; 0: no end.
BUDGET: Final = "token_budget"
MAX_TOKENS: Final = 2**62
#: Sequences in one step, which a worker holds all at once. Plans that are stored may
#: have more, and must be read.
MAX_BATCH: Final = 4096
_ROUND_RULE: Final = f"{AUTO} or a number of seconds above 0, at most {MOST:g}"


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


def plan_in_words(words: Mapping[str, str], base: TrainingPlan) -> TrainingPlan:
    """Return `base` with the fields that are named. Raises WordError."""
    for name, word in words.items():
        check_choice(name, word)
    if "batch_size" in words:
        whole_number("batch_size", words["batch_size"], 1, MAX_BATCH)
    try:
        return msgspec.convert(
            msgspec.to_builtins(base) | words, TrainingPlan, strict=False
        )
    except msgspec.ValidationError as error:
        found = re.search(r"\$\.([a-z0-9_]+)", str(error))
        name = found.group(1) if found else ""
        if name == "round_s":
            raise must_be(name, _ROUND_RULE, words[name]) from None
        # A number may be wrong beside another one, and not be named itself.
        shown = f", got {words[name]!r}" if name in words else ""
        raise WordError(name, f": {error}{shown}") from None
