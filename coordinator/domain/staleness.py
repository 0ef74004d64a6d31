"""How much a submission counts that comes rounds after the one it was made for."""

from __future__ import annotations

from typing import Final

#: What is older by more rounds than this is refused.
MAX_STALENESS: Final = 2


def staleness_weight(staleness: int) -> float:
    """Return the factor of a pseudo-gradient from so many versions before the base.

    1 for a fresh one, falling as the root of its age. Raises ValueError below 0.
    """
    if staleness < 0:
        raise ValueError(f"staleness must be 0 or more, got {staleness}")
    return float((1 + staleness) ** -0.5)
