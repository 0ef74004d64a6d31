"""The nearest of the names that exist, for a name that does not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Return what to add to an error: `; nearest: a, b`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; nearest: {', '.join(near)}" if near else ""
