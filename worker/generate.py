"""Draws token ids one after the other; the same seed gives the same ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.decode import Decoder
from bitnet_ext.infer import Floats

#: Below, float32 has no temperature; the likeliest id is drawn in any case.
_COLDEST: Final = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw the next token. Raises ValueError that names a field."""

    #: Ids to add at most.
    num_tokens: int
    #: Divides the logits: below 1 is safer, above 1 wilder, 0 takes the likeliest.
    temperature: float = 1.0
    #: Draw among so many of the likeliest; None: among all.
    top_k: int | None = None
    #: Draw among the likeliest that have this probability together, at least.
    top_p: float = 1.0
    seed: int = 0
    #: Stop when this id is drawn (it is kept); None never stops early.
    stop_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_tokens < 0:
            raise ValueError(f"num_tokens must not be negative, got {self.num_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be finite and not negative, got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


def generate(
    decoder: Decoder,
    prompt: Sequence[int],
    sampling: Sampling,
    random: np.random.Generator | None = None,
) -> Iterator[int]:
    """Yield the ids drawn after the text of `decoder` and `prompt`.

    Each id is part of the text when the next is asked for. Without `random` the seed
    begins anew. Raises ValueError when the prompt is empty or holds an id out of range.
    """
    if random is None:
        random = np.random.default_rng(sampling.seed)
    logits_V = decoder.feed(prompt)
    for number in range(sampling.num_tokens):
        token = draw(logits_V, sampling, random)
        yield token
        if token == sampling.stop_id or number == sampling.num_tokens - 1:
            break
        logits_V = decoder.step(token)


def draw(logits_V: Floats, sampling: Sampling, random: np.random.Generator) -> int:
    """Return one id; temperature comes first, then `top_k`, then `top_p`."""
    if sampling.temperature == 0.0:
        return int(logits_V.argmax())
    odds_V = _odds(logits_V, sampling.temperature)
    ids, whole = _likeliest(odds_V, sampling)
    sums = (odds_V if ids is None else odds_V[ids]).cumsum(dtype=np.float64)
    # The first whose sum reaches the share stays.
    last = min(int(sums.searchsorted(sampling.top_p * whole)), sums.size - 1)
    place = int(sums.searchsorted(random.random() * sums[last]))
    return place if ids is None else int(ids[place])


def _odds(logits_V: Floats, temperature: float) -> Floats:
    """Return numbers that are to each other as the probabilities."""
    # The largest logit is taken away before the division: tiny temperatures
    # must not make infinities.
    with np.errstate(over="ignore"):
        heights_V = (logits_V - logits_V.max()) / np.float32(max(temperature, _COLDEST))
    odds_V: Floats = np.exp(heights_V)
    return odds_V


def _likeliest(
    odds_V: Floats, sampling: Sampling
) -> tuple[NDArray[np.intp] | None, float]:
    """Return the ids to draw among, the likeliest first, and what `top_p` is of.

    None means all, in any order. Of those that `top_p` leaves out most may be missing.
    """
    whole = odds_V.sum(dtype=np.float64)
    if sampling.top_k is not None and sampling.top_k < odds_V.size:
        ids = np.argpartition(-odds_V, sampling.top_k - 1)[: sampling.top_k]
        whole = odds_V[ids].sum(dtype=np.float64)
    elif sampling.top_p < 1.0:
        # All that are less likely have less than 1 - top_p together.
        ids = np.flatnonzero(odds_V >= (1.0 - sampling.top_p) * whole / odds_V.size)
    else:
        return None, float(whole)
    return ids[np.argsort(-odds_V[ids], kind="stable")], float(whole)
