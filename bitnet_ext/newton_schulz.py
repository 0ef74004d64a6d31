"""What worker and coordinator share of Muon: its polynomial, blocks and step length.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the orthogonal matrix
that is nearest to it, by Newton-Schulz iterations. Here the short side is cut in
blocks of 64, and at least in two; each block becomes orthogonal by itself, in three
iterations (ADR 0014 has the price):

    x <- momentum / its Frobenius norm, for each block
    x <- a x + (b x x' + c (x x')^2) x,   three times

All iterations work on the square x x' alone, where they are polynomials that commute;
x itself is multiplied once, at the end.

Letters in shapes: N rows and K columns of one weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

#: a, b and c: quintic that pushes all singular values towards 1 (Jordan et al. 2024).
QUINTIC: Final = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS: Final = 3
#: Length of the short side of a block, where there are more than two.
BLOCK_ROWS: Final = 64
#: Into how many the short side is cut at least, where it can be.
MIN_BLOCKS: Final = 2
#: Root mean square of a step of AdamW.
_ADAMW_RMS: Final = 0.2


def num_blocks(short: int) -> int:
    """Return into how many equal blocks a short side of that length is cut."""
    many = max(MIN_BLOCKS, short // BLOCK_ROWS)
    return next(num for num in (many, MIN_BLOCKS, 1) if short % num == 0)


def step_length(rate: float, shape: Sequence[int]) -> float:
    """Return what an orthogonal (N, K) is multiplied by, to be subtracted.

    Its entries get the size of a step of AdamW (Liu et al. 2025, 2502.16982), so
    that both share one rate.
    """
    return rate * _ADAMW_RMS * math.sqrt(max(shape))
