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
    ids = _likeliest(logits_V, sampling)
    kept = logits_V if ids is None else logits_V[ids]
    # The largest logit is taken away before the division: tiny temperatures
    # must not make infinities.
    temperature = np.float32(max(sampling.temperature, _COLDEST))
    with np.errstate(over="ignore"):
        heights = (kept - kept.max()) / temperature
    sums = np.exp(heights).cumsum(dtype=np.float64)
    # The first whose sum reaches the share stays.
    last = int(sums.searchsorted(sampling.top_p * sums[-1]))
    place = int(sums.searchsorted(random.random() * sums[min(last, sums.size - 1)]))
    return place if ids is None else int(ids[place])


def _likeliest(logits_V: Floats, sampling: Sampling) -> NDArray[np.intp] | None:
    """Return the ids to draw among, the likeliest first; None: all, in any order."""
    ids = None
    if sampling.top_k is not None and sampling.top_k < logits_V.size:
        ids = np.argpartition(-logits_V, sampling.top_k - 1)[: sampling.top_k]
    if sampling.top_p == 1.0 and ids is None:
        return None
    if ids is None:
        return np.argsort(-logits_V, kind="stable")
    return ids[np.argsort(-logits_V[ids], kind="stable")]
