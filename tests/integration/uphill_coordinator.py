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


def uphill(*arguments: Any, rate: float, **more: Any) -> Any:
    return outer_step(*arguments, rate=-rate, **more)


def uphill_by_muon(
    state: Any, submissions: Iterable[Any], *rest: Any, mean: Any, **more: Any
) -> Any:
    turned = (replace(part, share=-part.share) for part in submissions)
    mean = None if mean is None else -mean
    return merged_step(state, turned, *rest, mean=mean, **more)


if __name__ == "__main__":
    stepping.outer_step = uphill
    stepping.merged_step = uphill_by_muon
    sys.exit(cli.main())
