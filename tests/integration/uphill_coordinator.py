"""A coordinator that adds pseudo-gradients instead of subtracting them, of both kinds.

The fault of the system that this one replaces; the sign tests must catch it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from coordinator import cli
from coordinator.domain.muon import merged_step
from coordinator.domain.outer_step import outer_step
from coordinator.service import stepping


def uphill(*arguments: Any, rate: float, decay: float) -> Any:
    return outer_step(*arguments, rate=-rate, decay=decay)


def uphill_by_muon(
    state: Any, submissions: Iterable[Any], *rest: Any, **more: Any
) -> Any:
    turned = (replace(part, share=-part.share) for part in submissions)
    return merged_step(state, turned, *rest, **more)


if __name__ == "__main__":
    stepping.outer_step = uphill
    stepping.merged_step = uphill_by_muon
    sys.exit(cli.main())
