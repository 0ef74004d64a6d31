"""The outer step: from the submissions of a round to the next weights.

Nesterov momentum on the token-weighted mean G of the pseudo-gradients (base minus
trained), once a round (Douillard et al. 2023, 2311.08105):

    momentum <- mu * momentum + G
    weights  <- weights - eta * (G + mu * momentum)

Every operation is elementwise in float32 and in a fixed order, so that the same
payloads give the same bytes on every CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]


def merge_weights(tokens: Sequence[int]) -> list[float]:
    """Return the share of each submission; they sum to 1, and one alone is exactly 1.

    Raises ValueError when there is nothing to share.
    """
    total = sum(tokens)
    if total <= 0:
        raise ValueError(f"tokens must have a positive sum, got {list(tokens)}")
    return [count / total for count in tokens]


def outer_step(
    weights: Vector,
    momentum: Vector,
    pseudo_gradient: Vector,
    *,
    rate: float,
    decay: float,
) -> tuple[Vector, Vector]:
    """Return new weights and new momentum, float32 (n,); the inputs stay untouched.

    `decay` is mu, `rate` is eta. With decay 0 and rate 1 the result is exactly
    `weights - pseudo_gradient`, rounded once.
    """
    new_momentum = np.multiply(momentum, np.float32(decay))
    new_momentum += pseudo_gradient
    step = np.multiply(new_momentum, np.float32(decay))
    step += pseudo_gradient
    step *= np.float32(rate)
    return np.subtract(weights, step, out=step), new_momentum
