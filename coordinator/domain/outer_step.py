"""The outer step: from the submissions of a round to the next weights.

Nesterov momentum on the token-weighted mean G of the pseudo-gradients (base minus
trained), once a round (Douillard et al. 2023, 2311.08105):

    momentum <- mu * momentum + G
    weights  <- weights - eta * (G + mu * momentum)

Every operation is elementwise in float32 and in a fixed order, so that the same
payloads give the same bytes on every CPU. `bitnet_ext.outer` does it in one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from bitnet_ext.codecs import Vector, decode_add
from bitnet_ext.outer import IN_ONE_PASS, MOST_PARTS, Part, Step
from bitnet_ext.outer import outer_step as step_in_one_pass


def merge_weights(tokens: Sequence[int]) -> list[float]:
    """Return the share of each submission; they sum to 1, and one alone is exactly 1.

    Raises ValueError when there is nothing to share.
    """
    total = sum(tokens)
    if total <= 0:
        raise ValueError(f"tokens must have a positive sum, got {list(tokens)}")
    return [count / total for count in tokens]


def outer_step(
    before: tuple[Vector, Vector],
    parts: Iterable[Part],
    after: tuple[Vector, Vector],
    *,
    rate: float,
    decay: float,
    mean: Vector | None = None,
) -> bool:
    """Write new weights and momentum to `after`; return whether they are finite.

    `before`, which stays untouched, and `after` are weights and momentum, float32
    (n,) each; `decay` is mu, `rate` is eta. `mean` is what was added up before, None
    for nothing; more may be added to it in place. At most `MOST_PARTS` payloads are
    held at a time. With decay 0 and rate 1 one submission of share 1 gives exactly
    `weights - pseudo_gradient`, rounded once. Raises PayloadError or NonFiniteError
    for a payload that is not in order; `after` is then undefined.
    """
    held: list[Part] = []
    for part in parts:
        if len(held) == MOST_PARTS or part.codec not in IN_ONE_PASS:
            mean = np.zeros_like(before[0]) if mean is None else mean
            add_parts(held, mean)
            held.clear()
        if part.codec in IN_ONE_PASS:
            held.append(part)
        elif mean is not None:
            add_parts([part], mean)
    step = Step(rate=rate, decay=decay)
    return step_in_one_pass(before, held, step, after=after, mean=mean)


def add_parts(parts: Iterable[Part], mean: Vector) -> None:
    """Add the numbers of each part times its share to `mean`, float32 (n,), in place.

    Raises as `outer_step` does; `mean` is then undefined.
    """
    for part in parts:
        decode_add(part.codec, part.payload, mean, part.share)
