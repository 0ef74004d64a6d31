"""Samples text as token ids; the same seed gives the same ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.model.transformer import BitNetModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw the next token."""

    #: Ids to add at most.
    num_tokens: int
    #: Divides the logits: below 1 is safer, above 1 wilder, 0 takes the likeliest.
    temperature: float = 1.0
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


@torch.no_grad()
def generate(
    model: BitNetModel,
    weights: NDArray[np.float32],
    prompt: Sequence[int],
    sampling: Sampling,
) -> list[int]:
    """Return the ids drawn after `prompt`, without it.

    The context is the last `seq_len` ids, computed anew for each one: presets are
    short, and a cache of keys would be shifted at every step beyond them.
    Raises ValueError when the prompt is empty or holds an id out of range.
    """
    _check_prompt(prompt, model.shape.vocab_size)
    model.flat.load(weights)
    random = torch.Generator().manual_seed(sampling.seed)
    ids = list(prompt)
    for _ in range(sampling.num_tokens):
        context = torch.tensor([ids[-model.shape.seq_len :]])
        logits_V = model.logits(model(context)[0, -1])
        ids.append(_draw(logits_V, sampling.temperature, random))
        if ids[-1] == sampling.stop_id:
            break
    return ids[len(prompt) :]


def _draw(logits_V: Tensor, temperature: float, random: torch.Generator) -> int:
    if temperature == 0.0:
        return int(logits_V.argmax())
    # The largest logit is taken away before the division: tiny temperatures
    # must not make infinities.
    odds_V = torch.softmax((logits_V - logits_V.max()) / temperature, -1)
    return int(torch.multinomial(odds_V, 1, generator=random))


def _check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    if not prompt:
        raise ValueError("prompt must hold at least one id, got none")
    for token in prompt:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"prompt must hold ids from 0 to {vocab_size - 1}, got {token}"
            )
